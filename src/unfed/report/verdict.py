"""One plain verdict: did a model forget, what did it keep, what did it cost?"""

from __future__ import annotations

from collections.abc import Mapping

from unfed.report.contents import Cost, Report
from unfed.report.labels import number

NOTHING_TO_FORGET = 0.05
"""Fine-tuned and oracle values closer than this say nothing about forgetting."""

ALPHA = 0.05
"""Below this p-value, forget quality says that the model can be told from the oracle."""

MEASURES = (
    ("forget_Q_A_Prob", "retain_Q_A_Prob", "the probability of the answers to forget", "retain probability"),
    ("forget_knowmem_ROUGE", "retain_knowmem_ROUGE", "ROUGE on the knowledge to forget", "retain ROUGE"),
)
"""(what should go, what should stay, the first in words, the second): the first pair that was measured counts."""

Summaries = Mapping[str, Mapping[str, float]]


def verdict(summaries: Summaries, model: str) -> str:
    """Did ``model`` forget, and what did it keep? ``summaries`` has ``finetuned`` and ``oracle``, if they are known."""
    now_all = summaries.get(model, {})
    measure = next((m for m in MEASURES if m[0] in now_all and m[1] in now_all), None)
    if measure is None:
        return f"{model}: not enough was measured for a verdict."
    forget, retain, words, kept_words = measure
    now = now_all[forget]
    before, aim = (summaries.get(role, {}).get(forget) for role in ("finetuned", "oracle"))
    if before is None:
        there = "" if aim is None else f"; the oracle, which never saw them, has {aim:.2f}"
        return f"{model}: {words} is {now:.2f}{there}. Without the fine-tuned model's value nobody can say what fell."
    if aim is None:
        what = f": {words} went from {before:.2f} to {now:.2f}; without an oracle nobody can say whether that is enough"
    else:
        what = _what(before, aim, now, words)
    start = summaries["finetuned"].get(retain)
    kept = "" if start is None else f" It kept {now_all[retain] / max(start, 1e-9):.0%} of the {kept_words}."
    return f"{model}{what}.{kept}"


def _what(before: float, aim: float, now: float, words: str) -> str:
    if before - aim < NOTHING_TO_FORGET:
        return (
            f": there was next to nothing to forget: for the fine-tuned model {words} is {before:.2f}, for the oracle "
            f"{aim:.2f}"
        )
    gone = (before - now) / (before - aim)
    fell = f"{words} fell from {before:.2f} to {now:.2f}"
    if gone >= 1.05:
        return f" forgot more than it had to: {fell}, below the oracle's {aim:.2f}"
    if gone >= 0.8:
        return f" forgot: {fell}; the oracle, which never saw them, has {aim:.2f}"
    if gone >= 0.3:
        return f" forgot a part: {fell}; the oracle has {aim:.2f}"
    return f" hardly forgot: {words} was {before:.2f} before and is {now:.2f} now; the oracle has {aim:.2f}"


def what_the_test_says(summary: Mapping[str, float]) -> str:
    """What the Kolmogorov-Smirnov test adds; empty where there was none."""
    p = summary.get("forget_quality")
    if p is None:
        return ""
    shown = number("forget_quality", p)
    if p > ALPHA:
        return f"A test cannot tell its preferences on the forget set from the oracle's (p = {shown})."
    return f"A test can still tell its preferences on the forget set from the oracle's (p = {shown})."


def cost_in_words(report: Report, name: str) -> str:
    """What the run took, beside training the oracle, which is what retraining would take; empty without rounds."""
    model = next(m for m in report.models if m.name == name)
    if model.cost is None:
        return ""
    words = f"It took {_taken(model.cost)}"
    oracle = report.of_role("oracle")
    if oracle is None or oracle.cost is None:
        return f"{words}."
    return f"{words}; training the oracle from scratch took {_taken(oracle.cost)}."


def _taken(cost: Cost) -> str:
    rounds = f"{cost.rounds} round{'s' if cost.rounds != 1 else ''}"
    sent = f", {cost.megabytes:.3g} MB sent" if cost.megabytes > 0 else ""
    return f"{cost.seconds:.3g} s ({rounds}{sent})" if cost.seconds < 1000 else f"{cost.seconds:.0f} s ({rounds}{sent})"
