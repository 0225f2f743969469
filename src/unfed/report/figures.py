"""Plots of a study, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#8c8c8c", "#d1495b", "#00798c", "#30638e", "#edae49", "#7b5ea7", "#3c896d")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def bars(summaries: Mapping[str, Mapping[str, float]], metrics: Mapping[str, str]) -> bytes:
    """One group of bars for each metric (name -> label), one bar for each model."""
    shown = {m: label for m, label in metrics.items() if any(m in s for s in summaries.values())}
    figure, axes = plt.subplots(figsize=(9, 3.6))
    width = 0.8 / max(1, len(summaries))
    for k, (model, summary) in enumerate(summaries.items()):
        values = [summary.get(m, np.nan) for m in shown]
        places = np.arange(len(shown)) + (k - (len(summaries) - 1) / 2) * width
        drawn = axes.bar(places, values, width, label=model, color=COLOURS[k % len(COLOURS)])
        axes.bar_label(drawn, fmt="%.2f", fontsize=7, padding=1)
    axes.set_xticks(np.arange(len(shown)), list(shown.values()))
    axes.set_ylim(0, 1.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=min(4, len(summaries)), frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.18))
    return _png(figure)


def curves(losses: Mapping[str, Sequence[tuple[str, float]]]) -> bytes:
    """Mean training loss by round for each run; ``losses``: run -> (phase, loss) of each round."""
    figure, axes = plt.subplots(figsize=(9, 3.0))
    for k, (run, points) in enumerate(losses.items()):
        rounds = np.arange(1, len(points) + 1)
        axes.plot(rounds, [loss for _, loss in points], "o-", label=run, color=COLOURS[(k + 1) % len(COLOURS)])
        for r, (phase, loss) in enumerate(points):
            if r == 0 or points[r - 1][0] != phase:
                axes.annotate(phase, (r + 1.0, loss), fontsize=7, xytext=(3, 4), textcoords="offset points")
    axes.set_xlabel("round")
    axes.set_ylabel("loss of the clients (nats a token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _png(figure)
