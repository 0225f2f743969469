"""What a search or a ladder is after: metrics by name, and bounds on them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unfed.app.oracle import RELATIVE
from unfed.base.errors import ConfigError, nearest
from unfed.config.schema import RunConfig
from unfed.evaluation.suites import SUITES
from unfed.report.labels import AGAINST_ORACLE, LOG10_P

FINETUNED, ORACLE = "finetuned", "oracle"
_FORM = re.compile(r"\s*(\w+)\s*(<=|>=)\s*(?:([-+]?[\d.]+(?:e[-+]?\d+)?)\s*(?:\*\s*(\w+))?|(\w+))\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """``metric`` should be at least (else at most) ``factor``, times the score of the model ``of`` if one is named."""

    metric: str
    at_least: bool
    factor: float
    of: str | None = None

    @property
    def needs_oracle(self) -> bool:
        """Whether this can only be told beside the oracle."""
        return self.of == ORACLE or self.metric in {*AGAINST_ORACLE, *RELATIVE}

    def bound(self, references: Mapping[str, Mapping[str, float]]) -> float | None:
        """The number to reach; ``references``: model -> its scores. ``None``: the model has no such score."""
        if self.of is None:
            return self.factor
        value = references.get(self.of, {}).get(self.metric)
        return None if value is None else self.factor * value

    def shortfall(self, value: float | None, bound: float | None) -> float:
        """How far ``value`` is from the bound, as a share of it; 0 where it is met, infinite where nobody knows."""
        if value is None or bound is None:
            return float("inf")
        missing = bound - value if self.at_least else value - bound
        return 0.0 if missing <= 0 else missing / max(abs(bound), 1e-12)

    def __str__(self) -> str:
        model = f"*{self.of}" if self.of else ""
        return f"{self.metric}{'>=' if self.at_least else '<='}{self.factor:g}{model}"


def read_target(text: str) -> Target:
    """Read ``model_utility>=0.55``, ``model_utility>=0.95*finetuned`` or ``forget_Q_A_Prob<=oracle``."""
    match = _FORM.fullmatch(text)
    try:
        factor = float(match[3]) if match and match[3] else 1.0
    except ValueError:
        match, factor = None, 1.0
    if match is None:
        raise ConfigError([f"--target {text}: write METRIC>=NUMBER, METRIC<=NUMBER or METRIC>=NUMBER*finetuned"])
    of = match[4] or match[5]
    if of not in {None, FINETUNED, ORACLE}:
        raise ConfigError([f"--target {text}: no such model {of!r}{nearest(of, (FINETUNED, ORACLE))}"])
    return Target(match[1], match[2] == ">=", factor, of)


def known_metrics(config: RunConfig, names: Sequence[str], more: Sequence[str] = ()) -> None:
    """Raise ``ConfigError`` for names that the run's evaluation does not measure (``more`` are known as well)."""
    given = config.eval
    if given is None or not given.enabled:
        raise ConfigError([f"{', '.join(names)}: the runs have no evaluation (eval, eval.enabled)"])
    if given.suite not in SUITES:
        return
    measured = {m.name for m in SUITES[given.suite].select(given.metrics)}
    measured |= {LOG10_P} if "forget_quality" in measured else set()
    unknown = [n for n in names if n not in measured | set(more)]
    if unknown:
        raise ConfigError(
            [f"{n}: the runs do not measure this (eval.metrics){nearest(n, measured | set(more))}" for n in unknown]
        )
