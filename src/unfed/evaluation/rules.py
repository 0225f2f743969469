"""How each metric of a suite comes of the collected evidence, and what it needs for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from unfed.base.errors import ArtifactError
from unfed.evaluation.collect import Answers, Evidence
from unfed.evaluation.retain_logs import RetainLogs
from unfed.evaluation.scoring import Column, Extra
from unfed.metrics import membership, overlap, probability, summary
from unfed.metrics.stats import Array, Score, TokenStats, from_rows


@dataclass(frozen=True)
class Findings:
    """What a metric may look at: the collected evidence, earlier metrics, the retain model's log."""

    evidence: Evidence
    scores: Mapping[str, Score]
    retain_logs: RetainLogs | None


class Rule(Protocol):
    """How one metric comes of its needs."""

    @property
    def asks(self) -> frozenset[Extra]: ...
    @property
    def columns(self) -> tuple[Column, ...]: ...
    @property
    def generated(self) -> tuple[Column, ...]: ...
    @property
    def parts(self) -> tuple[str, ...]: ...
    def __call__(self, found: Findings) -> Score: ...


@dataclass(frozen=True)
class _Rule:
    """Needs nothing; the rules below say what they need."""

    @property
    def asks(self) -> frozenset[Extra]:
        return frozenset()

    @property
    def columns(self) -> tuple[Column, ...]:
        return ()

    @property
    def generated(self) -> tuple[Column, ...]:
        return ()

    @property
    def parts(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class Prob(_Rule):
    """Probability of the answers of one column."""

    split: str
    column: str = "answer"

    @property
    def columns(self) -> tuple[Column, ...]:
        return ((self.split, self.column),)

    def __call__(self, found: Findings) -> Score:
        own = found.evidence.answers[self.split, self.column]
        return probability.probability_score(own.losses, own.counts if own.listed else None)


@dataclass(frozen=True)
class AgainstWrong(_Rule):
    """A right answer beside wrong ones: two columns of one split."""

    split: str
    correct: str = "answer"
    wrong: str = "perturbed_answer"

    @property
    def columns(self) -> tuple[Column, ...]:
        return ((self.split, self.correct), (self.split, self.wrong))

    def _losses(self, found: Findings) -> tuple[Array, list[Array]]:
        answers = found.evidence.answers
        return answers[self.split, self.correct].losses, answers[self.split, self.wrong].losses_by_row


@dataclass(frozen=True)
class NormalisedProb(AgainstWrong):
    """Probability of the right answer among its options."""

    def __call__(self, found: Findings) -> Score:
        return probability.normalised_score(*self._losses(found))


@dataclass(frozen=True)
class TruthRatio(AgainstWrong):
    """Truth ratio; ``aggregate`` turns the rows' ratios into what is averaged."""

    aggregate: Callable[[Array], Array] = probability.true_better

    def __call__(self, found: Findings) -> Score:
        return probability.truth_ratio_score(*self._losses(found), self.aggregate)


@dataclass(frozen=True)
class Rouge(_Rule):
    """ROUGE of the generated answers of one split against the answers of one column."""

    split: str
    column: str = "answer"

    @property
    def generated(self) -> tuple[Column, ...]:
        return ((self.split, self.column),)

    def __call__(self, found: Findings) -> Score:
        own = found.evidence.generations[self.split]
        return overlap.rouge_score(own.answers[self.column], own.texts, own.prompts)


@dataclass(frozen=True)
class Memorised(_Rule):
    """A memorisation metric on the answers of one split."""

    measure: Callable[[TokenStats], Score]
    split: str = "forget"

    @property
    def asks(self) -> frozenset[Extra]:
        return frozenset({"details"})

    @property
    def columns(self) -> tuple[Column, ...]:
        return ((self.split, "answer"),)

    def __call__(self, found: Findings) -> Score:
        return self.measure(found.evidence.answers[self.split, "answer"].stats)


@dataclass(frozen=True)
class Attack(_Rule):
    """A membership inference attack: forget answers beside holdout answers.

    ``extra``: what it asks of their columns beyond the labels' log-probabilities.
    """

    measure: Callable[[Answers], Array]
    extra: Extra | None = None

    @property
    def asks(self) -> frozenset[Extra]:
        return frozenset({self.extra} if self.extra else ())

    @property
    def columns(self) -> tuple[Column, ...]:
        return (("forget", "answer"), ("holdout", "answer"))

    def __call__(self, found: Findings) -> Score:
        sides = [found.evidence.answers[c] for c in self.columns]
        if self.extra == "reference" and any(s.reference is None for s in sides):
            return Score(None, why="no reference model: give eval.reference_model_path, or evaluate an adapter")
        return membership.attack_score(*(self.measure(s) for s in sides))


def loss_attack(own: Answers) -> Array:
    """See :func:`unfed.metrics.membership.loss`."""
    return membership.loss(own.stats)


def zlib_attack(own: Answers) -> Array:
    """See :func:`unfed.metrics.membership.zlib_ratio`."""
    return membership.zlib_ratio(own.stats, own.texts)


def min_k_attack(own: Answers) -> Array:
    """See :func:`unfed.metrics.membership.min_k`."""
    return membership.min_k(own.stats)


def min_k_plus_plus_attack(own: Answers) -> Array:
    """See :func:`unfed.metrics.membership.min_k_plus_plus`."""
    return membership.min_k_plus_plus(own.stats)


def reference_attack(own: Answers) -> Array:
    """See :func:`unfed.metrics.membership.reference`."""
    assert own.reference is not None
    return membership.reference(own.stats, own.reference)


def gradnorm_attack(own: Answers) -> Array:
    """The norm of each answer's gradient: a member's is small (Nasr et al. 2019)."""
    assert own.gradient_norms is not None
    return own.gradient_norms


@dataclass(frozen=True)
class ForgetQuality(_Rule):
    """Kolmogorov-Smirnov p-value against the retain model's truth ratios."""

    @property
    def parts(self) -> tuple[str, ...]:
        return ("forget_truth_ratio",)

    def __call__(self, found: Findings) -> Score:
        if found.retain_logs is None:
            return Score(None, why="no retain_logs_path: forget quality compares with a retain model's truth ratios")
        own = found.scores["forget_truth_ratio"].per_example or ()
        ratios = [row["score"] for row in own]
        return probability.forget_quality(_floats(ratios), found.retain_logs.truth_ratios())


@dataclass(frozen=True)
class ModelUtility(_Rule):
    """Harmonic mean of the nine utility metrics."""

    @property
    def parts(self) -> tuple[str, ...]:
        return summary.UTILITY_PARTS

    def __call__(self, found: Findings) -> Score:
        return summary.model_utility(found.scores)


@dataclass(frozen=True)
class PrivLeak(_Rule):
    """Relative difference of the Min-K AUC to the retain model's."""

    @property
    def parts(self) -> tuple[str, ...]:
        return ("mia_min_k",)

    def __call__(self, found: Findings) -> Score:
        logs = found.retain_logs
        return membership.privleak(found.scores["mia_min_k"], None if logs is None else logs.auc("mia_min_k"))


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
class Privacy(_Rule):
    """Priv: how close four attacks come to what they find in the retain model."""

    @property
    def parts(self) -> tuple[str, ...]:
        return summary.PRIVACY_PARTS

    def __call__(self, found: Findings) -> Score:
        logs = found.retain_logs
        if logs is None:
            return Score(None, why="no retain_logs_path: Priv compares with a retain model's attacks")
        try:
            references = {name: logs.auc(name) for name in summary.PRIVACY_PARTS}
        except ArtifactError as e:
            return Score(None, why=str(e))
        return summary.privacy(found.scores, references)


def _floats(values: Sequence[float | None]) -> Array:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)
