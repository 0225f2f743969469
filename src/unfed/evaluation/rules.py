"""How a metric comes of the collected evidence, and what it needs for that: single columns and pairs of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from unfed.evaluation.evidence import Evidence
from unfed.evaluation.logs import ModelLogs
from unfed.evaluation.scoring import Column, Extra
from unfed.metrics import overlap, probability
from unfed.metrics.stats import Array, Score, TokenStats


@dataclass(frozen=True)
class References:
    """What the model is compared with: the logs of the retain model and of the fine-tuned one."""

    retain: ModelLogs | None = None
    finetuned: ModelLogs | None = None
    classifier: str | None = None


@dataclass(frozen=True)
class Findings:
    """What a metric may look at: the collected evidence, earlier metrics, the models to compare with."""

    evidence: Evidence
    scores: Mapping[str, Score]
    references: References = References()


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
class BaseRule:
    """Needs nothing; rules say what they need by what they override."""

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
class Prob(BaseRule):
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
class AgainstWrong(BaseRule):
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
class Rouge(BaseRule):
    """ROUGE of the generated answers of one split against the answers of one column."""

    split: str
    column: str = "answer"
    kind: overlap.Kind = "rougeL_recall"

    @property
    def generated(self) -> tuple[Column, ...]:
        return ((self.split, self.column),)

    def __call__(self, found: Findings) -> Score:
        own = found.evidence.generations[self.split]
        return overlap.rouge_score(own.answers[self.column], own.texts, own.prompts, self.kind)


@dataclass(frozen=True)
class Memorised(BaseRule):
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
