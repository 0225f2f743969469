"""From a small rank and few modules upwards, until a target is met: each step fine-tunes, unlearns and scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unfed.app.oracle import oracle_logs
from unfed.app.plan import Plan, plan
from unfed.app.stages import Start
from unfed.app.sweep import FINISHED, Ledger, Row, run_sweep
from unfed.app.targets import FINETUNED, ORACLE, Target
from unfed.base.artifacts import write_json
from unfed.base.errors import ConfigError, UnfedError
from unfed.config.schema import RunConfig
from unfed.config.sweep import Values
from unfed.config.sweep_runs import SweepRun
from unfed.report.read import read_run

TUNE_FILE = "tune_rank.json"
LORA = "model.model_args.lora_config"
ATTENTION = ("q_proj", "v_proj")
LADDER: tuple[tuple[int, tuple[str, ...] | None], ...] = (
    (4, ATTENTION), (8, ATTENTION), (16, ATTENTION), (16, None), (32, None), (64, None),
)  # fmt: skip
"""(rank, modules) from small to large; ``None``: the modules that the model's configuration names (all seven linear
layers of a Llama block)."""

ALPHA = 2
"""``lora_alpha`` is so many times the rank, so that the learning rate keeps its meaning from step to step."""


def step_values(rank: int, modules: Sequence[str] | None) -> Values:
    """What a step sets in both of its stages."""
    values = {f"{LORA}.r": str(rank), f"{LORA}.lora_alpha": str(ALPHA * rank)}
    return values if modules is None else {**values, f"{LORA}.target_modules": f"[{','.join(modules)}]"}


@dataclass(frozen=True)
class Step:
    """A step of the ladder, with what its adapter costs by ``unfed plan``."""

    run: SweepRun
    trainable_parameters: int
    bytes_per_round: float

    @property
    def finetune(self) -> RunConfig:
        """Its first stage."""
        assert self.run.finetune is not None
        return self.run.finetune

    @property
    def rank(self) -> int:
        """Of its adapter."""
        lora = self.finetune.model.model_args.lora_config
        return lora.r if lora else 0

    @property
    def modules(self) -> tuple[str, ...]:
        """Where its adapter goes."""
        named = lora.target_modules if (lora := self.finetune.model.model_args.lora_config) else ()
        return (named,) if isinstance(named, str) else tuple(named)


@dataclass(frozen=True)
class Tried:
    """A step that was taken. ``bounds``: the number behind each target, ``None`` where nobody knows it."""

    step: Step
    row: Row
    bounds: tuple[float | None, ...]
    shortfall: float

    @property
    def met(self) -> bool:
        """Whether all targets hold."""
        return self.shortfall == 0

    @property
    def seconds(self) -> float:
        """Of all rounds of both stages."""
        return sum(c.seconds for c in (self.row.cost, self.row.finetune_cost) if c is not None)


def steps_of(runs: Sequence[SweepRun]) -> list[Step]:
    """The steps with their costs, from the shapes of the model alone; ``ConfigError`` for modules that it lacks."""
    steps, problems = [], []
    for run in runs:
        try:
            assert run.finetune is not None
            found: Plan = plan(run.finetune)
        except (UnfedError, ValueError) as e:  # PEFT raises ValueError where no module has such a name
            problems.append(f"{run.name}: {e}")
            continue
        steps.append(Step(run, found.trainable_parameters, found.bytes_per_round))
    if problems:
        raise ConfigError(problems)
    return steps


def climb(steps: Sequence[Step], targets: Sequence[Target], ledger: Ledger, start: Start) -> list[Tried]:
    """Take the steps in order until all targets hold; the trail. ``tune_rank.json`` is rewritten after each step.

    A step that fails stands in the trail, and the next one is taken.
    """
    tried: list[Tried] = []

    def until_met() -> Iterator[SweepRun]:
        for step in steps:
            if tried and tried[-1].met:
                return
            yield step.run

    def judge(row: Row) -> None:
        tried.append(_judged(steps[len(tried)], row, targets, start))
        write_json(ledger.directory / TUNE_FILE, _record(tried, targets, ledger))

    run_sweep(until_met(), ledger, start, judge)
    return tried


def _judged(step: Step, row: Row, targets: Sequence[Target], start: Start) -> Tried:
    if row.status != FINISHED:
        return Tried(step, row, (None,) * len(targets), math.inf)
    references = _references(step, targets, start)
    bounds = tuple(t.bound(references) for t in targets)
    missing = [t.shortfall(row.metrics.get(t.metric), b) for t, b in zip(targets, bounds, strict=True)]
    return Tried(step, row, bounds, sum(missing))


def _references(step: Step, targets: Sequence[Target], start: Start) -> Mapping[str, Mapping[str, float]]:
    """The scores of the models that targets compare with; both have this step's rank and modules."""
    named = {t.of for t in targets}
    found: dict[str, Mapping[str, float]] = {}
    if FINETUNED in named:
        found[FINETUNED] = read_run(Path(step.finetune.paths.output_dir)).summary
    if ORACLE in named:
        found[ORACLE] = read_run(oracle_logs(step.run.config, start).parent).summary
    return found


def nearest_step(tried: Sequence[Tried]) -> Tried | None:
    """The step that misses the targets by least (the missing shares, added up); ``None`` if none was scored."""
    scored = [t for t in tried if math.isfinite(t.shortfall)]
    return min(scored, key=lambda t: t.shortfall, default=None)


def overrides_of(tried: Tried) -> list[str]:
    """What to add to a fine-tuning's command line for this step."""
    return [f"{k}={v}" for k, v in tried.row.values.items()]


def _record(tried: Sequence[Tried], targets: Sequence[Target], ledger: Ledger) -> dict[str, object]:
    best = nearest_step(tried)
    return {
        "command": ledger.command,
        "targets": [str(t) for t in targets],
        "met": any(t.met for t in tried),
        "nearest": {"run": best.row.name, "overrides": overrides_of(best), "shortfall": best.shortfall}
        if best
        else None,
        "steps": [
            {
                **t.row.table(),
                "rank": t.step.rank,
                "modules": list(t.step.modules),
                "trainable_parameters": t.step.trainable_parameters,
                "bytes_per_round": t.step.bytes_per_round,
                "seconds_of_both_stages": t.seconds,
                "met": t.met,
                "bounds": {str(target): b for target, b in zip(targets, t.bounds, strict=True)},
                "metrics": dict(t.row.metrics),
            }
            for t in tried
        ],
    }
