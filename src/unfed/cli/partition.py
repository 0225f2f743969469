"""``unfed partition``: who owns what, of a run that was made or of one that these overrides describe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unfed.base.errors import UnfedError
from unfed.cli.launch import guarded

if TYPE_CHECKING:
    from unfed.data.ownership import Ownership

PRIMARY = "train-lora.yaml"
LISTED = 50
"""Clients in the table; the picture and ``ownership.json`` have all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each client (rows, rows to forget, groups, distance from the whole) and draw it as PNG."""
    parser = argparse.ArgumentParser(
        prog="unfed partition",
        usage="unfed partition [--output FILE.png] RUN | [--config-name=NAME] <the overrides of a run>",
        description="Show who owns what: a table, and a picture of the rows by client and person (or topic). RUN is "
        "the directory of a run; with overrides, those of unfed train or unlearn, the rows are dealt as that run would "
        "deal them, and nothing is trained.",
        epilog=f"The overrides go with --config-name={PRIMARY} where none is named. Example: unfed partition "
        "experiment=finetune/tofu/default partition=topic",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/ownership.png, or ./ownership.png")
    given, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    return guarded(lambda: _show(rest, given.output))


def _show(rest: Sequence[str], output: Path | None) -> int:
    from unfed.app.ownership import of_run, of_settings
    from unfed.base.artifacts import atomic_path
    from unfed.config.compat import resolve
    from unfed.report.figures import panel
    from unfed.report.ownership import owns

    if output is not None and output.suffix != ".png":
        raise UnfedError(f"--output {output}: a picture is written as PNG; give a name that ends in .png")
    places = [r for r in rest if Path(r).is_dir()]
    if places and len(rest) != 1:
        raise UnfedError(f"{places[0]}: give one RUN alone, or overrides (key=value) alone")
    if places or (len(rest) == 1 and "=" not in rest[0]):
        place = Path(rest[0])
        found, where = of_run(place), f"as in {place}"
    else:
        place = Path()
        named = [] if any(o.lstrip("+").startswith("task_name=") for o in rest) else ["task_name=partition"]
        found, where = of_settings(resolve([*rest, *named], PRIMARY))
    picture = output or place / "ownership.png"
    print(f"partition: {where}")
    _print_table(found)
    print(found.heterogeneity.line())
    draw, height = owns(found)
    with atomic_path(picture) as part:
        part.write_bytes(panel(draw, height))
    print(f"picture: {picture}")
    return 0


def _print_table(found: Ownership) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_edge=False)
    table.add_column("client")
    for column in ("rows", "to forget", f"{found.by}s", "distance"):
        table.add_column(column, justify="right")
    distances = found.distances
    for client, counts in list(found.counts.items())[:LISTED]:
        groups = sum(n > 0 for n in counts)
        distance = f"{distances[client]:.3f}" if client in distances else "–"
        forget = str(found.forget.get(client, 0)) if found.forget else "–"
        table.add_row(escape(client), str(sum(counts)), forget, str(groups), distance)
    Console(highlight=False).print(table)
    if (more := len(found.counts) - LISTED) > 0:
        print(f"... and {more} more clients")
