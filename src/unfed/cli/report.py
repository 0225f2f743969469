"""``unfed report`` and ``unfed compare``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from unfed.cli.launch import guarded

NOTE = (
    "RUN is a run's directory (with run.json or TOFU_EVAL.json), or NAME=RUN to call it NAME on the page; the names "
    "base, finetuned and oracle also say what it is."
)


def report(argv: Sequence[str] | None = None) -> int:
    """``unfed report RUN...``: one page on several runs, its picture, and the numbers as CSV and LaTeX."""
    parser = argparse.ArgumentParser(
        prog="unfed report", description="Write one page that compares runs: report.html, .png, .csv and .tex.",
        epilog=f"{NOTE} What a run is, is otherwise worked out from what the runs recorded.",
    )  # fmt: skip
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's directory, or NAME=RUN")
    parser.add_argument("--output", type=Path, default=Path("saves/report"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--title", help="headline of the page")
    parser.add_argument("--oracle", metavar="RUN", help="the model that never saw the forget rows")
    parser.add_argument("--finetuned", metavar="RUN", help="the model before unlearning")
    given = parser.parse_args(argv)
    command = " ".join(["unfed report", *(str(r) for r in given.runs)])
    return guarded(lambda: _report(given, command))


def _report(given: argparse.Namespace, command: str) -> int:
    from unfed.app.report import make_report, write_report
    from unfed.report.contents import KNOWN
    from unfed.report.roles import Given

    runs = []
    for text in given.runs:
        name, _, place = text.partition("=")
        named = bool(place) and not Path(text).is_dir()
        runs.append(Given(Path(place), name, name if name in KNOWN else None) if named else Given(Path(text)))
    for role in ("oracle", "finetuned"):
        if (place := getattr(given, role)) is not None:
            runs = [r for r in runs if r.place.resolve() != Path(place).resolve()]
            runs.append(Given(Path(place), None, role))
    made = make_report(runs, command, given.title)
    write_report(given.output, made)
    print(f"report: {given.output / 'report.html'}    numbers: {given.output / 'report.csv'}")
    return 0


def compare(argv: Sequence[str] | None = None) -> int:
    """``unfed compare RUN...``: runs that differ only in their seed become one column: median, range, number."""
    parser = argparse.ArgumentParser(
        prog="unfed compare", description="Put runs that differ only in their seed together: median [min, max].",
        epilog="RUN is a run's directory with run.json and an evaluation.",
    )  # fmt: skip
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's directory")
    parser.add_argument("--output", type=Path, metavar="DIR", help="also write compare.csv and compare.tex there")
    given = parser.parse_args(argv)
    return guarded(lambda: _compare(given))


def _compare(given: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from unfed.app.report import compare as put_together
    from unfed.report.groups import table_rows, write_groups

    groups, notes = put_together(given.runs)
    table = Table(show_edge=False, show_lines=False)
    table.add_column(escape("median [min, max]"))
    for group in groups:
        table.add_column(escape(group.name), justify="right", overflow="fold")
    for row in table_rows(groups):
        table.add_row(*map(escape, row))
    Console(highlight=False).print(table)
    for note in notes:
        print(note)
    if given.output is not None:
        write_groups(given.output, groups)
        print(f"written: {given.output / 'compare.csv'}, {given.output / 'compare.tex'}")
    return 0
