"""Numbers made of other metrics' numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

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
    values = {name: parts[name].value if name in parts else None for name in UTILITY_PARTS}
    return replace(_harmonic(values), higher_is_better=True)


def _harmonic(values: Mapping[str, float | None]) -> Score:
    """The harmonic mean of named numbers, or which of them are missing."""
    missing = [name for name, value in values.items() if value is None]
    if missing:
        return Score(None, why=f"no value for {', '.join(missing)}")
    return Score(harmonic_mean([v for v in values.values() if v is not None]))


MEMORISATION_PARTS = ("extraction_strength", "exact_memorization", "forget_Q_A_PARA_Prob")
"""What Mem is made of, beside the truth ratio as a share."""

PRIVACY_PARTS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
"""The attacks that Priv is made of."""


def memorisation(parts: Mapping[str, Score], truth_share: float | None) -> Score:
    """``mem``: HM(1 - ES, 1 - EM, 1 - Para.Prob, 1 - truth ratio) (OpenUnlearning, 2506.12618, appendix F.1).

    ``truth_share`` is the truth ratio as correct / (correct + wrong), as that code has it since commit d3d7cf9.
    """
    values = {name: parts[name].value for name in MEMORISATION_PARTS} | {"the truth ratio": truth_share}
    return _harmonic({name: None if value is None else 1 - value for name, value in values.items()})


def privacy(attacks: Mapping[str, Score], references: Mapping[str, float]) -> Score:
    """``priv``: HM of how close each attack's AUC is to the retain model's, ``references`` (2506.12618, F.1).

    Closeness is ``1 - |auc - reference| / max(reference, 1 - reference)``: 1 where they are equal, 0 at the AUC
    farthest from it. The paper asks for closeness in [0, 1]; the quotient is ours.
    """
    closeness: dict[str, float] = {}
    for name, reference in references.items():
        value = attacks[name].value
        if value is None:
            return Score(None, why=f"{name} has no value: {attacks[name].why}")
        closeness[name] = 1 - abs(value - reference) / max(reference, 1 - reference)
    return Score(harmonic_mean(list(closeness.values())), extra={"closeness": closeness})


RELATIVE_PARTS = ("model_utility", "forget_fluency")
"""What Utility is made of, each relative to the fine-tuned model's."""

OVERALL_PARTS = ("mem", "priv", "utility")
"""What Agg is made of."""


def relative_utility(parts: Mapping[str, Score], finetuned: Mapping[str, float]) -> Score:
    """``utility``: HM of model utility and forget fluency, each divided by the fine-tuned model's (2506.12618, F.1).

    A ratio may exceed 1, as in the paper's tables. No value where the fine-tuned model's number is 0.
    """
    ratios: dict[str, float] = {}
    for name in RELATIVE_PARTS:
        value = parts[name].value
        if value is None or not finetuned[name] > 0:
            why = f"{name} has no value: {parts[name].why}" if value is None else f"the fine-tuned model's {name} is 0"
            return Score(None, why=why)
        ratios[name] = value / finetuned[name]
    return Score(harmonic_mean(list(ratios.values())), extra={"relative": ratios})


def overall(parts: Mapping[str, Score]) -> Score:
    """``agg``: HM(Mem, Priv, Utility) (2506.12618, F.1). Show the parts beside it."""
    return _harmonic({name: parts[name].value for name in OVERALL_PARTS})
