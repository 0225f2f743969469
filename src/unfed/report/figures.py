"""Plots for a page. Each panel is small enough to be read at a phone's width; a picture puts several side by side.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers and names say the same once more.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unfed.report.contents import KNOWN, Model
from unfed.report.labels import LOG10_P, NOT_OF_KNOWN, label

Draw = Callable[[Axes], None]
WIDTH = 4.6
"""Of a panel, in inches: at a phone's 358 pixels a 9-point letter is still 9 pixels high."""

DPI = 200
LONGEST = 20
"""Letters of a name in a plot."""
LEGIBLE = 14
"""Names in one legend: more of them would fill the plot."""

OF_ROLE = {"base": "#8a8a8a", "finetuned": "#d55e00", "oracle": "#0072b2"}
OTHERS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7a4fa3", "#8c6d1f")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
INK = "#1d2733"
SOFT = "#5c6b7a"
HALO = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
OFFSETS: Sequence[tuple[float, float, Literal["left", "right", "center"]]] = (
    (9, 0, "left"), (-9, 0, "right"), (0, 11, "center"), (0, -11, "center"), (9, 11, "left"), (9, -11, "left"),
    (-9, 11, "right"), (-9, -11, "right"), (9, 20, "left"),
)  # fmt: skip
"""Where a name may stand beside its point, in points, the better places first."""

STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.edgecolor": "#b8c2cc", "axes.labelcolor": INK, "text.color": INK, "xtick.color": SOFT, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def panel(draw: Draw, height: float) -> bytes:
    """One plot as PNG, ``height`` inches high."""
    with mpl.rc_context(STYLE):
        # Long names make the plot narrower, not the picture wider: its letters keep their size on a page.
        figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")
        draw(axes)
        return _png(figure)


def picture(panels: Sequence[bytes]) -> bytes:
    """Panels in rows of two as one PNG, on white."""
    images = [plt.imread(io.BytesIO(p), format="png")[..., :3] for p in panels]
    gap = DPI // 4
    width = max(i.shape[1] for i in images)
    rows = [images[k : k + 2] for k in range(0, len(images), 2)]
    heights = [max(i.shape[0] for i in row) for row in rows]
    sheet = np.ones((sum(heights) + gap * (len(rows) + 1), (width + gap) * min(2, len(images)) + gap, 3))
    y = gap
    for row, height in zip(rows, heights, strict=True):
        for k, image in enumerate(row):
            x = gap + k * (width + gap)
            sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
        y += height + gap
    buffer = io.BytesIO()
    plt.imsave(buffer, sheet, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def short(name: str) -> str:
    """A name that leaves room for the plot."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def colours(models: Sequence[Model]) -> dict[str, str]:
    """A colour for each model: by role, the others in turn."""
    rest = [m.name for m in models if m.role not in OF_ROLE]
    return {m.name: OF_ROLE.get(m.role) or OTHERS[rest.index(m.name) % len(OTHERS)] for m in models}


def bars(models: Sequence[Model], metrics: Sequence[str], title: str) -> tuple[Draw, float]:
    """A group of horizontal bars for each metric, a bar for each model, the oracle's value as a line across."""
    paint = colours(models)
    oracle = next((m for m in models if m.role == "oracle"), None)
    shown = {k: [m for m in models if k in m.summary or not (k in NOT_OF_KNOWN and m.role in KNOWN)] for k in metrics}
    rows = sum(len(of) + 1.3 for of in shown.values())

    def draw(axes: Axes) -> None:
        y = 0.0
        ticks: list[tuple[float, str]] = []
        for metric in metrics:
            axes.text(0, y, label(metric), fontweight="bold", va="center", fontsize=9)
            top = y + 0.4
            for m in shown[metric]:
                y += 1
                ticks.append((y, short(m.name)))
                value = m.summary.get(metric)
                if value is None:
                    axes.text(0.01, y, "not measured", va="center", fontsize=7.5, color=SOFT, bbox=HALO)
                    continue
                axes.barh(y, value, 0.72, color=paint[m.name])
                axes.text(max(value, 0) + 0.012, y, f"{value:.2f}", va="center", fontsize=8, bbox=HALO)
            if oracle is not None and metric in oracle.summary:
                x = oracle.summary[metric]
                axes.plot([x, x], [top, y + 0.5], color=OF_ROLE["oracle"], lw=1.1, ls=(0, (3, 2)), zorder=0.5)
            y += 1.3
        axes.set_yticks([t for t, _ in ticks], [n for _, n in ticks])
        axes.tick_params(axis="y", length=0)
        high = max([1.0, *(m.summary.get(k, 0.0) for m in models for k in metrics)])
        axes.set_xlim(0, high * 1.1)
        axes.set_ylim(y - 0.6, -0.7)
        known = oracle is not None and any(k in oracle.summary for k in metrics)
        axes.set_title(f"{title}  (dashed: the oracle)" if known else title, pad=8)

    return draw, 0.45 + 0.19 * rows


def scatter(models: Sequence[Model]) -> Draw:
    """Forget quality as log10 p against model utility; the oracle, compared with itself, has p = 1."""
    paint = colours(models)
    points: list[tuple[Model, float, float]] = []
    for m in models:
        p = 0.0 if m.role == "oracle" else m.summary.get(LOG10_P)
        if p is not None and "model_utility" in m.summary:
            points.append((m, m.summary["model_utility"], p))

    def draw(axes: Axes) -> None:
        low = min([-1.8, *(y for *_, y in points)])
        span = -low
        axes.axhspan(math.log10(0.05), 0.16 * span, color="#0072b2", alpha=0.07, lw=0)
        axes.axhline(math.log10(0.05), color=SOFT, lw=0.8, ls=(0, (3, 2)))
        xs = [x for _, x, _ in points]
        width = max(max(xs) - min(xs), 0.08)
        axes.set_xlim(min(xs) - 0.25 * width, max(xs) + 0.25 * width)
        axes.set_ylim(low - 0.12 * span, 0.16 * span)
        at = axes.get_xlim()[0] + 0.012 * (axes.get_xlim()[1] - axes.get_xlim()[0])
        axes.text(at, math.log10(0.05), "p = 0.05", va="top", ha="left", fontsize=7.5, color=SOFT)
        for k, (m, x, y) in enumerate(points):
            star = m.role == "oracle"
            axes.plot(x, y, "*" if star else MARKERS[k % len(MARKERS)], ms=15 if star else 8, color=paint[m.name],
                      mec="white", mew=0.8, zorder=3)  # fmt: skip
        _name_points(axes, points)
        axes.set_title("Forget quality against utility", pad=8)
        axes.set_xlabel("model utility  (right: more useful)")
        axes.set_ylabel("log10 p  (up: like the oracle)")

    return draw


def _name_points(axes: Axes, points: Sequence[tuple[Model, float, float]]) -> None:
    """Write each name beside its point, at the first of several places where it lies on no other name or point."""
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    dots = [axes.transData.transform((x, y)) for _, x, y in points]
    half = 5 * figure.dpi / 72
    taken = [Bbox.from_bounds(px - half, py - half, 2 * half, 2 * half) for px, py in dots]
    inside = axes.get_window_extent(renderer)
    for own, (m, x, y) in enumerate(points):
        text = axes.annotate(short(m.name), (x, y), xytext=(0, 0), textcoords="offset points", va="center",
                             fontsize=8.5, bbox={**HALO, "alpha": 0.75})  # fmt: skip
        text.set_in_layout(False)  # a name moves no axes
        for dx, dy, side in OFFSETS:
            text.set_position((dx, dy))
            text.set_horizontalalignment(side)
            box = text.get_window_extent(renderer)
            clear = not any(box.overlaps(t) for k, t in enumerate(taken) if k != own)
            if clear and inside.x0 <= box.x0 and box.x1 <= inside.x1 + half:
                break
        taken.append(text.get_window_extent(renderer))


def losses(models: Sequence[Model], paint: Mapping[str, str]) -> Draw:
    """Mean training loss by round of runs that share their phases; each phase is a band with its name above."""

    def draw(axes: Axes) -> None:
        for k, m in enumerate(models):
            rounds = list(range(1, len(m.losses) + 1))
            axes.plot(rounds, [y for _, y in m.losses], marker=MARKERS[k % len(MARKERS)], ms=4.5, lw=1.6,
                      label=short(m.name), color=paint[m.name])  # fmt: skip
        _bands(axes, [phase for phase, _ in models[0].losses])
        axes.set_xlabel("round")
        axes.set_ylabel("loss (nats a token)")
        _legend(axes)

    return draw


def _legend(axes: Axes) -> None:
    """Names of the lines, while they leave room for the lines."""
    if len(axes.get_legend_handles_labels()[0]) <= LEGIBLE:
        axes.legend(frameon=False, fontsize=8)


def _bands(axes: Axes, phases: Sequence[str]) -> None:
    """Shade every second phase and name each above the plot, a name on the next line up where two would touch."""
    starts = [k for k, p in enumerate(phases) if k == 0 or phases[k - 1] != p]
    ends = [*starts[1:], len(phases)]
    axes.set_xlim(0.5, len(phases) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    letter = 0.0165 * len(phases)  # of a panel's width, in rounds
    reached: list[float] = []  # where the last name of each line ends
    for n, (a, b) in enumerate(zip(starts, ends, strict=True)):
        if n % 2:
            axes.axvspan(a + 0.5, b + 0.5, color="#5c6b7a", alpha=0.09, lw=0)
        if len(starts) > 8:
            continue
        middle, half = (a + b + 1) / 2, len(phases[a]) * letter / 2
        line = next((k for k, end in enumerate(reached) if end < middle - half), len(reached))
        reached[line:] = [middle + half + letter, *reached[line + 1 :]]
        axes.annotate(phases[a], (middle, 1), xycoords=("data", "axes fraction"), xytext=(0, 4 + 11 * line),
                      textcoords="offset points", ha="center", va="bottom", fontsize=8, color=SOFT)  # fmt: skip


def by_round(models: Sequence[Model], metric: str, oracle: float | None, paint: Mapping[str, str]) -> Draw:
    """A score measured during training, by round; the oracle's final value as a dashed line."""

    def draw(axes: Axes) -> None:
        for k, m in enumerate(models):
            found = [(p.round, v) for p in m.points if (v := p.scores.get(metric, p.clients.get(metric))) is not None]
            if found:
                axes.plot(*zip(*found, strict=True), marker=MARKERS[k % len(MARKERS)], ms=4.5, lw=1.6,
                          label=short(m.name), color=paint[m.name])  # fmt: skip
        if oracle is not None:
            axes.axhline(oracle, color=OF_ROLE["oracle"], lw=1.1, ls=(0, (3, 2)), label="oracle, at the end")
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        axes.set_xlabel("round")
        axes.set_title(CURVES.get(metric, label(metric)), pad=8)
        _legend(axes)

    return draw


CURVES: Mapping[str, str] = {
    "forget_Q_A_Prob": "forget probability",
    "retain_Q_A_Prob": "retain probability",
    "client_mean": "clients' own rows: mean probability",
    "client_worst": "clients' own rows: worst client",
}
"""What is drawn of the evaluations during training."""
