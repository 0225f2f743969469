"""Evaluate a model: one pass over the answers, then every metric, then the result files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from unfed.base.artifacts import digest_json, write_json
from unfed.base.errors import DataError
from unfed.base.types import Example
from unfed.data.chat import Template
from unfed.data.datasets import data_digest
from unfed.evaluation.collect import collect
from unfed.evaluation.evidence import Evidence, column_problem
from unfed.evaluation.logs import RUN_KEY, ModelLogs
from unfed.evaluation.metric import Metric, Suite, asked_extras, compute
from unfed.evaluation.rules import References
from unfed.evaluation.scoring import Pass
from unfed.evaluation.suites import SuiteConfig
from unfed.evaluation.tofu import TOFU
from unfed.metrics.stats import Score
from unfed.models.adapter import base_alone

EVAL_FILE = TOFU.eval_file
SUMMARY_FILE = TOFU.summary_file


@dataclass(frozen=True)
class SplitInfo:
    """Which rows a split was: the data set's name, how many, a digest of their ids (which are digests of question and
    answer), and of all their columns (``content``); ``cut``: answers that ``max_length`` shortened."""

    name: str
    rows: int
    digest: str
    cut: int = 0
    content: str | None = None


@dataclass(frozen=True)
class EvalResult:
    """Scores by metric name (in the suite's order) and the rows they come from."""

    scores: Mapping[str, Score]
    splits: Mapping[str, SplitInfo]
    parity: str | None = None
    suite: Suite = TOFU

    def to_eval_json(
        self, digests: Mapping[str, str] | None = None, forget_rows_seen: int | None = None
    ) -> dict[str, Any]:
        """The content of TOFU_EVAL.json: metric -> ``agg_value``, ``value_by_index``, and ``why`` if any.

        The entry ``_run`` says which rows, and by ``digests`` which model and data; its ``agg_value`` is null, so
        that scripts that walk over the metrics pass over it. ``forget_rows_seen``: how many of the forget rows the
        model was trained on (an oracle: 0), where that is known.
        """
        run = {
            "agg_value": None,
            "splits": {
                s: {"name": i.name, "rows": i.rows, "digest": i.digest, "content": i.content, "cut": i.cut}
                for s, i in self.splits.items()
            },
            "parity": self.parity,
            "digests": dict(digests or {}),
            **({} if forget_rows_seen is None else {"forget_rows_seen": forget_rows_seen}),
        }
        return {**{name: _entry(score) for name, score in self.scores.items()}, RUN_KEY: run}

    def summary(self) -> dict[str, float]:
        """The content of TOFU_SUMMARY.json: metric -> number; a metric without a value is left out."""
        return {name: score.value for name, score in self.scores.items() if score.value is not None}

    def retain_logs(self, name: str = "the retain model") -> ModelLogs:
        """This result as the reference for another evaluation, without a file in between."""
        return ModelLogs(name, self.to_eval_json())


def _entry(score: Score) -> dict[str, Any]:
    entry: dict[str, Any] = {"agg_value": score.value, **score.extra}
    if score.per_example is not None:
        entry["value_by_index"] = {str(i): dict(row) for i, row in enumerate(score.per_example)}
    if score.why is not None:
        entry["why"] = score.why
    return entry


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    suite: SuiteConfig,
    rows_by_split: Mapping[str, Sequence[Example]],
    retain_logs: ModelLogs | None = None,
) -> EvalResult:
    """Evaluate ``model`` on the rows of the suite's splits (:mod:`unfed.data.benchmarks` lists them).

    A split that is absent or lacks a column leaves its metrics without a value, with the reason. The retain
    log is checked before anything is scored. The model comes back in the mode it was in, without gradients.

    Raises ``ConfigError`` for an unknown metric, ``ArtifactError`` for a retain log of another split or
    without what a wanted metric needs, ``DataError`` when there are no rows at all or a column has gaps.
    """
    metrics = suite.suite.select(suite.metrics)
    if not any(len(rows) for rows in rows_by_split.values()):
        raise DataError("the evaluation has no rows: every split is empty")
    digests = {split: data_digest(rows) for split, rows in rows_by_split.items()}
    if retain_logs is not None:
        check_retain_logs(retain_logs, metrics, rows_by_split)
        retain_logs.check_parity(suite.parity)
    if suite.finetuned_logs is not None:
        check_finetuned_logs(suite.finetuned_logs, metrics, rows_by_split)
    given = Pass(
        model=model,
        tokenizer=tokenizer,
        template=template,
        budget=suite.budget,
        decoding=suite.decoding,
        max_length=suite.max_length,
        mask_pad_ids=suite.parity == "openunlearning",
        asked=asked_extras(metrics),
        reference=suite.reference or _base_of(model),
        progress=suite.progress,
        layouts=suite.layouts,
        cache=suite.cache,
    )
    columns = [c for m in metrics for c in m.rule.columns]
    evidence = collect(given, rows_by_split, columns, [s for m in metrics for s in m.rule.generated])
    infos = {
        split: SplitInfo(
            suite.datasets.get(split, split), len(rows), digests[split], _cut(evidence, split), content_digest(rows)
        )
        for split, rows in rows_by_split.items()
    }
    references = References(retain_logs, suite.finetuned_logs, suite.classifier)
    return EvalResult(compute(metrics, evidence, references), infos, suite.parity, suite.suite)


def _base_of(model: nn.Module) -> Callable[[], AbstractContextManager[nn.Module]] | None:
    """The base beneath an adapter, as a reference model; ``None`` for a model without an adapter."""
    if not isinstance(model, PeftModel):
        return None

    @contextmanager
    def opened() -> Iterator[nn.Module]:
        with base_alone(model):
            yield model

    return opened


def _cut(evidence: Evidence, split: str) -> int:
    return sum(a.cut for (s, _), a in evidence.answers.items() if s == split)


def content_digest(rows: Sequence[Example]) -> str:
    """Digest of every column of the rows, in order."""
    return digest_json([dict(row) for row in rows])


def check_retain_logs(
    logs: ModelLogs, metrics: Sequence[Metric], rows_by_split: Mapping[str, Sequence[Example]]
) -> None:
    """Refuse a log that cannot be this run's reference. Raises ``ArtifactError`` naming the file and what is wrong.

    It is asked only for what this run will compare with it: a run without holdout rows has no privleak, and needs none
    of the log.
    """
    logs.check_unseen()
    names = {m.name for m in metrics}
    forget = rows_by_split.get("forget", ())
    if "forget_quality" in names and all(
        column_problem(forget, "forget", c) is None for c in ("paraphrased_answer", "perturbed_answer")
    ):
        logs.truth_ratios()
        logs.check_split([str(row["answer"]) for row in forget], data_digest(forget))
        logs.check_content("forget", content_digest(forget))
    if not forget or not rows_by_split.get("holdout"):
        return
    if "privleak" in names:
        logs.auc("mia_min_k")
    if names & {"privleak", "priv"}:
        for split in ("forget", "holdout"):
            logs.check_digest(split, data_digest(rows_by_split[split]))


def check_finetuned_logs(
    logs: ModelLogs, metrics: Sequence[Metric], rows_by_split: Mapping[str, Sequence[Example]]
) -> None:
    """Refuse a log whose utility is of other rows than this run's. Raises ``ArtifactError``."""
    if "utility" in {m.name for m in metrics}:
        for split, rows in rows_by_split.items():
            if rows:
                logs.check_digest(split, data_digest(rows))


def write_results(
    result: EvalResult,
    directory: Path | str,
    digests: Mapping[str, str] | None = None,
    forget_rows_seen: int | None = None,
) -> None:
    """Write the suite's two result files (``TOFU_EVAL.json`` and ``TOFU_SUMMARY.json``), each atomically.

    ``digests`` names what was evaluated (``{"adapter": "sha256:...", "data": ...}``), so that a result cannot
    be taken for another model's. Raises ``ArtifactError`` when the directory cannot be written to.
    """
    write_json(Path(directory) / result.suite.eval_file, result.to_eval_json(digests, forget_rows_seen))
    write_json(Path(directory) / result.suite.summary_file, result.summary())
