"""Numbers made of other metrics' numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unfed.metrics.stats import Score

UTILITY_PARTS = (
    "retain_Q_A_Prob",
    "retain_Q_A_ROUGE",
    "retain_Truth_Ratio",
    "ra_Q_A_Prob_normalised",
    "ra_Q_A_ROUGE",
    "ra_Truth_Ratio",
    "wf_Q_A_Prob_normalised",
    "wf_Q_A_ROUGE",
    "wf_Truth_Ratio",
)
"""The nine parts of TOFU's model utility."""


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean of numbers >= 0; 0 as soon as one of them is 0. Raises ``ValueError`` on anything else."""
    if not values or any(not v >= 0 for v in values):
        raise ValueError(f"a harmonic mean needs numbers of 0 and above, not {list(values)}")
    if any(v == 0 for v in values):
        return 0.0
    return len(values) / sum(1 / v for v in values)


def model_utility(parts: Mapping[str, Score]) -> Score:
    """``model_utility``: the harmonic mean of its nine parts (TOFU, 2401.06121); a zero part makes it 0."""
    values: list[float] = []
    missing: list[str] = []
    for name in UTILITY_PARTS:
        value = parts[name].value if name in parts else None
        if value is None:
            missing.append(name)
        else:
            values.append(value)
    if missing:
        return Score(None, why=f"no value for {', '.join(missing)}", higher_is_better=True)
    return Score(harmonic_mean(values), higher_is_better=True)
