"""A sweep: many runs one after the other, a row each; what is done is kept, what fails stands in its row."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unfed.app.progress import say
from unfed.app.report import compare, make_report, write_report
from unfed.app.stages import Start, carry_on, is_done
from unfed.base.artifacts import run_lock, write_json
from unfed.base.errors import UnfedError
from unfed.config.schema import RunConfig
from unfed.config.sweep import Values, short_keys
from unfed.config.sweep_runs import SweepRun
from unfed.report.contents import Cost
from unfed.report.export import write_csv
from unfed.report.groups import cell, metrics_of, row_label, write_groups
from unfed.report.labels import LOG10_P, headline, others
from unfed.report.read import read_run
from unfed.report.roles import Given

log = logging.getLogger(__name__)

CSV_FILE, JSON_FILE = "sweep.csv", "sweep.json"
SEED = "seed"
SHOWN = ("forget_Q_A_Prob", "forget_Q_A_ROUGE", LOG10_P, "model_utility", "seconds", "megabytes")
"""The columns of the table over seeds: one for each metric there would be too many to read."""

USER_MISTAKE, BROKEN = 2, 1
FINISHED, FAILED = "finished", "failed"
COLUMNS = ("run", "directory", "finetune")
OUTCOME = ("status", "exit_code", "reason", "seconds", "rounds", "bytes", "finetune_seconds", "finetune_bytes")


@dataclass(frozen=True)
class Row:
    """What came of a run. ``exit_code`` is what the run alone would have ended with; ``kept``: it was done before.

    ``finetune`` is the directory of the fine-tuning before it, where the sweep has two stages. ``cost`` and
    ``finetune_cost`` are of the rounds: seconds, and bytes of tensors sent. ``metrics`` has the log10 p of the
    forget quality beside p.
    """

    name: str
    values: Values
    place: Path
    status: str
    exit_code: int = 0
    reason: str = ""
    kept: bool = False
    finetune: Path | None = None
    cost: Cost | None = None
    finetune_cost: Cost | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def table(self) -> dict[str, object]:
        """The row for the files, without swept values and metrics."""
        cost, before = self.cost, self.finetune_cost
        return {
            "run": self.name,
            "directory": str(self.place),
            "finetune": str(self.finetune) if self.finetune else None,
            "status": self.status,
            "exit_code": self.exit_code,
            "reason": self.reason,
            "seconds": cost.seconds if cost else None,
            "rounds": cost.rounds if cost else None,
            "bytes": cost.bytes_up + cost.bytes_down if cost else None,
            "finetune_seconds": before.seconds if before else None,
            "finetune_bytes": before.bytes_up + before.bytes_down if before else None,
        }


@dataclass(frozen=True)
class Ledger:
    """The files of a sweep, rewritten whole after each run."""

    directory: Path
    command: str

    def write(self, rows: Sequence[Row]) -> None:
        """Write sweep.csv (a line a run) and sweep.json (the same, nested)."""
        full = [{**r.table(), "values": dict(r.values), "metrics": dict(r.metrics)} for r in rows]
        write_json(self.directory / JSON_FILE, {"command": self.command, "written": _now(), "runs": full})
        keys = list(dict.fromkeys(k for r in rows for k in r.values))
        present = {m for r in rows for m in r.metrics}
        metrics = [*headline(present), *others(present)]
        metrics += sorted(present - set(metrics))
        flat = [{**r.metrics, **r.table(), **r.values} for r in rows]
        write_csv(self.directory / CSV_FILE, flat, [*COLUMNS, *keys, *OUTCOME, *metrics])


def run_sweep(
    runs: Iterable[SweepRun | Row], ledger: Ledger, start: Start, listener: Callable[[Row], None] | None = None
) -> list[Row]:
    """Carry out the runs in order; their rows. Each row is written, then given to ``listener``, before the next run.

    ``runs`` may be made up as the rows come in; a row among them is of a run that cannot be started at all. Another
    sweep in the same directory is refused. Ctrl-C ends the sweep; called again it goes on.
    """
    ledger.directory.mkdir(parents=True, exist_ok=True)
    total = f"/{len(runs)}" if isinstance(runs, Sequence) else ""
    rows: dict[str, Row] = {}
    with run_lock(ledger.directory):
        for number, run in enumerate(runs, start=1):
            row = run if isinstance(run, Row) else carry_out(run, start, f"{number}{total} ")
            if row.status != FINISHED:
                say(f"FAILED {row.name}: {row.reason}")
            rows[run.name] = row
            ledger.write(list(rows.values()))
            if listener is not None:
                listener(row)
    return list(rows.values())


def carry_out(run: SweepRun, start: Start, count: str = "") -> Row:
    """Fine-tune where that was not done yet, then run. A failure is a row, not an exception."""
    stage = "fine-tuning: "
    place = Path(run.config.paths.output_dir)
    adapter = Path(run.finetune.paths.output_dir) if run.finetune else None
    try:
        if run.finetune is not None:
            _stage(run.finetune, start, f"{count}{run.name}, fine-tuning")
        stage = ""
        kept = _stage(run.config, start, f"{count}{run.name}")
        found = read_run(place)
    except UnfedError as e:
        reason, code = f"{stage}{e}", USER_MISTAKE
    except Exception as e:
        log.exception("%s failed", run.name)  # a defect in one run should not cost the others
        reason, code = f"{stage}{type(e).__name__}: {e}", BROKEN
    else:
        return Row(
            run.name, run.values, place, FINISHED, kept=kept, finetune=adapter, cost=found.cost(),
            finetune_cost=_cost(adapter), metrics=dict(found.summary),
        )  # fmt: skip
    return Row(run.name, run.values, place, FAILED, code, reason, finetune=adapter, finetune_cost=_cost(adapter))


def _cost(adapter: Path | None) -> Cost | None:
    try:
        return read_run(adapter).cost() if adapter else None
    except UnfedError:
        return None


def _stage(config: RunConfig, start: Start, name: str) -> bool:
    """Run a stage unless it is done; whether it was."""
    if is_done(config):
        say(f"\n== {name}: done before, kept ({config.paths.output_dir})")
        return True
    say(f"\n== {name}")
    carry_on(config, start)
    return False


def over_seeds(
    rows: Sequence[Row], ledger: Ledger, more: Sequence[str] = ()
) -> tuple[list[str], list[list[str]], list[str]]:
    """The table over seeds: its head, a line for each group of runs that differ in nothing else, and remarks.

    Its columns are a few metrics, and ``more``; all of them go to compare.csv and compare.tex.
    Raises ``UnfedError`` where no run has an evaluation.
    """
    done = {r.place: r for r in rows if r.status == FINISHED}
    if not done:
        raise UnfedError("no run finished")
    groups, notes = compare(list(done))
    write_groups(ledger.directory, groups)
    shown = [m for m in metrics_of(groups) if m in {*SHOWN, *more}]
    names = [_without_seed(done[g.places[0]].values) for g in groups]
    # Where only seeds are swept there is one group, and its own name is as good as any.
    body = [
        [name or g.name, str(g.count), *(cell(g, m).replace(" [", "\n[") for m in shown)]
        for name, g in zip(names, groups, strict=True)
    ]
    return ["run", "runs", *map(row_label, shown)], body, notes


def _without_seed(values: Values) -> str:
    pairs = zip(short_keys(values), values.items(), strict=True)
    return "\n".join(f"{short}={v}" for short, (k, v) in pairs if k != SEED)


def sweep_report(rows: Sequence[Row], ledger: Ledger) -> Path:
    """The report page of the finished runs that have an evaluation.

    Raises ``UnfedError`` where there is none, or where they cannot stand on one page.
    """
    scored = [Given(r.place, r.name) for r in rows if r.status == FINISHED and r.metrics]
    if not scored:
        raise UnfedError("no run of the sweep has an evaluation")
    write_report(ledger.directory, make_report(scored, ledger.command, f"Sweep {ledger.directory.name}"))
    return ledger.directory / "report.html"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
