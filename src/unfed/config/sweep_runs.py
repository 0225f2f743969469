"""The runs of a sweep, composed and checked before the first one starts: one stage, or a fine-tuning before each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from unfed.base.errors import ConfigError, UnfedError, nearest
from unfed.config.compat import resolve
from unfed.config.preflight import preflight
from unfed.config.schema import RunConfig
from unfed.config.sweep import Sweep, Values, run_name

PATH = "model.model_args.pretrained_model_name_or_path"


@dataclass(frozen=True)
class SweepRun:
    """One run: its name says the swept values. ``finetune`` makes the adapter that it starts from."""

    name: str
    values: Values
    config: RunConfig
    finetune: RunConfig | None = None


@dataclass(frozen=True)
class FineTuning:
    """The first of two stages: its overrides, and those of the swept keys that it takes as well."""

    overrides: tuple[str, ...]
    keys: tuple[str, ...]
    primary: str = "train-lora.yaml"


@dataclass(frozen=True)
class Composer:
    """Makes the runs of a sweep. ``directory`` is the sweep's own; fine-tunings lie in its ``finetune``."""

    directory: Path
    sweep: Sweep
    primary: str
    finetune: FineTuning | None = None
    _composed: dict[str, tuple[RunConfig | None, list[str]]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        stages = self.finetune
        unknown = [k for k in stages.keys if k not in self.sweep.space] if stages else []
        if unknown:
            raise ConfigError([f"--finetune-keys {k}: it is not swept{nearest(k, self.sweep.space)}" for k in unknown])
        if stages and any(o.lstrip("+").startswith(f"{PATH}=") for o in self.sweep.fixed):
            raise ConfigError([f"{PATH}: --finetune makes the adapter that each run starts from; leave it out"])

    def run(self, values: Values) -> SweepRun:
        """The run with these values, checked as far as that goes before anything is trained.

        Raises ``ConfigError`` with all problems of both stages.
        """
        name = run_name(values)
        problems: list[str] = []
        first = self._finetuning(values, problems) if self.finetune else None
        start = [] if first is None else [f"{PATH}={_quoted(first.paths.output_dir)}"]
        config = self._resolved(
            [*self.sweep.fixed, *self._given(values), *start], self.directory / name, self.primary, problems
        )
        if config is not None:
            problems += [p for p in preflight(_before(config, first)) if p not in problems]
        if config is None or problems:
            raise ConfigError(problems)
        return SweepRun(name, values, config, first)

    def _finetuning(self, values: Values, problems: list[str]) -> RunConfig | None:
        """The fine-tuning that belongs to a run; composed once for all runs that share it."""
        assert self.finetune is not None
        used = {k: v for k, v in values.items() if k in self.finetune.keys}
        name = run_name(used) if used else "all"
        if name not in self._composed:
            mine: list[str] = []
            overrides = [*self.finetune.overrides, *self._given(used)]
            config = self._resolved(overrides, self.directory / "finetune" / name, self.finetune.primary, mine)
            if config is not None and config.mode != "finetune":
                mine.append(f"mode={config.mode}: not a fine-tuning")
            mine += [p for p in preflight(config) if p not in mine] if config is not None else []
            self._composed[name] = (config, [f"--finetune: {p}" for p in mine])
        config, mine = self._composed[name]
        problems += mine
        return config

    def _given(self, values: Values) -> list[str]:
        return [f"{self.sweep.written[k]}={v}" for k, v in values.items()]

    @staticmethod
    def _resolved(overrides: list[str], place: Path, primary: str, problems: list[str]) -> RunConfig | None:
        own = [f"task_name={_quoted(place.name)}", f"paths.output_dir={_quoted(str(place))}"]
        try:
            return resolve([*overrides, *own], primary)
        except ConfigError as e:
            problems += e.problems
            return None


def _quoted(text: str) -> str:
    """A text as a value of Hydra's grammar, which reads ``=`` and ``,`` as its own."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _before(config: RunConfig, first: RunConfig | None) -> RunConfig:
    """For looking at files before there is an adapter: the model that it will be trained on stands for it."""
    if first is None:
        return config
    named = first.model.model_args
    args = replace(
        config.model.model_args, pretrained_model_name_or_path=named.pretrained_model_name_or_path,
        lora_model_path=named.lora_model_path,
    )  # fmt: skip
    return replace(config, model=replace(config.model, model_args=args))


def checked(composer: Composer, combinations: Iterable[Values]) -> list[SweepRun]:
    """Every run, or ``ConfigError`` with every mistake in any of them, each said once."""
    runs: list[SweepRun] = []
    wrong: dict[str, list[str]] = {}
    total = 0
    names: set[str] = set()
    for values in combinations:
        total += 1
        if (name := run_name(values)) in names:
            wrong.setdefault("two runs would have the same directory: give their values otherwise", []).append(name)
        names.add(name)
        try:
            runs.append(composer.run(values))
        except ConfigError as e:
            for problem in e.problems:
                wrong.setdefault(problem, []).append(run_name(values))
        except UnfedError as e:
            wrong.setdefault(str(e), []).append(run_name(values))
    if wrong:
        raise ConfigError([_where(p, names, total) for p, names in wrong.items()])
    return runs


def _where(problem: str, names: Sequence[str], total: int) -> str:
    if len(names) == total:
        return problem
    return f"{problem} (in {len(names)} of {total} runs, as in {names[0]})"
