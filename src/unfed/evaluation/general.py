"""WMDP and general benchmarks: lm-eval on the model that is open, with its adapter."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
from torch import nn
from transformers import PreTrainedTokenizerBase

from unfed.base.artifacts import digest_json, write_json
from unfed.base.errors import UnfedError
from unfed.evaluation.lm_tasks import LmEvalArgs, known_names, load_tasks
from unfed.evaluation.logs import RUN_KEY
from unfed.evaluation.runner import EvalResult
from unfed.metrics.stats import Score, number

EVAL_FILE = "LM_EVAL.json"
SUMMARY_FILE = "LM_SUMMARY.json"
SEEDS: Mapping[str, Any] = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}
"""lm-eval's own, so that the examples before a question are those of published numbers."""


@dataclass(frozen=True)
class BenchmarkResult(EvalResult):
    """Scores by ``<task>/<metric>``: of the tasks that were asked for (``headline``), and of a group's parts.

    A metric of another filter than lm-eval's ``none`` keeps its name: ``gsm8k/exact_match,strict-match``. Each score's
    ``extra`` holds ``stderr`` (lm-eval's standard error of the mean, or ``None``), ``n`` (rows), ``version`` (of the
    task) and ``num_fewshot``. ``run`` says with what settings, and holds a digest of each task's rows and
    prompts.
    """

    headline: tuple[str, ...] = ()
    run: Mapping[str, Any] = field(default_factory=dict)

    def to_eval_json(
        self, digests: Mapping[str, str] | None = None, forget_rows_seen: int | None = None
    ) -> dict[str, Any]:
        """The content of LM_EVAL.json: as TOFU_EVAL.json, with the settings in ``_run``."""
        content = super().to_eval_json(digests, forget_rows_seen)
        return {**content, RUN_KEY: {"agg_value": None, **self.run, "digests": dict(digests or {})}}

    def summary(self) -> dict[str, float]:
        """The content of LM_SUMMARY.json: ``<task>/<metric>`` -> number, for the tasks that were asked for."""
        return {name: value for name, value in super().summary().items() if name in self.headline}

    def lines(self) -> list[str]:
        """The summary for a person: value, standard error, number of rows."""
        lines = []
        for name, value in self.summary().items():
            extra = self.scores[name].extra
            error = "" if extra["stderr"] is None else f" ± {extra['stderr']:.4f}"
            lines.append(f"{name} {value:.4f}{error} ({extra['n']} rows, {extra['num_fewshot']}-shot)")
        return lines


def evaluate_benchmarks(model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: LmEvalArgs) -> BenchmarkResult:
    """Run lm-eval's tasks on ``model`` as it is: an adapter that is switched on takes part.

    Questions longer than the model's context lose their beginning, as lm-eval does it. Seeds are lm-eval's
    (:data:`SEEDS`). The model comes back in the mode it was in. No remote code is run: neither the model's nor a
    task's nor a metric's, nor code that the model has written.

    Raises ``ConfigError`` for an unknown task, ``UnfedError`` for one that cannot be loaded or does not fit its data.
    """
    import lm_eval
    from lm_eval.models import huggingface

    if args.apply_chat_template and not tokenizer.chat_template:
        raise UnfedError("eval.lm_eval.apply_chat_template=true: the model's tokenizer has no chat template")
    with _quiet():
        manager, tasks = load_tasks(args)
        # Any: both are hidden behind decorators without types.
        run_tasks: Any = lm_eval.simple_evaluate
        wrapped: Any = huggingface.HFLM
        was_training = model.training
        try:
            found = run_tasks(
                model=wrapped(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size),
                tasks=[task for objects in tasks.values() for task in objects],
                num_fewshot=args.num_fewshot,
                batch_size=args.batch_size,
                limit=args.limit,
                apply_chat_template=args.apply_chat_template,
                task_manager=manager,
                **SEEDS,
            )
        except (jinja2.TemplateError, LookupError, ValueError, TypeError, AssertionError) as e:
            # A template of a column that the rows do not have, an answer that is no choice, one task in two groups.
            first = (str(e).strip().splitlines() or [""])[0]
            raise UnfedError(f"eval.lm_eval.tasks={','.join(args.tasks)}: {type(e).__name__}: {first}") from e
        finally:
            model.train(was_training)
    assert found is not None  # one process
    names = [n for own in known_names(tasks).values() for n in own]
    scores = _scores(found)
    headline = tuple(n for n in scores if n.partition("/")[0] in names)
    run = {"tasks": known_names(tasks), "settings": asdict(args), "seeds": SEEDS}
    run["rows"] = {task: _digest(rows) for task, rows in found["samples"].items()}
    run["versions"] = {p: metadata.version(p) for p in ("lm-eval", "datasets", "transformers")}
    return BenchmarkResult(scores, {}, headline=headline, run=run)


def write_benchmarks(result: BenchmarkResult, directory: Path | str, digests: Mapping[str, str] | None = None) -> None:
    """Write LM_EVAL.json and LM_SUMMARY.json, each atomically."""
    write_json(Path(directory) / EVAL_FILE, result.to_eval_json(digests))
    write_json(Path(directory) / SUMMARY_FILE, result.summary())


def _scores(found: Mapping[str, Any]) -> dict[str, Score]:
    scores = {}
    for task, values in found["results"].items():
        about = {"version": found["versions"].get(task), "num_fewshot": found["n-shot"].get(task)}
        for key, value in values.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{rule}")
            n = values.get("sample_count", {}).get(key, values.get("sample_len"))
            extra = {"stderr": number(error) if isinstance(error, int | float) else None, "n": n, **about}
            rows = _rows(found.get("samples", {}).get(task, ()), metric, rule)
            shown = number(value) if isinstance(value, int | float) else None
            why = None if shown is not None else f"lm-eval gives {value!r}"
            scores[f"{task}/{metric}" if rule == "none" else f"{task}/{key}"] = Score(shown, rows, why, extra=extra)
    return scores


def _digest(samples: Sequence[Mapping[str, Any]]) -> str:
    """Which rows a task had, and how they were put to the model: few-shot examples and chat template included."""
    return digest_json(sorted({(s["doc_id"], s["doc_hash"], s["prompt_hash"]) for s in samples}))


def _rows(samples: Sequence[Mapping[str, Any]], metric: str, rule: str) -> tuple[Mapping[str, Any], ...] | None:
    """The metric of each row, in the order of the rows; ``None`` where it is not one number a row (or for a group)."""
    own = sorted((s for s in samples if s["filter"] == rule and metric in s), key=lambda s: s["doc_id"])
    if not own or not all(isinstance(s[metric], int | float) for s in own):
        return None
    return tuple({"score": number(s[metric])} for s in own)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's progress bars on a terminal only, and none of its remarks on being handed an open model.

    It asks for its bars to be drawn, here and there without a switch, so they are switched off where they are made. And
    it asks git for the commit of the working directory, which has nothing to do with it and may be no repository.
    """
    import lm_eval.evaluator
    import tqdm.std

    log, bar = logging.getLogger("lm_eval"), tqdm.std.tqdm
    level, draw, commit = log.level, bar.__init__, lm_eval.evaluator.get_git_commit_hash

    def hidden(self: Any, *given: Any, **options: Any) -> None:
        draw(self, *given, **{**options, "disable": True})

    lm_eval.evaluator.get_git_commit_hash = lambda: None
    log.setLevel(logging.CRITICAL)  # what matters is raised
    if not sys.stderr.isatty():
        bar.__init__ = hidden
    try:
        yield
    finally:
        bar.__init__, lm_eval.evaluator.get_git_commit_hash = draw, commit
        log.setLevel(level)
