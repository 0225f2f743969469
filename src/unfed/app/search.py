"""A search in place of a grid: Optuna's TPE proposes the next values from what the runs before scored.

The study is made anew from the history for each proposal, and its sampler is seeded from the search's seed and the
number of the proposal. So there is no sampler state to keep: a search that was killed proposes what the undisturbed one
would have. What was proposed is kept in ``search.json``.

Optuna itself is used, not hydra-optuna-sweeper: its last release (1.2.0) wants Optuna below 3, and it hands every trial
to Hydra's launcher, which knows neither runs that are done already nor a row for one that failed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unfed.app.rundir import plain
from unfed.app.sweep import FAILED, FINISHED, USER_MISTAKE, Row
from unfed.base.artifacts import read_json, write_json
from unfed.base.errors import UnfedError
from unfed.base.seeding import derive_seed
from unfed.config.sweep import Choice, Space, Span, Values, number, run_name
from unfed.config.sweep_runs import SweepRun

SEARCH_FILE = "search.json"
REPEATED = "seed"
"""A swept key that is not searched: every proposal is run with all its values, and scored by the median."""

COSTS = ("seconds", "bytes", "rounds")
"""What may be an objective besides the metrics."""


@dataclass(frozen=True)
class Objective:
    """A metric (or one of ``COSTS``) and whether more of it is better."""

    metric: str
    maximize: bool


@dataclass(frozen=True)
class Scored:
    """A proposal and its score in every objective; ``None`` where a run of it failed or lacks one."""

    values: Values
    scores: tuple[float, ...] | None


@dataclass(frozen=True)
class Search:
    """``trials`` proposals in ``space``, the objectives' first one first."""

    space: Space
    objectives: tuple[Objective, ...]
    trials: int
    seed: int = 0

    def __post_init__(self) -> None:
        if find_spec("optuna") is None:
            raise UnfedError("--optuna: Optuna is not installed; pip install 'unfed[sweep]'")
        if not self.objectives:
            raise UnfedError("--optuna: there is no objective; give --maximize METRIC or --minimize METRIC")
        if not self.searched:
            raise UnfedError(f"--optuna: only {REPEATED} is swept, and that is repeated, not searched")

    @property
    def searched(self) -> Space:
        """The space without the key that is repeated."""
        return {k: v for k, v in self.space.items() if k != REPEATED}

    @property
    def repeats(self) -> tuple[Mapping[str, str], ...]:
        """The values of the repeated key; one empty one without it."""
        found = self.space.get(REPEATED)
        if isinstance(found, Span):
            raise UnfedError(f"{REPEATED}: it is repeated, not searched; list its values")
        return tuple({REPEATED: v} for v in found.values) if found else ({},)

    def identity(self) -> dict[str, Any]:
        """What two searches must share for one to go on with the other."""
        return {"space": plain(self.searched), "objectives": plain(self.objectives), "seed": self.seed}


def study(search: Search, history: Sequence[Scored]) -> Any:
    """The Optuna study of what is known. Its next proposal depends on the arguments and on nothing else."""
    optuna = import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = optuna.create_study(
        directions=["maximize" if o.maximize else "minimize" for o in search.objectives],
        sampler=optuna.samplers.TPESampler(seed=derive_seed(search.seed, "search", len(history)) % 2**32),
    )
    space = _distributions(search)
    for known in history:
        failed = optuna.trial.TrialState.FAIL
        params = {k: _read(v, search.searched[k]) for k, v in known.values.items()}
        made.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions=space,
                **({"values": known.scores} if known.scores is not None else {"state": failed}),
            )
        )
    return made


def suggest(search: Search, history: Sequence[Scored]) -> dict[str, str]:
    """The next values, as they are typed."""
    drawn = study(search, history).ask(_distributions(search)).params
    return {k: str(v) if isinstance(s := search.searched[k], Choice) else number(v, s) for k, v in drawn.items()}


def _distributions(search: Search) -> dict[str, Any]:
    kinds = import_module("optuna.distributions")

    def one(found: Choice | Span) -> Any:
        if isinstance(found, Choice):
            return kinds.CategoricalDistribution(found.values)
        if found.integer:
            return kinds.IntDistribution(int(found.low), int(found.high), log=found.log, step=int(found.step or 1))
        return kinds.FloatDistribution(found.low, found.high, log=found.log, step=found.step)

    return {k: one(v) for k, v in search.searched.items()}


def _read(text: str, found: Choice | Span) -> Any:
    return text if isinstance(found, Choice) else int(text) if found.integer else float(text)


def score(rows: Sequence[Row], objectives: Sequence[Objective]) -> tuple[float, ...] | None:
    """The median of each objective over the rows of a proposal (of a p-value: give its log10)."""
    found = [[_value(r, o.metric) for r in rows] for o in objectives]
    if not rows or any(v is None for values in found for v in values):
        return None
    return tuple(statistics.median([v for v in values if v is not None]) for values in found)


def _value(row: Row, metric: str) -> float | None:
    if row.status != FINISHED:
        return None
    value = row.table()[metric] if metric in COSTS else row.metrics.get(metric)
    return float(value) if isinstance(value, int | float) else None


class Proposals:
    """The runs of a search, made up one after the other; each row has to be reported before the next is asked for.

    ``search.json`` keeps what was proposed, before it is run: called again, those come first, in their order.
    """

    def __init__(self, search: Search, directory: Path, compose: Callable[[Values], SweepRun]) -> None:
        self._search, self._compose = search, compose
        self._file = directory / SEARCH_FILE
        self._proposed = self._known()
        self._rows: dict[str, Row] = {}
        self.history: list[Scored] = []

    def _known(self) -> list[dict[str, str]]:
        if not self._file.is_file():
            return []
        stored = read_json(self._file)
        if stored.get("search") != self._search.identity():
            raise UnfedError(
                f"{self._file} is of a search with another space, seed or objective: give another --name, or remove it"
            )
        return list(stored["proposals"])

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Of the search."""
        return self._search.objectives

    def report(self, row: Row) -> None:
        """Take in what came of a run."""
        self._rows[row.name] = row

    def __iter__(self) -> Iterator[SweepRun | Row]:
        for n in range(self._search.trials):
            if n == len(self._proposed):
                self._proposed.append(suggest(self._search, self.history))
                write_json(self._file, {"search": self._search.identity(), "proposals": self._proposed})
            runs = [self._run({**self._proposed[n], **again}) for again in self._search.repeats]
            yield from (r for r in runs if r.name not in self._rows)
            rows = [self._rows[r.name] for r in runs if r.name in self._rows]
            complete = len(rows) == len(runs)
            self.history.append(Scored(self._proposed[n], score(rows, self._search.objectives) if complete else None))

    def _run(self, values: Values) -> SweepRun | Row:
        try:
            return self._compose(values)
        except UnfedError as e:  # not every combination of a search can be looked at beforehand
            name = run_name(values)
            return Row(name, values, self._file.parent / name, FAILED, USER_MISTAKE, str(e))

    def best(self) -> list[Scored]:
        """The best proposal; of several objectives, those that no other beats in all of them."""
        found = [h for h in self.history if h.scores is not None]
        return [self.history[t.number] for t in study(self._search, self.history).best_trials] if found else []
