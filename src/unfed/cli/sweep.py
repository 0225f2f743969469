"""``unfed sweep``: many runs from one command line, and their table and page."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unfed.cli.launch import guarded

if TYPE_CHECKING:  # they bring torch, which takes seconds that a mistake should not
    from unfed.app.search import Proposals, Search
    from unfed.app.sweep import Ledger, Row
    from unfed.config.sweep import Space
    from unfed.config.sweep_runs import Composer, SweepRun

DEFAULT = "unlearn-lora.yaml"
SOME_FAILED = 1
GRID_CHECKED_OF_A_SEARCH = 64
"""A search whose choices make at most so many combinations has all of them checked; a larger one its corners."""

EPILOG = """\
Values are listed in Hydra's grammar: method=NPO,GradDiff seed=0,1,2 'seed=range(0,3)' 'lora=choice(quick,high)'.
With --optuna also 'trainer.args.learning_rate=tag(log,interval(1e-4,1e-2))'. All other arguments are those of the run.

Each run is DIRECTORY/NAME/<its values>; the numbers of all of them are sweep.csv and sweep.json beside it. The same
command again keeps what is done, goes on with what was cut short, and runs again what failed.

Exit code: 0 all runs finished, 1 some failed (their rows say why), 2 a mistake was found before the first run.
"""


def sweep(argv: Sequence[str]) -> int:
    """``unfed sweep <overrides, some with several values>``; the exit code."""
    parser = _parser()
    given, overrides = parser.parse_known_args(list(argv))
    command = shlex.join(["unfed", "sweep", *argv])
    return guarded(lambda: _sweep(given, overrides, command))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unfed sweep", usage="unfed sweep [options] key=value,value ... [key=value ...]", allow_abbrev=False,
        description="Run every combination of the listed values, or let Optuna choose; one row a run.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--name", default="default", help="names the sweep's directory (default: %(default)s)")
    add("--directory", type=Path, default=Path("saves/sweep"), help="where sweeps lie (default: %(default)s)")
    add("--config-name", default=DEFAULT, help="what kind of run (default: %(default)s)")
    add("--finetune", metavar="'OVERRIDES'", help="fine-tune first, with these overrides; each run starts from that")
    add("--finetune-config", default="train-lora.yaml", metavar="NAME", help="its kind (default: %(default)s)")
    add("--finetune-keys", metavar="KEY,KEY", help="swept keys that the fine-tuning takes, too: one for each "
        "combination of their values (default: seed, lora, and keys of model.model_args.lora_config)")  # fmt: skip
    add("--optuna", type=int, metavar="N", help="N proposals of Optuna's TPE instead of the grid; a swept seed is not "
        "searched: every proposal is run with each and scored by the median")  # fmt: skip
    add("--maximize", action="append", default=[], metavar="METRIC", help="an objective (may be given again)")
    add("--minimize", action="append", default=[], metavar="METRIC", help="an objective; also seconds, bytes, rounds")
    add("--optuna-seed", type=int, default=0, metavar="SEED", help="of the proposals (default: %(default)s)")
    return parser


def _sweep(given: argparse.Namespace, overrides: Sequence[str], command: str) -> int:
    from unfed.base.errors import ConfigError
    from unfed.config.sweep import corners, read_sweep
    from unfed.config.sweep_runs import Composer, FineTuning, checked

    objectives = [*given.maximize, *given.minimize]
    if given.optuna is None and objectives:
        raise ConfigError(["--maximize and --minimize are for a search: give --optuna N as well"])
    if given.optuna is not None and given.optuna < 1:
        raise ConfigError([f"--optuna {given.optuna}: should be 1 or more"])
    taken = read_sweep(overrides, given.config_name, searched=given.optuna is not None)
    first = None
    if given.finetune is not None:
        first = FineTuning(tuple(shlex.split(given.finetune)), _keys(given, taken.space), given.finetune_config)
    elif given.finetune_keys is not None:
        raise ConfigError(["--finetune-keys: there is no fine-tuning; give --finetune as well"])
    composer = Composer(given.directory / given.name, taken, given.config_name, first)
    if given.optuna is None:
        return _carry_out(composer, checked(composer, taken.grid), command)
    ends = corners(taken.space)
    filled = [{**ends[0], **values} for values in taken.grid]
    some = filled if len(filled) <= GRID_CHECKED_OF_A_SEARCH else []
    runs = checked(composer, {tuple(v.items()): v for v in [*ends, *some]}.values())
    return _carry_out(composer, runs, command, _search(given, taken.space, runs[0]))


def _keys(given: argparse.Namespace, space: Space) -> tuple[str, ...]:
    if given.finetune_keys is not None:
        return tuple(k.strip() for k in given.finetune_keys.split(",") if k.strip())
    return tuple(k for k in space if k in {"seed", "lora"} or k.startswith("model.model_args.lora_config."))


def _search(given: argparse.Namespace, space: Space, run: SweepRun) -> Search:
    from unfed.app.search import COSTS, Objective, Search
    from unfed.app.targets import known_metrics

    names = [(m, True) for m in given.maximize] + [(m, False) for m in given.minimize]
    known_metrics(run.config, [m for m, _ in names], COSTS)
    return Search(space, tuple(Objective(m, more) for m, more in names), given.optuna, given.optuna_seed)


def _carry_out(composer: Composer, runs: Sequence[SweepRun], command: str, search: Search | None = None) -> int:
    from unfed.app.progress import say
    from unfed.app.runs import run
    from unfed.app.search import Proposals
    from unfed.app.sweep import CSV_FILE, FAILED, Ledger, run_sweep

    ledger = Ledger(composer.directory, command)
    proposals = Proposals(search, composer.directory, composer.run) if search else None
    if proposals is None:
        say(f"{len(runs)} runs under {composer.directory}")
        rows = run_sweep(runs, ledger, run)
    else:
        rows = run_sweep(proposals, ledger, run, proposals.report)
    _show(rows, ledger, proposals)
    failed = [r for r in rows if r.status == FAILED]
    kept = sum(r.kept for r in rows)
    print(f"{len(rows) - len(failed)} of {len(rows)} runs finished ({kept} were done before); rows: "
          f"{composer.directory / CSV_FILE}")  # fmt: skip
    for row in failed:
        print(f"failed: {row.name}: {row.reason}")
    return SOME_FAILED if failed else 0


def _show(rows: Sequence[Row], ledger: Ledger, proposals: Proposals | None) -> None:
    """The table over seeds, the best proposals, and the page."""
    from unfed.app.sweep import over_seeds, sweep_report
    from unfed.base.errors import UnfedError

    try:
        names = [o.metric for o in proposals.objectives] if proposals else []
        _print(*over_seeds(rows, ledger, names))
        print(f"report: {sweep_report(rows, ledger)}")
    except UnfedError as e:  # the runs are done and their rows are written, whatever can be made of them
        print(f"no table or page: {e}")
    for found in proposals.best() if proposals else []:
        scores = ", ".join(f"{s:.4g}" for s in found.scores or ())
        print(f"best: {' '.join(f'{k}={v}' for k, v in found.values.items())} ({scores})")


def _print(head: Sequence[str], body: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape("median [min, max] over seeds"), title_justify="left", show_edge=False)
    for n, column in enumerate(head):
        table.add_column(escape(column), justify="left" if n == 0 else "right", overflow="fold", no_wrap=n == 0)
    for row in body:
        table.add_row(*map(escape, row))
    Console(highlight=False).print(table)
    for note in notes:
        print(note)
