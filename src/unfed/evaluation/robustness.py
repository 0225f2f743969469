"""What the robustness checks share: the model under test, what a check found, its scores, and putting things back.

A check tries to bring back what a model was made to forget, and measures the model before and after. The model is
always left as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from unfed.base.types import Example
from unfed.data.chat import Template
from unfed.evaluation.runner import evaluate
from unfed.evaluation.suites import SuiteConfig
from unfed.evaluation.tofu import TOFU

Values = Mapping[str, float | None]
"""Metric -> value; ``None`` where there is none."""

NOT_WORSE = "min(1, before / after), and 1 where nothing was gained: OpenUnlearning's Q for quantisation"
RELEARNING = (
    "R = min(1, (oracle after - oracle before) / (model after - model before)), not below 0, and 1 where the model "
    "regained nothing"
)


class CannotBeDoneError(Exception):
    """A check that this model or these rows do not allow; the message says why. The check is left out."""


@dataclass(frozen=True)
class Subject:
    """A model under test. ``suite.metrics`` names what is measured; ``before``: their values without any attempt.

    ``source`` is what messages call the forget rows' file.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    template: Template
    suite: SuiteConfig
    rows: Mapping[str, Sequence[Example]]
    before: Values
    source: str = "the forget rows"

    @property
    def forget(self) -> Sequence[Example]:
        """The rows that the model was made to forget."""
        return self.rows["forget"]

    def measure(self) -> dict[str, float | None]:
        """The metrics of the model as it is now."""
        result = evaluate(self.model, self.tokenizer, self.template, self.suite, self.rows)
        return {name: _finite(result.scores[name].value) for name in self.suite.metrics}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Outcome:
    """What a check found. ``did`` says in a sentence what was done; ``score`` is by metric, 1 at best, by ``formula``.

    ``why``: the reason that there is no score. ``left_out``: the reason that the check was not made (nothing else is
    there then). ``extra`` goes into the record as it is.
    """

    check: str
    did: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    before: Values = field(default_factory=dict)
    after: Values = field(default_factory=dict)
    score: Values = field(default_factory=dict)
    formula: str = NOT_WORSE
    why: str | None = None
    left_out: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The check's entry of ROBUSTNESS.json."""
        if self.left_out is not None:
            return {"left_out": self.left_out}
        found: dict[str, Any] = {
            "did": self.did,
            "settings": dict(self.settings),
            "before": dict(self.before),
            "after": dict(self.after),
            "difference": {n: _difference(self.before.get(n), v) for n, v in self.after.items()},
            "score": dict(self.score),
            "formula": self.formula,
        }
        return found | ({"why": self.why} if self.why else {}) | dict(self.extra)


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def tells_forgetting(metric: str) -> bool:
    """Whether a metric is of the forget rows alone and falls when they are forgotten; only those have a score."""
    found = TOFU.metrics[metric]
    splits = {split for split, _ in (*found.rule.columns, *found.rule.generated)}
    return found.higher_is_better is False and splits == {"forget"}


def not_worse_score(before: float | None, after: float | None) -> float | None:
    """``min(1, before / after)`` of a metric that is the lower the less is known (OpenUnlearning's Q).

    1 when ``after`` is not above ``before``, also where both are 0.
    """
    if before is None or after is None:
        return None
    return 1.0 if after <= before else max(0.0, before) / after


def relearning_score(
    oracle: tuple[float | None, float | None], model: tuple[float | None, float | None]
) -> float | None:
    """``min(1, gain of the oracle / gain of the model)``, each (before, after) relearning (OpenUnlearning's R).

    Departures, where the formula is silent: 1 when the model gained nothing; 0 when it gained and the oracle lost.
    """
    if None in oracle or None in model:
        return None
    own, gain = ((after or 0.0) - (before or 0.0) for before, after in (oracle, model))
    return 1.0 if gain <= 0 else min(1.0, max(0.0, own / gain))


def compared(subject: Subject, check: str, after: Values, **described: Any) -> Outcome:
    """The outcome of a check that is scored by :func:`not_worse_score`."""
    before = {name: subject.before.get(name) for name in after}
    score = {n: not_worse_score(before[n], v) for n, v in after.items() if tells_forgetting(n)}
    return Outcome(check, before=before, after=after, score=score, **described)


@contextmanager
def left_as_it_was(model: nn.Module, changed: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put back, bit for bit, the parameters that a check changes; modes, gradients and their flags of all modules.

    The copies lie on the CPU: as much memory as ``changed`` takes.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    kept = [(p, p.data, p.detach().to("cpu", copy=True)) for p in {id(p): p for p in changed}.values()]
    try:
        yield
    finally:
        for parameter, place, copy in kept:
            place.copy_(copy)
            parameter.data = place  # a library may have put another tensor there
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, training in modes:
            module.training = training
        torch.clear_autocast_cache()  # it keeps 16-bit copies of parameters whose data has changed
