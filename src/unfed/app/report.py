"""``unfed report`` and ``unfed compare``: finished runs in, pages and tables out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from unfed.base.errors import UnfedError
from unfed.report.answers import choose
from unfed.report.contents import Model, Report
from unfed.report.export import write_report_csv, write_report_tex
from unfed.report.groups import Group, group_runs
from unfed.report.page import write_page
from unfed.report.read import RUN_KEY, Run, check_comparable, mapping, read_run
from unfed.report.roles import Given, models


def make_report(given: Sequence[Given], command: str, title: str | None = None) -> Report:
    """Read the runs and work out what each is. Raises ``UnfedError`` for runs that cannot stand on one page."""
    _no_run_twice([g.place for g in given])
    found, notes = models(given)
    check_comparable([Run(m.place, {}, m.suite, m.entries) for m in found])
    splits = mapping(next((s for m in found if (s := mapping(m.entries.get(RUN_KEY)).get("splits"))), {}))
    return Report(
        title=title or _title(found, splits),
        command=command,
        models=found,
        answers=choose(found),
        notes=[*notes, *_rows(splits)],
        machine="; ".join(dict.fromkeys(str(m.facts["device"]) for m in found if "device" in m.facts)),
    )


def write_report(directory: Path, report: Report) -> None:
    """Write report.html, report.png, report.csv and report.tex into ``directory``."""
    write_page(directory / "report.html", report)
    write_report_csv(directory / "report.csv", report)
    write_report_tex(directory / "report.tex", report)


def _no_run_twice(places: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for place in places:
        if place.resolve() in seen:
            raise UnfedError(f"RUN={place}: given twice")
        seen[place.resolve()] = place


def _title(found: Sequence[Model], splits: Mapping[str, object]) -> str:
    forgot = ", ".join(m.name for m in found if m.role == "unlearned")
    suite = next((m.suite for m in found if m.suite), None)
    name = str(mapping(splits.get("forget")).get("name", "")).removesuffix("_perturbed")
    name = suite if suite != "TOFU" else name
    return (f"{forgot}: what was forgotten" if forgot else "Runs compared") + (f" ({name})" if name else "")


def _rows(splits: Mapping[str, object]) -> list[str]:
    sizes = [
        f"{split} {mapping(info).get('rows', '?')} ({mapping(info).get('name', '?')})" for split, info in splits.items()
    ]
    return [f"Rows that were scored: {', '.join(sizes)}."] if sizes else []


def _within(place: Path) -> str:
    """Where ``oracle=auto`` put evaluations of a run: in directories of their own."""
    found = sorted({f.parent.name for f in place.glob("eval_*/*_EVAL.json")})
    return f"; it has some of its own within: {', '.join(found)}" if found else ""


def compare(places: Sequence[Path]) -> tuple[list[Group], list[str]]:
    """Groups of runs that differ only in their seed, and remarks on them.

    Raises ``UnfedError`` for runs that cannot be compared, and when none has an evaluation.
    """
    _no_run_twice(places)
    runs = [read_run(p) for p in places]
    check_comparable(runs)
    notes = [f"{r.place}: left out, it has no evaluation{_within(r.place)}" for r in runs if r.suite is None]
    scored = [r for r in runs if r.suite is not None]
    if not scored:
        raise UnfedError("none of these runs has an evaluation: nothing to compare")
    groups = group_runs(scored)
    for g in groups:
        twice = sorted({s for s in g.seeds if g.seeds.count(s) > 1})
        if twice:
            notes.append(f"{g.name}: more than one run has seed {', '.join(map(str, twice))}: the range is too narrow")
    return groups, notes
