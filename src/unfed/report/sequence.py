"""One page on a sequence of requests to forget: what the model knew of each after each, and what it still can."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader
from matplotlib.axes import Axes

from unfed.base.artifacts import atomic_path
from unfed.report.figures import MARKERS, OF_ROLE, OTHERS, Draw, panel, picture, short

START = "start"


@dataclass(frozen=True)
class Scores:
    """Of the answers to some rows: mean probability, and mean ROUGE-L recall of what the model says instead."""

    prob: float
    rouge: float | None = None

    def text(self, *, rouge: bool) -> str:
        """As a table shows it: the probability, and behind it ROUGE where that is wanted and known."""
        return f"{self.prob:.3f}" + (f" ({self.rouge:.2f})" if rouge and self.rouge is not None else "")


@dataclass(frozen=True)
class Look:
    """A model of the sequence: the one to start from, or the one after the request ``after``.

    ``forget``: the rows of each request by its name, also of those that come later. ``kept``: rows that no request
    names. ``utility``: the suite's model utility.
    """

    after: str
    forget: Mapping[str, Scores]
    kept: Scores
    utility: float | None = None


@dataclass(frozen=True)
class Asked:
    """A request: ``what`` is to be forgotten, ``rows`` of which clients, and how it was done."""

    name: str
    what: str
    how: str
    rows: int
    clients: Mapping[str, int] = field(default_factory=dict)
    run: str = ""


@dataclass(frozen=True)
class SequenceReport:
    """What the page shows. ``looks`` are the start and one after each request that is done."""

    title: str
    command: str
    requests: Sequence[Asked]
    looks: Sequence[Look]
    notes: Sequence[str] = ()

    def done(self, request: str, look: Look) -> bool:
        """Whether a model had been asked to forget a request's rows."""
        order = [START, *(r.name for r in self.requests)]
        return order.index(look.after) >= order.index(request)

    def sentences(self) -> list[str]:
        """Of each request: its probability before, after it, and at the end; then what is kept."""
        start, last = self.looks[0], self.looks[-1]
        found = []
        for request in self.requests:
            own = next((look for look in self.looks if look.after == request.name), None)
            if own is None:
                continue
            before, after = start.forget[request.name].prob, own.forget[request.name].prob
            later = "" if own is last else f", and {last.forget[request.name].prob:.3f} after {last.after}"
            found.append(f"{request.name}: {before:.3f} at the start, {after:.3f} after its request{later}.")
        kept = f"What is kept: {start.kept.prob:.3f} at the start, {last.kept.prob:.3f} after {last.after}"
        if start.utility is not None and last.utility is not None:
            kept += f"; model utility {start.utility:.3f} and {last.utility:.3f}"
        return [*found, f"{kept}."]


def table(report: SequenceReport, *, rouge: bool = True) -> list[list[str]]:
    """Head and rows: the model, each request's rows (in brackets while nobody has asked yet), what is kept, utility."""

    def shown(look: Look, name: str) -> str:
        text = look.forget[name].text(rouge=rouge)
        return text if report.done(name, look) else f"[{text}]"

    names = [r.name for r in report.requests]
    utility = any(look.utility is not None for look in report.looks)
    found = [["after", *names, "kept", *(["utility"] if utility else [])]]
    for look in report.looks:
        cells = [shown(look, n) for n in names]
        own = [f"{look.utility:.3f}" if look.utility is not None else "-"] if utility else []
        found.append([look.after, *cells, look.kept.text(rouge=rouge), *own])
    return found


def write_sequence_page(path: Path, report: SequenceReport) -> None:
    """Write the page and, beside it with the suffix .png, its plot, each atomically. It loads nothing."""
    plot = panel(_curves(report), 3.1)
    # Only a template of ours is read, and values are escaped.
    environment = Environment(loader=PackageLoader("unfed.report", "."), autoescape=True, trim_blocks=True)
    html = environment.get_template("sequence.html.j2").render(
        report=report, table=table(report), plot=base64.b64encode(plot).decode()
    )
    with atomic_path(path) as part:
        part.write_text(html, encoding="utf-8")
    with atomic_path(path.with_suffix(".png")) as part:
        part.write_bytes(picture([plot]))


def _curves(report: SequenceReport) -> Draw:
    """Probability over the requests: a line for each request's rows, thin until it is asked; what is kept, dashed."""

    def draw(axes: Axes) -> None:
        places = range(len(report.looks))
        for k, request in enumerate(report.requests):
            values = [look.forget[request.name].prob for look in report.looks]
            colour, mark = OTHERS[k % len(OTHERS)], MARKERS[k % len(MARKERS)]
            asked = k + 1  # its place among the looks
            axes.plot(places, values, color=colour, lw=0.8, marker=mark, ms=3)
            axes.plot(
                list(places)[asked:], values[asked:], color=colour, lw=2, marker=mark, ms=6, label=short(request.name)
            )
        kept = [look.kept.prob for look in report.looks]
        axes.plot(places, kept, color=OF_ROLE["oracle"], lw=1.5, ls=(0, (3, 2)), label="kept")
        axes.set_xticks(list(places), [short(look.after) for look in report.looks])
        axes.set_xlabel("after")
        axes.set_ylim(-0.03, 1.03)
        axes.set_title("Probability of the answers")
        axes.legend(frameon=False, fontsize=8, loc="best")

    return draw
