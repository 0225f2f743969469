"""How each metric of a suite comes of the collected evidence, and what it needs for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from unfed.evaluation.collect import Column, Evidence
from unfed.evaluation.retain_logs import RetainLogs
from unfed.metrics import membership, overlap, probability, summary
from unfed.metrics.stats import Array, Score, TokenStats


@dataclass(frozen=True)
class Findings:
    """What a metric may look at: the collected evidence, earlier metrics, the retain model's log."""

    evidence: Evidence
    scores: Mapping[str, Score]
    retain_logs: RetainLogs | None


class Rule(Protocol):
    """How one metric comes of its needs."""

    @property
    def needs_details(self) -> bool: ...
    @property
    def columns(self) -> tuple[Column, ...]: ...
    @property
    def generated(self) -> tuple[str, ...]: ...
    @property
    def parts(self) -> tuple[str, ...]: ...
    def __call__(self, found: Findings) -> Score: ...


@dataclass(frozen=True)
class _Rule:
    """Needs nothing; the rules below say what they need."""

    @property
    def needs_details(self) -> bool:
        return False

    @property
    def columns(self) -> tuple[Column, ...]:
        return ()

    @property
    def generated(self) -> tuple[str, ...]:
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
    """ROUGE of the generated answers of one split."""

    split: str

    @property
    def generated(self) -> tuple[str, ...]:
        return (self.split,)

    def __call__(self, found: Findings) -> Score:
        own = found.evidence.generations[self.split]
        return overlap.rouge_score(own.answers, own.texts, own.prompts)


@dataclass(frozen=True)
class Memorised(_Rule):
    """A memorisation metric on the forget answers."""

    measure: Callable[[TokenStats], Score]

    @property
    def needs_details(self) -> bool:
        return True

    @property
    def columns(self) -> tuple[Column, ...]:
        return (("forget", "answer"),)

    def __call__(self, found: Findings) -> Score:
        return self.measure(found.evidence.answers["forget", "answer"].stats)


@dataclass(frozen=True)
class Attack(_Rule):
    """A membership inference attack: forget answers beside holdout answers."""

    measure: Callable[[TokenStats, Sequence[str]], Array]
    needs_moments: bool = False

    @property
    def needs_details(self) -> bool:
        return self.needs_moments

    @property
    def columns(self) -> tuple[Column, ...]:
        return (("forget", "answer"), ("holdout", "answer"))

    def __call__(self, found: Findings) -> Score:
        sides = [found.evidence.answers[c] for c in self.columns]
        return membership.attack_score(*(self.measure(s.stats, s.texts) for s in sides))


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
        return membership.privleak(found.scores["mia_min_k"], None if logs is None else logs.min_k_auc())


def _floats(values: Sequence[float | None]) -> Array:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)
