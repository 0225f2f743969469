"""Membership inference as metrics: attacks, and what compares them with the retain model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unfed.base.errors import ArtifactError
from unfed.evaluation.evidence import Answers
from unfed.evaluation.rules import BaseRule, Findings
from unfed.evaluation.scoring import Column, Extra
from unfed.metrics import membership, summary
from unfed.metrics.stats import Array, Score


@dataclass(frozen=True)
class Attack(BaseRule):
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
class PrivLeak(BaseRule):
    """Relative difference of the Min-K AUC to the retain model's."""

    @property
    def parts(self) -> tuple[str, ...]:
        return ("mia_min_k",)

    def __call__(self, found: Findings) -> Score:
        logs = found.references.retain
        return membership.privleak(found.scores["mia_min_k"], None if logs is None else logs.auc("mia_min_k"))


@dataclass(frozen=True)
class Privacy(BaseRule):
    """Priv: how close four attacks come to what they find in the retain model."""

    @property
    def parts(self) -> tuple[str, ...]:
        return summary.PRIVACY_PARTS

    def __call__(self, found: Findings) -> Score:
        logs = found.references.retain
        if logs is None:
            return Score(None, why="no retain_logs_path: Priv compares with a retain model's attacks")
        try:
            references = {name: logs.auc(name) for name in summary.PRIVACY_PARTS}
        except ArtifactError as e:
            return Score(None, why=str(e))
        return summary.privacy(found.scores, references)
