"""Result files of other models to compare with: the retain model's and the fine-tuned one's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unfed.base.artifacts import RUN_KEY, read_json
from unfed.base.errors import ArtifactError
from unfed.metrics.stats import Array
from unfed.models.load import same_base


@dataclass(frozen=True)
class ModelLogs:
    """The metrics of an evaluation file, ours or OpenUnlearning's. Messages call it by its ``name`` and the setting
    (``key``) that it came from."""

    name: str
    metrics: Mapping[str, Any]
    key: str = "retain_logs_path"

    def _entry(self, metric: str, key: str) -> Any:
        entry = self.metrics.get(metric)
        if not isinstance(entry, Mapping) or entry.get(key) is None:
            where = f"{metric}.{key}"
            reason = entry.get("why") if isinstance(entry, Mapping) else None
            raise ArtifactError(
                f"{self.name}: no {where} ({self.key})"
                + (f": {reason}" if reason else "")
                + ". Evaluate that model with the same suite and splits."
            )
        return entry[key]

    def truth_ratios(self) -> Array:
        """The forget set's truth ratios by row. Raises ``ArtifactError`` naming the file and the missing key."""
        rows = self._entry("forget_truth_ratio", "value_by_index")
        try:
            ordered = [rows[key]["score"] for key in sorted(rows, key=int)]
            return np.array([np.nan if v is None else float(v) for v in ordered])
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as e:
            raise ArtifactError(
                f"{self.name}: forget_truth_ratio.value_by_index is not row -> {{'score': number}} ({self.key})"
            ) from e

    def value(self, metric: str) -> float:
        """A metric's value. Raises ``ArtifactError`` naming the file and the missing key."""
        value = self._entry(metric, "agg_value")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ArtifactError(f"{self.name}: {metric}.agg_value is not a finite number ({self.key})")
        return float(value)

    def auc(self, metric: str) -> float:
        """An attack's AUC: as :meth:`value`, and within [0, 1]."""
        value = self.value(metric)
        if not 0 <= value <= 1:
            raise ArtifactError(f"{self.name}: {metric}.agg_value={value:g} is no AUC ({self.key})")
        return value

    def check_unseen(self) -> None:
        """Refuse the log of a model that was trained on forget rows, where the log knows. Raises ``ArtifactError``."""
        run = self.metrics.get(RUN_KEY)
        seen = run.get("forget_rows_seen") if isinstance(run, Mapping) else None
        if isinstance(seen, int) and seen > 0:
            raise ArtifactError(
                f"{self.name} ({self.key}): is of a model that was trained on {seen} of the forget rows; the model to "
                "compare with must never have seen them (oracle=auto trains one)"
            )

    def check_base(self, fingerprint: str) -> None:
        """Refuse the log of an adapter on another base than ``fingerprint``, where the log knows its base."""
        run = self.metrics.get(RUN_KEY)
        digests = run.get("digests") if isinstance(run, Mapping) else None
        if not isinstance(digests, Mapping) or "adapter" not in digests:
            return
        known = digests.get("base")
        if isinstance(known, str) and not same_base(known, fingerprint):
            raise ArtifactError(
                f"{self.name} ({self.key}): is of an adapter on another base model than this run's (its weights have "
                f"the digest {known[-12:]}, this run's {fingerprint[-12:]})"
            )

    def check_digest(self, split: str, digest: str) -> None:
        """Refuse a log of ours whose ``split`` had other rows. Raises ``ArtifactError``."""
        known = _split(self.metrics, split).get("digest")
        if known is not None and known != digest:
            raise ArtifactError(
                f"{self.name} ({self.key}): the log is of another {split} split"
                f"{_named(self.metrics, split)}: its rows are {known}, this run's are {digest}"
            )

    def check_content(self, split: str, content: str) -> None:
        """Refuse a log of ours whose ``split`` had other columns (paraphrased or wrong answers, say)."""
        known = _split(self.metrics, split).get("content")
        if isinstance(known, str) and known != content:
            raise ArtifactError(
                f"{self.name} ({self.key}): the {split} rows{_named(self.metrics, split)} had the same questions and "
                "answers, but other paraphrased or wrong answers: evaluate that model on this run's file"
            )

    def check_parity(self, parity: str | None) -> None:
        """Refuse a log of ours that was made with another ``eval.parity``."""
        run = self.metrics.get(RUN_KEY)
        if isinstance(run, Mapping) and "parity" in run and run["parity"] != parity:
            raise ArtifactError(
                f"{self.name} ({self.key}): was made with eval.parity={run['parity']}, this run has "
                f"eval.parity={parity}: their numbers do not compare"
            )

    def check_split(self, answers: Sequence[str], digest: str) -> None:
        """Refuse a log of another forget split than this run's rows.

        Compared: the rows' digest where the log is ours, the number of truth ratios, and the true answers
        where the log shows them. Raises ``ArtifactError`` saying what differs.
        """
        self.check_digest("forget", digest)
        refuse = f"{self.name}: the retain log is of another forget split: "
        rows = self._entry("forget_truth_ratio", "value_by_index")
        if len(rows) != len(answers):
            raise ArtifactError(f"{refuse}it has {len(rows)} rows, this run has {len(answers)}")
        rouge = self.metrics.get("forget_Q_A_ROUGE")
        shown = rouge.get("value_by_index") if isinstance(rouge, Mapping) else None
        for key, row in shown.items() if isinstance(shown, Mapping) else ():
            truth = row.get("ground_truth") if isinstance(row, Mapping) else None
            here = answers[int(key)] if key.isdigit() and int(key) < len(answers) else None
            if truth is not None and here is not None and str(truth).strip() != here.strip():
                raise ArtifactError(
                    f"{refuse}the answer of row {key} is {str(truth)[:60]!r} there and {here[:60]!r} here"
                )


def _named(metrics: Mapping[str, Any], split: str) -> str:
    name = _split(metrics, split).get("name")
    return f" ({name})" if name else ""


def _split(metrics: Mapping[str, Any], split: str) -> Mapping[str, Any]:
    """What a log of ours says of the rows of a split; others say nothing."""
    run = metrics.get(RUN_KEY)
    splits = run.get("splits") if isinstance(run, Mapping) else None
    found = splits.get(split) if isinstance(splits, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def load_model_logs(path: Path | str, key: str = "retain_logs_path") -> ModelLogs:
    """Read another model's TOFU_EVAL.json, ours or OpenUnlearning's (also nested under ``metrics``).

    Raises ``ArtifactError`` when the file is missing, is no JSON, or holds no metrics at all.
    """
    if Path(path).is_dir():
        there = sorted(f.name for f in Path(path).glob("*_EVAL.json"))
        raise ArtifactError(f"{key}={path}: is a directory; name the file{f' in it: {there[0]}' if there else ''}")
    try:
        found = read_json(path)
    except ArtifactError as e:
        raise ArtifactError(f"{key}={path}: {e}") from e
    nested = found.get("metrics") if isinstance(found, Mapping) else None
    metrics = nested if isinstance(nested, Mapping) else found
    if not isinstance(metrics, Mapping) or not any(
        isinstance(v, Mapping) and "agg_value" in v for v in metrics.values()
    ):
        raise ArtifactError(f"{path}: no metric with an agg_value; {key} names a TOFU_EVAL.json")
    return ModelLogs(str(path), metrics, key)
