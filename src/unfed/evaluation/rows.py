"""The rows of an evaluation: read, and looked at before any model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from unfed.base.errors import DataError
from unfed.base.types import Example
from unfed.data.benchmarks import EvaluationSplit
from unfed.data.datasets import load_rows, place_of
from unfed.evaluation.evidence import column_problem
from unfed.evaluation.metric import Suite

Needs = Mapping[str, Mapping[str, Sequence[str]]]
"""Split -> column -> the metrics that look at it."""


def needed_columns(suite: Suite, metrics: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """What the wanted metrics (none: the default) and their parts look at."""
    found: dict[str, dict[str, list[str]]] = {}
    for metric in suite.select(metrics):
        for split, column in dict.fromkeys([*metric.rule.columns, *metric.rule.generated]):
            found.setdefault(split, {}).setdefault(column, []).append(metric.name)
    return found


def read_rows(
    suite: Suite, metrics: Sequence[str], splits: Mapping[str, EvaluationSplit], data_dir: Path | str | None
) -> dict[str, list[Example]]:
    """The rows of every split that a wanted metric looks at; one that ``splits`` does not have is left out.

    Rows that are shown as examples are looked at, too. Raises ``DataError`` naming the file, the missing column, the
    metrics that need it and those that do not.
    """
    found: dict[str, list[Example]] = {}
    for split, columns in needed_columns(suite, metrics).items():
        if split not in splits:
            continue
        data = splits[split].data
        try:
            found[split] = load_rows(data, data_dir)
            if (shots := splits[split].shots) is not None:
                load_rows(shots, data_dir)  # read again when the prompts are made; missing, it is to be said here
        except DataError as e:
            raise DataError(f"{e}. {_who_asks(suite, metrics, {split: columns})}") from e
        for column, names in columns.items():
            if (problem := column_problem(found[split], split, column)) is not None:
                where = place_of(data, data_dir)
                raise DataError(f"{where}: {problem}. {_who_asks(suite, metrics, {split: {column: names}})}")
    return found


def _who_asks(suite: Suite, metrics: Sequence[str], needs: Needs) -> str:
    """Who asks for what is missing, and what can be measured without it."""
    names = list(dict.fromkeys(m for columns in needs.values() for own in columns.values() for m in own))
    missing = {(split, column) for split, columns in needs.items() for column in columns}
    left = [
        name
        for name in metrics or suite.default
        if not missing & {c for m in suite.select((name,)) for c in (*m.rule.columns, *m.rule.generated)}
    ]
    without = f"eval.metrics=[{','.join(left)}] goes without it" if left else "no wanted metric goes without it"
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"The evaluation needs it for {shown}; {without}, eval=null is no evaluation"
