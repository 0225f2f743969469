"""One self-contained HTML page on several runs: which model forgot what, at what cost."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from unfed.base.artifacts import atomic_path
from unfed.data.ownership import Ownership
from unfed.report import figures
from unfed.report.contents import Model, Report
from unfed.report.labels import (
    FORGETTING,
    KEEPING,
    LOG10_P,
    METRICS,
    ROLES,
    SHARES,
    headline,
    label,
    number,
    others,
    target,
)
from unfed.report.ownership import owns
from unfed.report.verdict import cost_in_words, verdict, what_the_test_says


@dataclass(frozen=True)
class Panel:
    """A plot: its PNG, a name for readers who do not see it, and a sentence beneath it."""

    png: bytes
    alt: str
    caption: str

    @property
    def data(self) -> str:
        """The PNG in base64."""
        return base64.b64encode(self.png).decode()


def write_page(path: Path, report: Report) -> None:
    """Write the page and, beside it with the suffix .png, its picture, each atomically. It loads nothing."""
    panels = picture_panels(report)
    # Only a template of ours is read, and values are escaped.
    environment = Environment(loader=PackageLoader("unfed.report", "."), autoescape=True, trim_blocks=True)
    html = environment.get_template("page.html.j2").render(
        report=report,
        verdicts=[_Verdict.of(report, m) for m in report.unlearned],
        roles=[(m.name, ROLES[m.role]) for m in report.models if m.role in ROLES],
        panels=panels,
        tables=_tables(report),
        words=METRICS,
        label=label,
        number=number,
        target=lambda metric: target(metric, oracle.summary if (oracle := report.of_role("oracle")) else None),
        columns=[m for m in report.models if m.role != "oracle" and m.summary],
        costs=[m for m in report.models if m.cost is not None],
        private=[m for m in report.models if m.privacy],
        curves=curve_panels(report),
        owners=owner_panels(report),
        said_role={m.name: m.role for m in report.models},
    )
    with atomic_path(path) as part:
        part.write_text(html, encoding="utf-8")
    if panels:
        image = figures.picture([p.png for p in panels])
        with atomic_path(path.with_suffix(".png")) as part:
            part.write_bytes(image)


@dataclass(frozen=True)
class _Verdict:
    """The verdict on a model, and what supports it."""

    main: str
    more: str

    @staticmethod
    def of(report: Report, model: Model) -> _Verdict:
        known = {m.role: m.summary for m in report.models if m.role in {"finetuned", "oracle"}}
        main = verdict({**known, model.name: model.summary}, model.name)
        more = [what_the_test_says(model.summary), _utility(report, model), cost_in_words(report, model.name)]
        return _Verdict(main, " ".join(m for m in more if m))


def _utility(report: Report, model: Model) -> str:
    before = report.of_role("finetuned")
    if before is None:
        return ""
    told = {
        "model_utility": "Model utility",
        "forget_fluency": "Fluency of what it answers there",
    }
    both = before.summary.keys() & model.summary.keys()
    return " ".join(
        f"{words} went from {before.summary[k]:.2f} to {model.summary[k]:.2f}."
        for k, words in told.items()
        if k in both
    )


def picture_panels(report: Report) -> list[Panel]:
    """What a reader should see first: forgetting, keeping, both at once, and the three summary scores."""
    models = [m for m in report.models if m.summary]
    found: list[Panel] = []
    aim = " The oracle is the aim." if report.of_role("oracle") else ""
    for metrics, title, caption in (
        (FORGETTING, "What should go", "Shorter is more forgotten." + aim),
        (KEEPING, "What should stay", "Longer is better kept." + aim),
        (SHARES, "Summary scores", "Longer is better in all of them. " + _meanings(report)),
    ):
        shown = [k for k in metrics if k in report.metrics]
        if shown:
            measured = [m for m in models if m.summary.keys() & set(shown)]
            draw, height = figures.bars(measured, shown, title)
            found.append(Panel(figures.panel(draw, height), f"Bars: {title.lower()}", caption))
    placed = [m for m in models if "model_utility" in m.summary and LOG10_P in m.summary]
    if placed and report.of_role("oracle") is not None:
        caption = (
            "The star is the oracle: the nearer to it the better. In the blue band a test cannot tell a model's "
            "preferences on the forget set from the oracle's."
        )
        draw = figures.scatter(models)
        found.insert(2, Panel(figures.panel(draw, 3.2), "Forget quality against model utility", caption))
    return found


def _meanings(report: Report) -> str:
    told = {
        "mem": "Mem: little is left in memory; more than the oracle's is not needed.",
        "priv": "Priv: membership attacks see what they see in the oracle.",
        "utility": "Utility: share of the fine-tuned model's use that is left.",
    }
    return " ".join(text for metric, text in told.items() if metric in report.metrics)


def curve_panels(report: Report) -> list[Panel]:
    """Training losses, one plot for the runs that share their phases, and scores measured during training."""
    paint = figures.colours(report.models)
    found: list[Panel] = []
    same: dict[tuple[str, ...], list[Model]] = {}
    for m in report.models:
        if len(m.losses) > 1:
            same.setdefault(tuple(phase for phase, _ in m.losses), []).append(m)
    for models in same.values():
        names = ", ".join(m.name for m in models)
        of_method = any(m.role == "unlearned" for m in models)
        caption = f"Training loss: {names}." + (
            " While it unlearns, the loss is the method's own: compare it with itself only." if of_method else ""
        )
        png = figures.panel(figures.losses(models, paint), 2.5)
        found.append(Panel(png, f"Training loss by round: {names}", caption))
    watched = [m for m in report.models if m.points]
    oracle = report.of_role("oracle")
    for metric, title in figures.CURVES.items():
        if any(metric in p.scores or metric in p.clients for m in watched for p in m.points):
            aim = oracle.summary.get(metric) if oracle else None
            png = figures.panel(figures.by_round(watched, metric, aim, paint), 2.5)
            found.append(Panel(png, f"{title} by round", f"Measured during training: {title} after each round."))
    return found


def owner_panels(report: Report) -> list[Panel]:
    """Who owned which rows: a picture for each partition that there is among the runs. Oracles have that of the others
    without the rows to forget, and none of their own."""
    same: dict[str, tuple[Ownership, list[str]]] = {}
    for m in report.models:
        if m.ownership is not None and m.role != "oracle":
            # The order of the groups is that in which a run met them, and says nothing.
            columns = sorted(m.ownership.table.T.tolist())
            same.setdefault(repr((list(m.ownership.counts), columns)), (m.ownership, []))[1].append(m.name)
    found: list[Panel] = []
    for owned, names in same.values():
        draw, height = owns(owned)
        words = f"{', '.join(names)}; {owned.heterogeneity.line()}."
        found.append(Panel(figures.panel(draw, height), f"Rows by client and {owned.by}: {', '.join(names)}", words))
    return found


def _tables(report: Report) -> Sequence[Mapping[str, Any]]:
    """The headline metrics, open; all others, folded."""
    present = report.metrics - {LOG10_P}
    rest = others(present)
    first = {"title": "Scores and their targets", "open": True, "metrics": headline(present)}
    return [first, *([{"title": f"All other metrics ({len(rest)})", "open": False, "metrics": rest}] if rest else [])]
