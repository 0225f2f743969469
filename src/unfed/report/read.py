"""Read run directories: ``run.json``, ``*_EVAL.json``, ``*_SUMMARY.json``, and what they say of each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unfed.base.artifacts import RUN_FILE, RUN_KEY, read_json
from unfed.base.errors import ArtifactError, UnfedError, nearest
from unfed.data.ownership import OWNERSHIP_FILE, Ownership
from unfed.report.contents import Cost, Point
from unfed.report.labels import LOG10_P

PREFERRED = "TOFU"


@dataclass(frozen=True)
class Run:
    """A run directory. ``record``: run.json (empty without one); ``suite``: ``TOFU`` and the like, or ``None``."""

    place: Path
    record: Mapping[str, Any]
    suite: str | None = None
    entries: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, float] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration that run.json records."""
        return mapping(self.record.get("config"))

    @property
    def mode(self) -> str:
        """finetune, unlearn or eval; empty where nobody recorded it."""
        return str(self.record.get("mode", ""))

    @property
    def rounds(self) -> Sequence[Mapping[str, Any]]:
        """The records of the rounds."""
        found = self.record.get("rounds")
        return [r for r in found if isinstance(r, Mapping)] if isinstance(found, list) else []

    @property
    def scored(self) -> Mapping[str, Any]:
        """What the evaluation file says about itself: splits, digests, parity."""
        return mapping(self.entries.get(RUN_KEY))

    def cost(self) -> Cost | None:
        """Seconds, rounds and bytes; ``None`` for a run without rounds."""
        if not self.rounds:
            return None
        sent = [*self.rounds, *(mapping(m) for m in mapping(self.record.get("beside_rounds")).values())]
        errors = [e for r in self.rounds if (e := _finite(r.get("aggregation_error"))) is not None]
        return Cost(
            seconds=sum(_finite(r.get("seconds")) or 0.0 for r in self.rounds),
            rounds=len(self.rounds),
            bytes_up=int(sum(_finite(r.get("bytes_up")) or 0 for r in sent)),
            bytes_down=int(sum(_finite(r.get("bytes_down")) or 0 for r in sent)),
            aggregation_error=max(errors, default=None),
        )

    def own_adapters(self) -> list[str]:
        """What is to be said of adapters that its clients keep for themselves, if they do."""
        made = mapping(self.record.get("personal"))
        before, after = (_finite(made.get(k)) for k in ("before_mean", "after_mean"))
        if before is None or after is None:
            return []
        words = (
            "its clients have adapters of their own, which no score on this page is of: the mean probability of their"
        )
        return [f"{words} own answers is {after:.2f} with those and {before:.2f} with the served one."]

    def losses(self) -> list[tuple[str, float]]:
        """(phase, mean of the clients' mean losses) of each round; NaN where no client reported one."""
        found = []
        for r in self.rounds:
            clients = mapping(r.get("metrics")).values()
            values = [v for m in clients if (v := _finite(mapping(m).get("loss"))) is not None]
            found.append((str(r.get("phase", "")), sum(values) / len(values) if values else math.nan))
        return found

    def points(self) -> list[Point]:
        """The evaluations made during training."""
        found = self.record.get("evaluations")
        rows = [r for r in found if isinstance(r, Mapping)] if isinstance(found, list) else []
        keys = ("client_mean", "client_worst", "client_gap")
        return [
            Point(
                int(_finite(r.get("round")) or 0),
                str(r.get("phase", "")),
                _numbers(mapping(r.get("scores"))),
                _numbers({k: r.get(k) for k in keys}),
            )
            for r in rows
        ]

    def ownership(self) -> Ownership | None:
        """Whose rows it was trained on; ``None`` for a run of one client, or of a time before this was kept."""
        file = self.place / OWNERSHIP_FILE
        return Ownership.read(file) if file.is_file() else None


def mapping(value: Any) -> Mapping[str, Any]:
    """``value`` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(k): v for k, value in values.items() if (v := _finite(value)) is not None}


def read_run(place: Path) -> Run:
    """Read a run directory (its ``evals`` too, where an evaluation lies there).

    Raises ``UnfedError`` when there is no such directory or it is no run, ``ArtifactError`` for a broken file.
    """
    if not place.is_dir():
        beside = [p.name for p in place.parent.iterdir() if p.is_dir()] if place.parent.is_dir() else []
        raise UnfedError(f"RUN={place}: no such directory{nearest(place.name, beside)}")
    record = _json_object(place / RUN_FILE) if (place / RUN_FILE).is_file() else {}
    for where in (place, place / "evals"):
        suite = _suite(where)
        if suite is not None:
            entries, summary = _evaluation(where, suite)
            return Run(place, record, suite, entries, summary)
    if not record:
        raise UnfedError(f"RUN={place}: not a run: it has no {RUN_FILE} and no *_EVAL.json or *_SUMMARY.json")
    return Run(place, record)


def _suite(where: Path) -> str | None:
    """The suite of the evaluation in a directory: TOFU's before any other's."""
    suffixes = ("_EVAL.json", "_SUMMARY.json")
    found = {f.name.removesuffix(s) for s in suffixes for f in where.glob(f"*{s}")}
    return min(found, key=lambda s: (s != PREFERRED, s), default=None)


def _evaluation(where: Path, suite: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Entries and numbers; where one of the two files is missing, what the other says."""
    full, short = where / f"{suite}_EVAL.json", where / f"{suite}_SUMMARY.json"
    entries = _json_object(full) if full.is_file() else {}
    entries = dict(nested) if (nested := mapping(entries.get("metrics"))) else entries
    if short.is_file():
        summary = _numbers(_json_object(short))
    else:
        summary = _numbers({k: mapping(v).get("agg_value") for k, v in entries.items() if k != RUN_KEY})
    p = summary.get("forget_quality")
    exponent = _finite(mapping(entries.get("forget_quality")).get("log10_p"))
    if exponent is None and p is not None and p > 0:
        exponent = math.log10(p)
    if exponent is not None:
        summary[LOG10_P] = exponent
    return entries, summary


def _json_object(file: Path) -> dict[str, Any]:
    found = read_json(file)
    if not isinstance(found, dict):
        raise ArtifactError(f"{file}: not a JSON object, so not a file of a run")
    return found


def locate(path: str | None, seen_from: Path) -> Path | None:
    """A path that a run's configuration names: as it stands, or from the run's parents if it is relative.

    Runs record paths as they were typed, from a directory that need not be today's.
    """
    if not path:
        return None
    for root in (Path(), *seen_from.resolve().parents):
        if (root / path).exists():
            return (root / path).resolve()
    return None


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse evaluations of different suites, rows or attention masks. Raises ``UnfedError`` naming both runs."""
    scored = [r for r in runs if r.suite is not None]
    problems = [
        f"{scored[0].place} and {other.place} cannot be compared: {why}"
        for other in scored[1:]
        if (why := _difference(scored[0], other))
    ]
    if problems:
        raise UnfedError("\n".join(problems))


def _difference(one: Run, other: Run) -> str | None:
    if other.suite != one.suite:
        return f"evaluated with the suites {one.suite} and {other.suite}"
    ours, theirs = (mapping(r.scored.get("splits")) for r in (one, other))
    for split in [s for s in ours if s in theirs]:
        a, b = mapping(ours[split]), mapping(theirs[split])
        if a.get("digest") != b.get("digest"):
            return f"their {split} splits have other rows ({_rows(a)}; {_rows(b)})"
    modes = (one.scored.get("parity"), other.scored.get("parity"))
    if one.scored and other.scored and modes[0] != modes[1]:
        return f"eval.parity={modes[0]} and eval.parity={modes[1]}"
    return None


def _rows(split: Mapping[str, Any]) -> str:
    return f"{split.get('name', '?')}, {split.get('rows', '?')} rows, {str(split.get('digest'))[:19]}"
