"""Runs that differ only in their seed, put together: median, range and number of runs.

One run says little about a method; forget quality in particular is a p-value, so its median is taken of log10 p.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unfed.base.errors import UnfedError
from unfed.report.export import write_csv, write_tex
from unfed.report.labels import LOG10_P, headline, label, number
from unfed.report.read import RUN_FILE, Run, locate, mapping, read_run

WITHOUT = ("seed", "task_name", "paths", "resume", "overwrite", "engine")
"""Parts of a configuration that do not say what was tried."""

REPORTING = ("seed", "report_to", "run_name", "logging_steps", "dataloader_num_workers")
PATHS = (
    ("model", "model_args", "pretrained_model_name_or_path"),
    ("model", "model_args", "lora_model_path"),
    ("partition", "manifest"),
    ("eval", "retain_logs_path"),
    ("eval", "finetuned_logs_path"),
    ("eval", "reference_model_path"),
)
"""Settings that name other runs: two of them are the same if those runs differ only in their seed, too."""

SAME_THING = frozenset(
    f"trainer.method_args.{key}" for key in ("unlearn_trainer_cls", "aggregation_strategy", "schedule")
)
"""Settings that repeat what another one says."""

FIRST = (
    "mode", "method.name", "recipe.name", "wrapper.name", "aggregator.name", "privacy.name", "wire.name",
    "method.params", "recipe.params", "privacy.params", "wire.params",
    "model.model_args.lora_config", "trainer.method_args", "trainer.args", "aggregator.params", "partition", "data",
)  # fmt: skip
"""Which settings name a group before others do."""

NAMED = 5
"""At most so many settings in a name; one more is written out, further ones are counted."""

PLAIN = frozenset({"method.name", "recipe.name", "wrapper.name", "aggregator.name", "privacy.name", "mode"})
"""Settings whose value says it all."""

COST = ("seconds", "megabytes")
Flat = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """Median and range of one number over the runs that have it."""

    median: float
    low: float
    high: float
    count: int

    def text(self, metric: str) -> str:
        """For a table: ``median [min, max]``, one run's value alone."""
        show = _shown(metric)
        return show(self.median) if self.count == 1 else f"{show(self.median)} [{show(self.low)}, {show(self.high)}]"


@dataclass(frozen=True)
class Group:
    """Runs of one configuration. ``spreads``: metric -> spread; ``seeds`` in the order of the runs."""

    name: str
    places: Sequence[Path]
    seeds: Sequence[int]
    spreads: Mapping[str, Spread]

    @property
    def count(self) -> int:
        """How many runs."""
        return len(self.places)


def _shown(metric: str) -> Any:
    return (lambda v: f"{v:.1f}") if metric in COST else (lambda v: number(metric, v))


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs that differ only in their seed together, in the order of the first of each.

    Raises ``UnfedError`` for a run without run.json, whose settings nobody knows.
    """
    unknown = [str(r.place) for r in runs if not r.config]
    if unknown:
        raise UnfedError(f"{', '.join(unknown)}: no configuration in {RUN_FILE}, so nobody knows the settings")
    flats = {r.place: _flat(_settings(r, set())) for r in runs}
    together: dict[str, list[Run]] = {}
    for r in runs:
        together.setdefault(json.dumps(flats[r.place], sort_keys=True, default=str), []).append(r)
    members = list(together.values())
    names = _names([flats[m[0].place] for m in members], [str(m[0].record.get("task_name", "")) for m in members])
    return [
        Group(name, [r.place for r in own], [int(r.record.get("seed", 0)) for r in own], _spreads(own))
        for name, own in zip(names, members, strict=True)
    ]


def _settings(run: Run, seen: set[Path]) -> dict[str, Any]:
    """A run's configuration without its seed; runs that it names stand there with their own settings."""
    settings = json.loads(json.dumps({k: v for k, v in run.config.items() if k not in WITHOUT}))
    args = mapping(settings.get("trainer")).get("args")
    if isinstance(args, dict):
        for key in REPORTING:
            args.pop(key, None)
    for *parents, key in PATHS:
        part: Any = settings
        for parent in parents:
            part = mapping(part).get(parent)
        if isinstance(part, dict) and part.get(key):
            part[key] = _named_run(str(part[key]), run.place, seen | {run.place.resolve()})
    return settings


def _named_run(path: str, seen_from: Path, seen: set[Path]) -> Any:
    found = locate(path, seen_from)
    place = found if found is None or found.is_dir() else found.parent
    if place is None or place in seen or not (place / RUN_FILE).is_file():
        return path
    try:
        return _settings(read_run(place), seen)
    except UnfedError:
        return path


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for k, v in value.items():
            found |= _flat(v, f"{prefix}.{k}" if prefix else str(k))
        return found
    return {prefix: value}


def _names(flats: Sequence[Flat], tasks: Sequence[str]) -> list[str]:
    """What differs between the groups, for each of them: the mode, and what differs among those of one mode."""
    modes = [str(f.get("mode")) for f in flats]
    names = []
    for flat, mode, task in zip(flats, modes, tasks, strict=True):
        alike = [f for f, m in zip(flats, modes, strict=True) if m == mode]
        parts = _parts(flat, alike) if len(alike) > 1 else [str(flat["method.name"])] if "method.name" in flat else []
        names.append(", ".join([mode] * (len(set(modes)) > 1) + parts) or task)
    return [f"{n} ({t})" if names.count(n) > 1 else n for n, t in zip(names, tasks, strict=True)]


def _parts(flat: Flat, alike: Sequence[Flat]) -> list[str]:
    """The settings of a group that differ from those of the others; a key's last word is enough if it is the only."""
    keys = [k for k in dict.fromkeys(k for f in alike for k in f) if k not in SAME_THING and _differs(k, alike)]
    keys.sort(key=lambda k: next((n for n, head in enumerate(FIRST) if f"{k}.".startswith(f"{head}.")), len(FIRST)))
    last = [k.rpartition(".")[2] for k in keys]
    found = [
        _value(k, flat[k], k if last.count(short) > 1 else short)
        for k, short in zip(keys, last, strict=True)
        if flat.get(k) is not None
    ]
    more = len(found) - NAMED
    return found if more < 2 else [*found[:NAMED], f"{more} more settings"]


def _differs(key: str, flats: Sequence[Flat]) -> bool:
    """Whether a setting tells groups apart that have it; ``X.params.k`` only among groups with the same ``X.name``."""
    head, _, _ = key.partition(".params.")
    sort = f"{head}.name" if head != key else None
    values: dict[str, set[str]] = {}
    for f in flats:
        if key in f:
            values.setdefault(str(f.get(sort)) if sort else "", set()).add(repr(f[key]))
    return any(len(v) > 1 for v in values.values())


def _value(key: str, value: Any, short: str = "") -> str:
    if key in PLAIN:
        return str(value)
    text = " ".join(str(value).split())
    return f"{short}={text if len(text) <= 24 else text[:23] + '…'}"


def _spreads(runs: Sequence[Run]) -> dict[str, Spread]:
    values: dict[str, list[float]] = {}
    for r in runs:
        cost = r.cost()
        costs = {"seconds": cost.seconds, "megabytes": cost.megabytes} if cost else {}
        for metric, value in {**r.summary, **costs}.items():
            values.setdefault(metric, []).append(value)
    return {m: Spread(statistics.median(v), min(v), max(v), len(v)) for m, v in values.items()}


def metrics_of(groups: Sequence[Group]) -> list[str]:
    """The rows of the table: headline metrics, forget quality as log10 p, and the cost."""
    present = {m for g in groups for m in g.spreads}
    rows = [LOG10_P if m == "forget_quality" else m for m in headline(present)]
    return [m for m in [*rows, *COST] if m in present]


def row_label(metric: str) -> str:
    """The name of a row."""
    return {"seconds": "seconds", "megabytes": "MB sent"}.get(metric) or label(metric)


def cell(group: Group, metric: str) -> str:
    """A cell of the table; says so when only some of the runs have the number."""
    spread = group.spreads.get(metric)
    if spread is None:
        return "–"
    return spread.text(metric) + (f" (n={spread.count})" if spread.count < group.count else "")


def table_rows(groups: Sequence[Group]) -> list[list[str]]:
    """The table's rows without its head: how many runs, then a row for each metric."""
    counts = ["runs", *(f"{g.count}" if g.count > 1 else "1, no range" for g in groups)]
    return [counts, *([row_label(m), *(cell(g, m) for g in groups)] for m in metrics_of(groups))]


def write_groups(directory: Path, groups: Sequence[Group]) -> None:
    """Write compare.csv (a row for each group and metric, all of them) and compare.tex (the table)."""
    rows: list[Mapping[str, object]] = [
        {"group": g.name, "metric": metric, "n": s.count, "median": s.median, "min": s.low, "max": s.high,
         "seeds": " ".join(map(str, g.seeds)), "runs": " ".join(map(str, g.places))}
        for g in groups for metric, s in g.spreads.items()
    ]  # fmt: skip
    write_csv(directory / "compare.csv", rows, ["group", "metric", "n", "median", "min", "max", "seeds", "runs"])
    write_tex(directory / "compare.tex", ["median [min, max]", *(g.name for g in groups)], table_rows(groups))
