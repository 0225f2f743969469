"""What readers are told of a metric, and how its value is written; needs no plots, so every run may import it."""

from __future__ import annotations

import math
from collections.abc import Mapping

METRICS: Mapping[str, tuple[str, str]] = {
    "forget_Q_A_Prob": (
        "forget probability",
        "How sure the model is of the answers to forget. Lower; the oracle's is the aim.",
    ),
    "forget_Q_A_ROUGE": ("forget ROUGE", "How much of those answers it writes out. Lower; the oracle's is the aim."),
    "forget_truth_ratio": (
        "forget truth ratio",
        "Whether it still prefers the truth to wrong answers. The oracle's is the aim.",
    ),
    "forget_quality": (
        "forget quality (p)",
        "p-value: can its truth ratios be told from the oracle's? Above 0.05: no.",
    ),
    "retain_Q_A_Prob": ("retain probability", "How sure it is of answers it should keep. Higher."),
    "retain_Q_A_ROUGE": ("retain ROUGE", "How much of those answers it writes out. Higher."),
    "ra_Q_A_Prob_normalised": (
        "real authors",
        "Probability of the truth among options, authors nobody asked to forget. Higher.",
    ),
    "wf_Q_A_Prob_normalised": ("world facts", "The same for common knowledge. Higher."),
    "model_utility": ("model utility", "Harmonic mean of nine retain, author and fact metrics. Higher."),
}
PLOTTED = ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "retain_Q_A_Prob", "retain_Q_A_ROUGE", "model_utility")


def number(metric: str, value: float | None) -> str:
    """A metric's value for reading: p-values also as a power of ten."""
    if value is None:
        return "–"
    if metric == "forget_quality":
        return f"{value:.3g}" if value >= 0.001 else f"1e{math.log10(value):.1f}" if value > 0 else "0"
    return f"{value:.3f}"
