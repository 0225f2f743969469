"""Metrics by name, and suites of them: what a metric needs, and how its score comes of the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from unfed.base.errors import ConfigError, nearest
from unfed.evaluation.evidence import Evidence
from unfed.evaluation.rules import AgainstWrong, Findings, Prob, References, Rule
from unfed.evaluation.scoring import Column, Extra
from unfed.metrics.stats import Score


@dataclass(frozen=True)
class Metric:
    """A named metric; ``higher_is_better`` for a model made to forget, ``None`` where neither end is good."""

    name: str
    rule: Rule
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class Suite:
    """Metrics in an order in which each comes after its parts, and the headline ones, which are the default.

    ``title`` begins the names of the result files: ``TOFU_EVAL.json``.
    """

    title: str
    metrics: Mapping[str, Metric]
    default: tuple[str, ...]

    @property
    def eval_file(self) -> str:
        """Name of the file with every metric and row."""
        return f"{self.title}_EVAL.json"

    @property
    def summary_file(self) -> str:
        """Name of the file with a number for each metric."""
        return f"{self.title}_SUMMARY.json"

    def unknown(self, names: Sequence[str], key: str = "eval.metrics") -> list[str]:
        """A message for each name that is no metric of the suite, with the nearest one that is."""
        return [f"{key}: no such metric {n!r}{nearest(n, self.metrics)}" for n in names if n not in self.metrics]

    def select(self, names: Sequence[str]) -> tuple[Metric, ...]:
        """The named metrics (none: the default) with the metrics they are made of, in the suite's order.

        Raises ``ConfigError`` naming every unknown metric with the nearest valid one.
        """
        if problems := self.unknown(names):
            raise ConfigError(problems)
        wanted = set(names or self.default)
        todo = list(wanted)
        while todo:
            rule = self.metrics[todo.pop()].rule
            for part in (*rule.parts, *self._companions(rule)):
                if part not in wanted:
                    wanted.add(part)
                    todo.append(part)
        return tuple(m for m in self.metrics.values() if m.name in wanted)

    def _companions(self, rule: Rule) -> tuple[str, ...]:
        """Probabilities that a ratio is made of: the reference's files show them, and they cost nothing more."""
        if not isinstance(rule, AgainstWrong):
            return ()
        return tuple(
            m.name for m in self.metrics.values() if isinstance(m.rule, Prob) and m.rule.columns[0] in rule.columns
        )


def asked_extras(metrics: Sequence[Metric]) -> dict[Extra, frozenset[Column]]:
    """For each extra the columns of which some metric asks it."""
    asked: dict[Extra, set[Column]] = {}
    for metric in metrics:
        for extra in metric.rule.asks:
            asked.setdefault(extra, set()).update(metric.rule.columns or metric.rule.generated)
    return {extra: frozenset(columns) for extra, columns in asked.items()}


def compute(metrics: Sequence[Metric], evidence: Evidence, references: References) -> dict[str, Score]:
    """Score every metric, in order. One whose columns are missing has no value and says which."""
    scores: dict[str, Score] = {}
    for metric in metrics:
        needs = [*metric.rule.columns, *metric.rule.generated]
        gaps = dict.fromkeys(evidence.missing[c] for c in needs if c in evidence.missing)
        if not gaps:
            gaps = dict.fromkeys(
                f"{p} has no value: {scores[p].why}" for p in metric.rule.parts if scores[p].value is None
            )
        score = Score(None, why="; ".join(gaps)) if gaps else metric.rule(Findings(evidence, scores, references))
        scores[metric.name] = replace(score, higher_is_better=metric.higher_is_better)
    return scores
