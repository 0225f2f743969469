"""Evaluation suites as data: which splits and columns give which metrics.

A metric says what it needs (columns to score, splits to answer, other metrics) and how it comes of them; the
runner collects the union of the needs in one pass and then asks each metric for its score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from unfed.base.errors import ConfigError, nearest
from unfed.evaluation.collect import Evidence
from unfed.evaluation.retain_logs import RetainLogs
from unfed.evaluation.rules import (
    AgainstWrong,
    Attack,
    Findings,
    ForgetQuality,
    Memorisation,
    Memorised,
    ModelUtility,
    NormalisedProb,
    Privacy,
    PrivLeak,
    Prob,
    Rouge,
    Rule,
    TruthRatio,
    gradnorm_attack,
    loss_attack,
    min_k_attack,
    min_k_plus_plus_attack,
    reference_attack,
    zlib_attack,
)
from unfed.evaluation.scoring import Column, Extra
from unfed.metrics import memorization, probability
from unfed.metrics.stats import Score
from unfed.models.generate import Budget, Decoding, Progress


@dataclass(frozen=True)
class Metric:
    """A named metric; ``higher_is_better`` for a model made to forget, ``None`` where neither end is good."""

    name: str
    rule: Rule
    higher_is_better: bool | None = None


def _tofu_metrics() -> tuple[Metric, ...]:
    found = [
        Metric("forget_Q_A_Prob", Prob("forget"), False),
        Metric("forget_Q_A_PARA_Prob", Prob("forget", "paraphrased_answer"), False),
        Metric("forget_Q_A_PERT_Prob", Prob("forget", "perturbed_answer")),
        Metric("forget_Q_A_ROUGE", Rouge("forget"), False),
        Metric("forget_Q_A_PARA_ROUGE", Rouge("forget", "paraphrased_answer"), False),
        Metric("forget_Q_A_PERT_ROUGE", Rouge("forget", "perturbed_answer")),
        Metric(
            "forget_truth_ratio",
            TruthRatio("forget", "paraphrased_answer", aggregate=probability.closer_to_1_better),
            True,
        ),
        Metric("forget_quality", ForgetQuality(), True),
        Metric("extraction_strength", Memorised(memorization.extraction_strength_score), False),
        Metric("exact_memorization", Memorised(memorization.exact_memorization_score), False),
        Metric("retain_Q_A_Prob", Prob("retain"), True),
        Metric("retain_Q_A_PARA_Prob", Prob("retain", "paraphrased_answer"), True),
        Metric("retain_Q_A_PERT_Prob", Prob("retain", "perturbed_answer"), False),
        Metric("retain_Q_A_ROUGE", Rouge("retain"), True),
        Metric("retain_Q_A_PARA_ROUGE", Rouge("retain", "paraphrased_answer"), True),
        Metric("retain_Q_A_PERT_ROUGE", Rouge("retain", "perturbed_answer"), False),
        Metric("retain_extraction_strength", Memorised(memorization.extraction_strength_score, "retain"), True),
        Metric("retain_Truth_Ratio", TruthRatio("retain", "paraphrased_answer"), True),
    ]
    for short, split in (("ra", "real_authors"), ("wf", "world_facts")):
        found += [
            Metric(f"{short}_Q_A_Prob", Prob(split), True),
            Metric(f"{short}_Q_A_PERT_Prob", Prob(split, "perturbed_answer"), False),
            Metric(f"{short}_Q_A_Prob_normalised", NormalisedProb(split), True),
            Metric(f"{short}_Q_A_ROUGE", Rouge(split), True),
            Metric(f"{short}_Truth_Ratio", TruthRatio(split), True),
        ]
    return (
        *found,
        Metric("model_utility", ModelUtility(), True),
        Metric("mia_loss", Attack(loss_attack)),
        Metric("mia_zlib", Attack(zlib_attack)),
        Metric("mia_min_k", Attack(min_k_attack)),
        Metric("mia_min_k_plus_plus", Attack(min_k_plus_plus_attack, "details")),
        Metric("mia_reference", Attack(reference_attack, "reference")),
        Metric("mia_gradnorm", Attack(gradnorm_attack, "gradients")),
        Metric("privleak", PrivLeak()),
        Metric("mem", Memorisation("forget", "paraphrased_answer"), True),
        Metric("priv", Privacy(), True),
    )


TOFU_METRICS: Mapping[str, Metric] = {m.name: m for m in _tofu_metrics()}
"""Every metric of the TOFU suite, in an order in which each comes after its parts."""

TOFU_DEFAULT = (
    "forget_quality", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "model_utility", "privleak", "extraction_strength",
)  # fmt: skip
"""The suite's headline metrics; their parts are reported with them."""


@dataclass(frozen=True)
class SuiteConfig:
    """An evaluation. ``metrics`` names the wanted ones (empty: the suite's default); ``datasets`` maps each
    split to its data set's name, for the record. ``parity='openunlearning'`` reproduces that code's attention
    mask, which hides every token equal to the padding id. ``progress`` is called with (what, done, total).
    ``reference`` opens the model that ``mia_reference`` compares with; without it, that is the base beneath an
    adapter."""

    metrics: tuple[str, ...] = ()
    datasets: Mapping[str, str] = field(default_factory=dict)
    budget: Budget = Budget()
    decoding: Decoding = Decoding()
    max_length: int | None = 512
    parity: Literal["openunlearning"] | None = None
    progress: Progress | None = field(default=None, compare=False)
    reference: Callable[[], AbstractContextManager[nn.Module]] | None = field(default=None, compare=False)


def select(names: Sequence[str]) -> tuple[Metric, ...]:
    """The named TOFU metrics (none: the default) with the metrics they are made of, in the suite's order.

    Raises ``ConfigError`` naming every unknown metric with the nearest valid one.
    """
    unknown = [n for n in names if n not in TOFU_METRICS]
    if unknown:
        raise ConfigError([f"eval.metrics: unknown metric {n!r}{nearest(n, TOFU_METRICS)}" for n in unknown])
    wanted = set(names or TOFU_DEFAULT)
    todo = list(wanted)
    while todo:
        rule = TOFU_METRICS[todo.pop()].rule
        for part in (*rule.parts, *_companions(rule)):
            if part not in wanted:
                wanted.add(part)
                todo.append(part)
    return tuple(m for m in TOFU_METRICS.values() if m.name in wanted)


def _companions(rule: Rule) -> tuple[str, ...]:
    """Probabilities that a ratio is made of: the reference's files show them, and they cost nothing more."""
    if not isinstance(rule, AgainstWrong):
        return ()
    return tuple(
        m.name for m in TOFU_METRICS.values() if isinstance(m.rule, Prob) and m.rule.columns[0] in rule.columns
    )


def asked_extras(metrics: Sequence[Metric]) -> dict[Extra, frozenset[Column]]:
    """For each extra the columns of which some metric asks it."""
    asked: dict[Extra, set[Column]] = {}
    for metric in metrics:
        for extra in metric.rule.asks:
            asked.setdefault(extra, set()).update(metric.rule.columns)
    return {extra: frozenset(columns) for extra, columns in asked.items()}


def compute(metrics: Sequence[Metric], evidence: Evidence, retain_logs: RetainLogs | None) -> dict[str, Score]:
    """Score every metric, in order. One whose columns are missing has no value and says which."""
    scores: dict[str, Score] = {}
    for metric in metrics:
        needs = [*metric.rule.columns, *metric.rule.generated]
        gaps = dict.fromkeys(evidence.missing[c] for c in needs if c in evidence.missing)
        if not gaps:
            gaps = dict.fromkeys(
                f"{p} has no value: {scores[p].why}" for p in metric.rule.parts if scores[p].value is None
            )
        score = Score(None, why="; ".join(gaps)) if gaps else metric.rule(Findings(evidence, scores, retain_logs))
        scores[metric.name] = replace(score, higher_is_better=metric.higher_is_better)
    return scores
