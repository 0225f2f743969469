"""A picture of who owns what: clients by groups, darker where a client owns more rows of a group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from unfed.data.ownership import Ownership
from unfed.report.figures import INK, LEGIBLE, SOFT, Draw, short

WHITE_TO_BLUE = LinearSegmentedColormap.from_list("rows", ["#ffffff", "#0072b2"])
NAMED_CLIENTS = 40
"""Clients that have a line of their own, with name and size; of more of them every few are numbered."""
TALLEST = 6.0
"""Of a plot, in inches."""


def owns(found: Ownership) -> tuple[Draw, float]:
    """Rows by client (downwards) and group (to the right), and the plot's height in inches.

    Groups are sorted by the client that owns most of their rows, so that clients with groups of their own show as
    blocks along the diagonal. Up to 14 groups are named, up to 40 clients with their sizes.
    """
    order = by_owner(found.table)
    table = found.table[:, order]
    clients, groups = table.shape
    names = [f"{short(c)} ({n})" for c, n in found.sizes.items()]

    def draw(axes: Axes) -> None:
        axes.imshow(table, cmap=WHITE_TO_BLUE, vmin=0, vmax=max(1, table.max()), aspect="auto", interpolation="nearest")
        if clients <= NAMED_CLIENTS:
            axes.set_yticks(range(clients), names)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_ylabel("client")
        if groups <= LEGIBLE:
            axes.set_xticks(
                range(groups), [short(found.groups[g]) for g in order], rotation=45, ha="right", fontsize=7.5
            )
            axes.tick_params(axis="x", length=0)
        else:
            axes.set_xticks([])
            axes.set_xlabel(f"{groups} {found.by}s, by the client that owns most of their rows")
        if clients <= LEGIBLE and groups <= LEGIBLE:
            _numbers(axes, table)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(True)
        axes.set_title(f"Rows by client and {found.by}", pad=8)

    named = 0.9 if groups <= LEGIBLE else 0.3
    return draw, min(TALLEST, 0.5 + named + 0.22 * max(3, clients))


def by_owner(table: np.ndarray) -> Sequence[int]:
    """The groups of a ``(clients, groups)`` table, sorted by the number of the client that owns most of their rows
    (the first of several), those that it owns more of first."""
    owner, most = table.argmax(axis=0), table.max(axis=0)
    return np.lexsort((-most, owner)).tolist()


def _numbers(axes: Axes, table: np.ndarray) -> None:
    for (client, group), n in np.ndenumerate(table):
        if n:
            dark = n > 0.6 * table.max()
            axes.text(group, client, str(n), ha="center", va="center", fontsize=7, color="white" if dark else INK)
        else:
            axes.text(group, client, "·", ha="center", va="center", fontsize=7, color=SOFT)
