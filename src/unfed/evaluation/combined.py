"""Metrics made of other metrics, of generated text, or of another model's log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unfed.base.errors import ArtifactError, UnfedError
from unfed.evaluation.rules import AgainstWrong, BaseRule, Findings
from unfed.evaluation.scoring import Column, Extra
from unfed.metrics import memorization, probability, summary
from unfed.metrics.stats import Array, Score, from_rows


@dataclass(frozen=True)
class ForgetQuality(BaseRule):
    """Kolmogorov-Smirnov p-value against the retain model's truth ratios."""

    @property
    def parts(self) -> tuple[str, ...]:
        return ("forget_truth_ratio",)

    def __call__(self, found: Findings) -> Score:
        if found.references.retain is None:
            return Score(None, why="no retain_logs_path: forget quality compares with a retain model's truth ratios")
        own = found.scores["forget_truth_ratio"].per_example or ()
        ratios = [row["score"] for row in own]
        return probability.forget_quality(_floats(ratios), found.references.retain.truth_ratios())


@dataclass(frozen=True)
class ModelUtility(BaseRule):
    """Harmonic mean of the nine utility metrics."""

    @property
    def parts(self) -> tuple[str, ...]:
        return summary.UTILITY_PARTS

    def __call__(self, found: Findings) -> Score:
        return summary.model_utility(found.scores)


@dataclass(frozen=True)
class Memorisation(AgainstWrong):
    """Mem: how little is left of the forget answers."""

    @property
    def parts(self) -> tuple[str, ...]:
        return summary.MEMORISATION_PARTS

    def __call__(self, found: Findings) -> Score:
        share = from_rows(probability.prob_mean(*self._losses(found)))
        return summary.memorisation(found.scores, share.value)


@dataclass(frozen=True)
class Fluency(BaseRule):
    """How likely the base model finds the answers that the model generates for one split."""

    split: str

    @property
    def asks(self) -> frozenset[Extra]:
        return frozenset({"fluency"})

    @property
    def generated(self) -> tuple[Column, ...]:
        return ((self.split, "answer"),)

    def __call__(self, found: Findings) -> Score:
        own = found.evidence.generations[self.split]
        if own.under_base is None:
            return Score(None, why="no base model to judge by: give eval.reference_model_path, or evaluate an adapter")
        return memorization.fluency_score(own.under_base)


@dataclass(frozen=True)
class Gibberish(BaseRule):
    """Probability that a classifier gives the generated answers of one split for being clean text."""

    split: str

    @property
    def generated(self) -> tuple[Column, ...]:
        return ((self.split, "answer"),)

    def __call__(self, found: Findings) -> Score:
        from unfed.evaluation.classifier import GIBBERISH_DETECTOR, clean_probabilities

        own = found.evidence.generations[self.split]
        try:
            return from_rows(clean_probabilities(own.texts, found.references.classifier or GIBBERISH_DETECTOR))
        except UnfedError as e:  # the rest of the evaluation is done by now, and stands without it
            return Score(None, why=str(e))


@dataclass(frozen=True)
class RelativeUtility(BaseRule):
    """Utility: what is left of the fine-tuned model's utility and fluency."""

    @property
    def parts(self) -> tuple[str, ...]:
        return summary.RELATIVE_PARTS

    def __call__(self, found: Findings) -> Score:
        logs = found.references.finetuned
        if logs is None:
            return Score(None, why="no eval.finetuned_logs_path: Utility is relative to the fine-tuned model's")
        try:
            before = {name: logs.value(name) for name in summary.RELATIVE_PARTS}
        except ArtifactError as e:
            return Score(None, why=str(e))
        return summary.relative_utility(found.scores, before)


@dataclass(frozen=True)
class Overall(BaseRule):
    """Agg: Mem, Priv and Utility in one number; never to be shown without them."""

    @property
    def parts(self) -> tuple[str, ...]:
        return summary.OVERALL_PARTS

    def __call__(self, found: Findings) -> Score:
        return summary.overall(found.scores)


def _floats(values: Sequence[float | None]) -> Array:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)
