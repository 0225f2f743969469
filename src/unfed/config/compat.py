"""The command line before Hydra sees it: composed once to find every mistake, and rewritten where users' habits differ.

Rewritten are ``trainer.method_args.aggregation_strategy=X`` (to ``aggregator=X``), ``unlearn_trainer_cls=X`` (to
``method=X``) and ``schedule=X`` (to ``recipe=X``), a group set to ``null`` (to ``~group``; ``eval`` to
``eval.enabled=false``), and settings that the composed files do not mention (to ``++key=value``; whether the key exists
is for ``config.load`` to say, with the nearest name).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unfed.base.errors import ConfigError, nearest
from unfed.config import load, shape
from unfed.config.preflight import preflight
from unfed.config.schema import RunConfig

ALIASES: Mapping[str, str] = {
    "trainer.method_args.aggregation_strategy": "aggregator",
    "trainer.method_args.unlearn_trainer_cls": "method",
    "trainer.method_args.schedule": "recipe",
}
SETTINGS_CHECKED_OF_A_SWEEP = 16


@dataclass(frozen=True)
class CommandLine:
    """A Hydra command line taken apart. ``flags`` are its tokens that are not overrides, in order."""

    args: argparse.Namespace
    flags: tuple[str, ...]
    overrides: tuple[str, ...]
    directory: Path
    primary: str

    @property
    def sweeps(self) -> bool:
        """Whether Hydra will start several runs."""
        return bool(self.args.multirun) or any(
            o.replace(" ", "").upper() == "HYDRA.MODE=MULTIRUN" for o in self.overrides
        )

    @property
    def argv(self) -> list[str]:
        """The command line again."""
        return [*self.flags, *self.overrides]


def settle(argv: Sequence[str], config_name: str) -> list[str]:
    """Check a command line, as far as that goes without loading anything, and rewrite it for Hydra.

    ``config_name`` is the primary configuration unless ``argv`` names one. Nothing is written. Raises
    ``ConfigError`` with all problems found.
    """
    line = take_apart(argv, config_name)
    if line.args.hydra_help or line.args.info or line.args.shell_completion:
        return list(argv)
    line, cfgs = _composed(line)
    if not (line.args.cfg or line.args.help):
        for cfg in cfgs:
            _examined(cfg, files=True)
    return line.argv


def resolve(argv: Sequence[str], config_name: str, *, files: bool = False) -> RunConfig:
    """The run that a command line describes, without starting it. ``files``: look at what it names on disk, too."""
    _, cfgs = _composed(take_apart(argv, config_name))
    if len(cfgs) != 1:
        raise ConfigError(["one run can be shown, not a sweep"])
    return _examined(cfgs[0], files=files)


def _examined(cfg: DictConfig, *, files: bool) -> RunConfig:
    config, problems = load.examine(cfg)
    if config is not None and files:
        problems += [p for p in preflight(config) if p not in problems]
    if config is None or problems:
        raise ConfigError(problems)
    return config


def take_apart(argv: Sequence[str], config_name: str) -> CommandLine:
    """Split flags from overrides, as Hydra's own parser does (but in any order)."""
    args = get_args_parser().parse_intermixed_args(list(argv))
    overrides = tuple(args.overrides)
    flags = tuple(token for token in argv if token not in overrides)
    directory = load.config_dir()
    if args.config_path is not None:
        directory = Path(args.config_path).resolve()
        flags = (*_without(flags, ("--config-path", "-cp")), f"--config-path={directory}")
    primary = (args.config_name or config_name).removesuffix(".yaml")
    for folder in filter(None, (str(directory), args.config_dir)):
        if not Path(folder).is_dir():
            raise ConfigError([f"there is no configuration directory {folder}"])
    if not any((d / f"{primary}.yaml").is_file() for d in _roots(directory, args)):
        there = [p.stem for p in directory.glob("*.yaml")]
        raise ConfigError([f"--config-name={args.config_name or config_name}: no such file{nearest(primary, there)}"])
    return CommandLine(args, flags, overrides, directory, primary)


def _without(tokens: Sequence[str], names: tuple[str, ...]) -> Iterator[str]:
    skip = False
    for token in tokens:
        if not skip and not token.startswith(f"{names[0]}="):
            if token in names:
                skip = True
                continue
            yield token
        skip = False


def _roots(directory: Path, args: argparse.Namespace) -> list[Path]:
    return [directory, *([Path(args.config_dir).resolve()] if args.config_dir else [])]


def _composed(line: CommandLine) -> tuple[CommandLine, list[DictConfig]]:
    """Compose each run of the command line, after rewriting it."""
    with initialize_config_dir(config_dir=str(line.directory), version_base="1.3", job_name="unfed"):
        named = _named_groups(line)
        line = replace(line, overrides=tuple(_rewrite(line)))
        cfgs = [_compose(line, run) for run in _runs(line)]
        more = [o for alias, group in ALIASES.items() for o in _from_files(cfgs[0], alias, group, line, group in named)]
        if more:
            line = replace(line, overrides=(*line.overrides, *more))
            cfgs = [_compose(line, run) for run in _runs(line)]
    return line, cfgs


def _named_groups(line: CommandLine) -> set[str]:
    """Which of method, aggregator and recipe the command line names, in either way."""
    keys = {o.split("=", 1)[0].lstrip("+~") for o in line.overrides}
    return {group for alias, group in ALIASES.items() if group in keys or alias in keys}


def _rewrite(line: CommandLine) -> list[str]:
    """The overrides in Hydra's own terms; ``ConfigError`` for all that cannot be parsed or name no file."""
    problems: list[str] = []
    parsed: list[Override] = []
    for text in line.overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except (OverrideParseException, HydraException) as e:
            problems.append(f"{text}: cannot be read as key=value ({str(e).splitlines()[0]})")
    groups = _groups(line)
    given = {o.key_or_group: _text(o) for o in parsed}
    rewritten = []
    for o in parsed:
        alias = ALIASES.get(o.key_or_group)
        if alias is not None and o.type != OverrideType.DEL:
            if given.get(alias, _text(o)) != _text(o):
                problems.append(f"{o.input_line} and {alias}={given[alias]} contradict each other: name one")
            elif alias not in given and _text(o) != "null":
                rewritten.append(f"{alias}={_text(o)}")
                problems += _unknown_choice(o, alias, groups[alias])
        elif o.key_or_group in groups and o.type == OverrideType.CHANGE:
            rewritten.append(_switched_off(o.key_or_group) if _text(o) == "null" else o.input_line or "")
            problems += _unknown_choice(o, o.key_or_group, groups[o.key_or_group])
        else:
            rewritten.append(_forced(o))
    if problems:
        raise ConfigError(problems)
    return rewritten


def _switched_off(group: str) -> str:
    # An experiment's own eval settings would stay behind ~eval and make an evaluation of the defaults.
    return "++eval.enabled=false" if group == "eval" else f"~{group}"


def _text(override: Override) -> str:
    """The value as it was typed."""
    return (override.input_line or "").partition("=")[2]


def _forced(override: Override) -> str:
    line, key = override.input_line or "", override.key_or_group
    plain = override.type == OverrideType.CHANGE and override.package is None
    return f"++{line}" if plain and "." in key and "/" not in key and not key.startswith("hydra.") else line


def _groups(line: CommandLine) -> dict[str, list[str]]:
    """Every group and its choices (``unlearn/tofu/default`` for nested ones), from the files."""
    found: dict[str, list[str]] = {}
    for root in _roots(line.directory, line.args):
        for folder in (p for p in root.rglob("*") if p.is_dir()):
            choices = [str(f.relative_to(folder).with_suffix("")) for f in sorted(folder.rglob("*.yaml"))]
            found.setdefault(str(folder.relative_to(root)), []).extend(choices)
    return found


CALLED = {
    "aggregator": "aggregation strategy", "method": "unlearning method", "robust": "robust rule", "hostile": "attack",
    "privacy": "kind of privacy", "wire": "wire format", "lora": "preset",
}  # fmt: skip
"""What a choice of a group is called, where the group's own name is not the word."""


def _unknown_choice(override: Override, group: str, choices: Sequence[str]) -> list[str]:
    """Complaints about values that are no file of the group."""
    if override.is_sweep_override():
        values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
    else:
        values = [_text(override)]
    names = [v.strip("'\"") for v in values]
    what = CALLED.get(group, group)
    return [
        f"{override.key_or_group}={n}: no such {what}{nearest(n, choices)}"
        for n in names
        if n != "null" and not n.startswith("[") and n.removesuffix(".yaml") not in choices
    ]


def _runs(line: CommandLine) -> list[list[str]]:
    """The overrides of each run: one, or those of a sweep (its first few; the others are checked when they start)."""
    if not line.sweeps:
        return [list(line.overrides)]
    kept = [o for o in line.overrides if not o.replace(" ", "").lower().startswith("hydra.mode=")]
    parsed = [OverridesParser.create().parse_override(o) for o in kept]
    if any(o.is_sweep_override() and not o.is_discrete_sweep() for o in parsed):
        kept = [text for text, o in zip(kept, parsed, strict=True) if not o.is_sweep_override()]
        return [kept]
    fixed = [text for text, o in zip(kept, parsed, strict=True) if not o.is_sweep_override()]
    swept = BasicSweeper.split_arguments([o for o in parsed if o.is_sweep_override()], None)[0]
    return [[*fixed, *combination] for combination in swept[:SETTINGS_CHECKED_OF_A_SWEEP]]


def _compose(line: CommandLine, overrides: Sequence[str]) -> DictConfig:
    extra = [f"hydra.searchpath=[file://{Path(line.args.config_dir).resolve()}]"] if line.args.config_dir else []
    try:
        return compose(line.primary, [*extra, *overrides])
    except (HydraException, OmegaConfBaseException, ValueError) as e:
        raise ConfigError([_explain(e, line)]) from e


def _explain(error: Exception, line: CommandLine) -> str:
    """One sentence about what Hydra could not compose."""
    text = str(error).strip()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.partition("/")
        return f"{group}={name}: no such file (in {line.directory}){nearest(name, _groups(line).get(group, ()))}"
    if match := re.match(r"Could not override '([^']+)'", text):
        known = shape.top_level() | load.CONVENIENCES | {g for g in _groups(line) if "/" not in g}
        return f"{match[1]}: no such setting{nearest(match[1], known)}"
    if match := re.match(r"Ambiguous value for argument '([^']+)'", text):
        key, _, value = match[1].partition("=")
        return f"{match[1]}: write {key}=[{value}] for a list, or add --multirun for one run each"
    return " ".join(text.split())


def _from_files(cfg: DictConfig, alias: str, group: str, line: CommandLine, named: bool) -> list[str]:
    """Overrides for a strategy or method that an experiment's file names in ``trainer.method_args``.

    When the command line names one it wins over the file.
    """
    given = OmegaConf.to_container(cfg, resolve=False)
    for part in alias.split("."):
        given = given.get(part) if isinstance(given, dict) else None
    if not isinstance(given, str) or "${" in given or given == OmegaConf.select(cfg, f"{group}.name"):
        return []
    if named:
        return [f"++{alias}=${{{group}.name}}"]
    choices = _groups(line)[group]
    if given not in choices:
        raise ConfigError([f"{alias}={given}: no such {group}{nearest(given, choices)}"])
    return [f"{group}={given}"]
