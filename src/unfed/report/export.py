"""The numbers of a page as CSV and as a LaTeX table."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from unfed.base.artifacts import atomic_path
from unfed.report.contents import Report
from unfed.report.labels import METRICS, headline, label, number, target

FACTS = ("method", "aggregator", "lora_r", "seed")
COSTS = ("seconds", "rounds", "bytes_up", "bytes_down", "aggregation_error")
_SPECIAL = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "–": "--",
}


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Write rows as CSV, atomically; what a row does not have stays empty. Numbers are not rounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if (v := row.get(k)) is None else v for k in columns} for row in rows)
    with atomic_path(path) as part:
        part.write_text(text.getvalue(), encoding="utf-8")


def write_tex(path: Path, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a booktabs ``tabular``, atomically: the first column left, the others right."""
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        "\\toprule",
        f"{' & '.join(map(tex, head))} \\\\",
        "\\midrule",
        *(f"{' & '.join(map(tex, row))} \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    with atomic_path(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def tex(text: str) -> str:
    """A text as LaTeX writes it; a negative number gets a minus sign."""
    escaped = "".join(_SPECIAL.get(c, c) for c in text)
    return f"${text}$" if re.fullmatch(r"-\d+(\.\d+)?", text) else escaped


def write_report_csv(path: Path, report: Report) -> None:
    """One row a model: what it is, what it cost, and every metric."""
    metrics = [*(m for m in METRICS if m in report.metrics), *sorted(report.metrics - set(METRICS))]
    rows: list[Mapping[str, object]] = []
    for m in report.models:
        costs = {k: getattr(m.cost, k) for k in COSTS} if m.cost else {}
        rows.append({"name": m.name, "role": m.role, "run": str(m.place), **m.facts, **costs, **m.summary})
    write_csv(path, rows, ["name", "role", "run", *FACTS, *COSTS, *metrics])


def write_report_tex(path: Path, report: Report) -> None:
    """The headline metrics with their targets, a column for each model."""
    oracle = report.of_role("oracle")
    columns = [m for m in report.models if m.summary and m is not oracle]
    rows = [
        [label(k), target(k, oracle.summary if oracle else None), *(number(k, m.summary.get(k)) for m in columns)]
        for k in headline(report.metrics)
    ]
    write_tex(path, ["metric", "target", *(m.name for m in columns)], rows)
