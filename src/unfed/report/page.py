"""One self-contained HTML page on a study: which model forgot what, at what cost."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader

from unfed.base.artifacts import atomic_path
from unfed.report import figures
from unfed.report.labels import METRICS, PLOTTED, number


@dataclass(frozen=True)
class Answer:
    """What each model says to one question."""

    split: str
    question: str
    truth: str
    said: Mapping[str, str]


@dataclass(frozen=True)
class Cost:
    """What a run took."""

    run: str
    seconds: float
    rounds: int
    megabytes: float
    aggregation_error: float | None


@dataclass(frozen=True)
class StudyReport:
    """All that the page shows. ``summaries``: model -> metric -> number; ``losses``: run -> (phase, loss) a round."""

    title: str
    command: str
    summaries: Mapping[str, Mapping[str, float]]
    losses: Mapping[str, Sequence[tuple[str, float]]]
    answers: Sequence[Answer]
    costs: Sequence[Cost]
    machine: str


NOTHING_TO_FORGET = 0.05
"""Fine-tuned and oracle probabilities closer than this say nothing about forgetting."""


def verdict(summaries: Mapping[str, Mapping[str, float]], model: str) -> str:
    """One plain sentence: did ``model`` forget, and what did it keep?"""
    need = ("forget_Q_A_Prob", "retain_Q_A_Prob")
    if any(m not in summaries or any(k not in summaries[m] for k in need) for m in ("finetuned", "oracle", model)):
        return f"{model}: not enough was measured for a verdict."
    before, aim, now = (summaries[m]["forget_Q_A_Prob"] for m in ("finetuned", "oracle", model))
    kept = summaries[model]["retain_Q_A_Prob"] / max(summaries["finetuned"]["retain_Q_A_Prob"], 1e-9)
    gone = (before - now) / max(before - aim, 1e-9)
    if before - aim < NOTHING_TO_FORGET:
        return (
            f"{model}: there was next to nothing to forget: the fine-tuned model gives the answers to forget a "
            f"probability of {before:.2f}, the oracle {aim:.2f}. It kept {kept:.0%} of the retain probability."
        )
    fell = f"the probability of the answers to forget fell from {before:.2f} to {now:.2f}"
    if gone >= 1.05:
        what = f"forgot more than it had to: {fell}, below the oracle's {aim:.2f}, which can be noticed too"
    elif gone >= 0.8:
        what = f"forgot: {fell}; the oracle, which never saw them, has {aim:.2f}"
    elif gone >= 0.3:
        what = f"forgot a part: {fell}; the oracle has {aim:.2f}"
    else:
        what = f"hardly forgot: {before:.2f} before, {now:.2f} now is its probability of the answers to forget"
    return f"{model} {what}. It kept {kept:.0%} of the retain probability."


def write_report(path: Path, report: StudyReport) -> None:
    """Write the page, atomically. It loads nothing from elsewhere."""
    labels = {m: METRICS[m][0] for m in PLOTTED}
    images = {
        "bars": figures.bars(report.summaries, labels),
        "curves": figures.curves(report.losses) if report.losses else b"",
    }
    # Only a package of ours is read, and values are escaped.
    environment = Environment(loader=PackageLoader("unfed.report", "."), autoescape=True)
    shown = {m: v for m, v in METRICS.items() if any(m in s for s in report.summaries.values())}
    unlearned = [m for m in report.summaries if m not in {"base", "finetuned", "oracle"}]
    html = environment.get_template("page.html.j2").render(
        report=report,
        metrics=shown,
        number=number,
        verdicts=[verdict(report.summaries, m) for m in unlearned],
        images={name: base64.b64encode(data).decode() for name, data in images.items() if data},
    )
    with atomic_path(path) as part:
        part.write_text(html, encoding="utf-8")
    with atomic_path(path.with_suffix(".png")) as part:
        part.write_bytes(images["bars"])
