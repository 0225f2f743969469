"""What readers are told of a metric, and how its value is written; needs no plots, so every run may import it."""

from __future__ import annotations

import math
from collections.abc import Mapping

LOG10_P = "forget_quality_log10_p"
"""forget_quality as a power of ten: what tables put beside it, and what medians over seeds are taken of."""


def _family(prefix: str, who: str, what: str) -> dict[str, tuple[str, str]]:
    """The metrics of one split that differ in the column of answers they look at."""
    forget = prefix == "forget"
    aim = "Lower; the oracle's is the aim." if forget else "Higher."
    wrong = "The oracle's is the aim." if forget else "Lower beside a high probability of the right answer."
    return {
        f"{prefix}_Q_A_Prob": (f"{who} probability", f"How sure the model is of the answers {what}. {aim}"),
        f"{prefix}_Q_A_PARA_Prob": (
            f"{who} probability, paraphrased",
            f"The same for those answers in other words: knowledge, not wording. {aim}",
        ),
        f"{prefix}_Q_A_PERT_Prob": (
            f"{who} probability, wrong answers",
            f"How sure it is of wrong answers to those questions. {wrong}",
        ),
        f"{prefix}_Q_A_ROUGE": (f"{who} ROUGE", f"How much of the answers {what} it writes out itself. {aim}"),
        f"{prefix}_Q_A_PARA_ROUGE": (
            f"{who} ROUGE, paraphrased",
            f"How much of those answers in other words it writes out. {aim}",
        ),
        f"{prefix}_Q_A_PERT_ROUGE": (
            f"{who} ROUGE, wrong answers",
            f"How much of wrong answers to those questions it writes out. {wrong}",
        ),
    }


def _attack(name: str, how: str) -> tuple[str, str]:
    return (
        f"membership attack: {name}",
        (
            f"An attacker guesses by {how} whether the forget rows were trained on. 1: always right, 0.5: by chance. "
            "The oracle's is the aim."
        ),
    )


METRICS: Mapping[str, tuple[str, str]] = {
    **_family("forget", "forget", "to forget"),
    "forget_truth_ratio": (
        "forget truth ratio",
        (
            "How even it is between the truth and wrong answers about what it should forget: 1 is no preference. "
            "The oracle's is the aim."
        ),
    ),
    "forget_quality": (
        "forget quality (p)",
        "Can its truth ratios be told from the oracle's? p above 0.05: a test cannot tell them apart.",
    ),
    LOG10_P: ("forget quality (log10 p)", "The same p as a power of ten: above -1.3 a test cannot tell them apart."),
    "extraction_strength": (
        "extraction strength",
        "How early in an answer the model can finish it word for word. Lower; the oracle's is the aim.",
    ),
    "exact_memorization": (
        "exact memorization",
        "Share of the answers' tokens that it would write exactly so. Lower; the oracle's is the aim.",
    ),
    **_family("retain", "retain", "it should keep"),
    "retain_extraction_strength": ("retain extraction strength", "How early it can finish an answer to keep. Higher."),
    "retain_Truth_Ratio": ("retain truth ratio", "How much it prefers the truth on the retain rows. Higher."),
    **_family("ra", "real authors", "about real authors, whom nobody asked to forget"),
    "ra_Q_A_Prob_normalised": (
        "real authors",
        "Probability of the truth among options, authors nobody asked to forget. Higher.",
    ),
    "ra_Truth_Ratio": ("real authors truth ratio", "How much it prefers the truth about real authors. Higher."),
    **_family("wf", "world facts", "to common knowledge"),
    "wf_Q_A_Prob_normalised": ("world facts", "Probability of the truth among options, common knowledge. Higher."),
    "wf_Truth_Ratio": ("world facts truth ratio", "How much it prefers the truth on common knowledge. Higher."),
    "model_utility": ("model utility", "Harmonic mean of nine retain, author and fact metrics. Higher."),
    "forget_fluency": (
        "forget fluency",
        "Whether what it writes when asked for forgotten things still reads like language. Higher.",
    ),
    **dict.fromkeys(
        ("forget_Q_A_gibberish", "forget_gibberish"),
        ("forget, clean text", "How sure a classifier is that what it writes then is no gibberish. Higher."),
    ),
    "mia_loss": _attack("loss", "the loss"),
    "mia_zlib": _attack("zlib", "the loss beside how well the text compresses"),
    "mia_min_k": _attack("min-k", "the least likely tokens"),
    "mia_min_k_plus_plus": _attack("min-k++", "the least likely tokens, beside the other tokens there"),
    "mia_reference": _attack("reference", "the loss beside another model's"),
    "mia_gradnorm": _attack("gradient norm", "how hard a training step would pull"),
    "privleak": (
        "privleak (%)",
        (
            "How far a membership attack is from its success on the oracle (without one: from guessing). 0 is the aim: "
            "below it the forget rows still look trained on, above it they stand out as removed."
        ),
    ),
    "mem": (
        "Mem",
        (
            "One number for how little of the forget rows is left in memory, by four metrics. Higher; the oracle's is "
            "the aim."
        ),
    ),
    "priv": ("Priv", "How near four membership attacks are to their success on the oracle. 1 is the oracle's."),
    "utility": (
        "Utility",
        "Model utility and forget fluency, each as a share of the fine-tuned model's. 1: nothing was lost.",
    ),
    "agg": ("Agg", "Harmonic mean of Mem, Priv and Utility; read it with its three parts."),
    "forget_verbmem_ROUGE": (
        "forget, verbatim (ROUGE)",
        "How much of a text to forget it continues word for word. Lower; the oracle's is the aim.",
    ),
    "forget_knowmem_ROUGE": (
        "forget, knowledge (ROUGE)",
        "How much it can answer about the texts to forget. Lower; the oracle's is the aim.",
    ),
    "retain_knowmem_ROUGE": ("retain, knowledge (ROUGE)", "How much it can answer about texts to keep. Higher."),
}
HEADLINE = (
    "forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_truth_ratio", "forget_quality", "extraction_strength",
    "forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "privleak", "retain_Q_A_Prob", "retain_Q_A_ROUGE",
    "retain_knowmem_ROUGE", "ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised", "model_utility", "forget_fluency",
    "mem", "priv", "utility",
)  # fmt: skip
"""The metrics of the short tables, in their order."""

FORGETTING = ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_verbmem_ROUGE", "forget_knowmem_ROUGE")
KEEPING = ("retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_knowmem_ROUGE", "model_utility")
SHARES = ("mem", "priv", "utility")
"""What the picture's bars show."""

AGAINST_ORACLE: Mapping[str, str] = {"forget_quality": "> 0.05", LOG10_P: "> -1.3", "privleak": "0", "priv": "1"}
"""Metrics that are a comparison with the oracle already: what a perfect result would be."""

NOT_OF_KNOWN = frozenset({"priv", "utility", "agg"})
"""Metrics that compare with the oracle or the fine-tuned model, and are seldom asked of these themselves."""

ROLES: Mapping[str, str] = {
    "base": "the model before any fine-tuning: it never saw the data.",
    "finetuned": "after fine-tuning on everything: it knows what is to be forgotten.",
    "oracle": "fine-tuned in the same way without the forget rows: how a perfect deletion would behave.",
}


def label(metric: str) -> str:
    """A metric's name for readers; an unknown one keeps its own."""
    return METRICS[metric][0] if metric in METRICS else metric


def number(metric: str, value: float | None) -> str:
    """A metric's value for reading: p-values also as a power of ten."""
    if value is None:
        return "–"
    if metric == "forget_quality":
        return f"{value:.3g}" if value >= 0.001 else f"1e{math.log10(value):.1f}" if value > 0 else "0"
    if metric == "privleak":
        return f"{value:.1f}"
    return f"{value:.2f}" if metric == LOG10_P else f"{value:.3f}"


def target(metric: str, oracle: Mapping[str, float] | None) -> str:
    """What to aim at: the oracle's value, or that of a comparison with it (Utility: with the fine-tuned model)."""
    fixed = AGAINST_ORACLE.get(metric)
    if metric == "utility" and metric not in (oracle or {}):
        return "1"
    return fixed if fixed is not None else number(metric, oracle.get(metric) if oracle else None)


def headline(present: set[str]) -> list[str]:
    """The headline metrics among ``present``, in order."""
    return [m for m in HEADLINE if m in present]


def others(present: set[str]) -> list[str]:
    """The remaining metrics, known ones first and in order. ``agg`` is never shown without its three parts."""
    rest = present - set(HEADLINE)
    if not set(SHARES) <= present:
        rest -= {"agg"}
    return [m for m in METRICS if m in rest] + sorted(rest - set(METRICS))
