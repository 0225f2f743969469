"""A command line with swept keys, in Hydra's own grammar: what is swept, and the combinations.

``a=1,2``, ``a=choice(1,2)`` and ``a=range(1,5)`` make a grid; ``a=interval(1e-5,1e-3)``, also as
``tag(log,interval(...))`` or ``int(interval(...))``, can only be searched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from unfed.base.artifacts import digest_json
from unfed.base.errors import ConfigError
from unfed.config.compat import take_apart

OWN = ("task_name", "paths.output_dir")
"""Keys that the sweep sets for each run."""

LONGEST_NAME = 120
_PLAIN = re.compile(r"[\w.-]+|\[[\w.,-]+\]")
"""Values that no other value is written like in a directory's name."""
Values = Mapping[str, str]
"""Swept key -> value, both as they are typed (keys without ``+``)."""


@dataclass(frozen=True)
class Choice:
    """A key's values, as they are typed."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Span:
    """Numbers from ``low`` to ``high``, both included; ``step``: only those so far apart from ``low``."""

    low: float
    high: float
    integer: bool = False
    log: bool = False
    step: float | None = None


Space = Mapping[str, Choice | Span]


@dataclass(frozen=True)
class Sweep:
    """A command line taken apart. ``fixed``: what all runs share; ``written``: swept key -> with its ``+``."""

    fixed: tuple[str, ...]
    space: Space
    grid: tuple[Values, ...]
    written: Values


def read_sweep(argv: Sequence[str], config_name: str, *, searched: bool = False) -> Sweep:
    """Take a command line apart. ``searched``: whether intervals may stand in it.

    ``grid`` holds every combination of the values that can be counted, the last key changing fastest. Raises
    ``ConfigError`` with all problems.
    """
    line = take_apart(argv, config_name)
    problems: list[str] = []
    parsed = [o for text in line.overrides if (o := _parsed(text, problems)) is not None]
    swept = [o for o in parsed if o.is_sweep_override()]
    space = {_key(o): found for o in swept if (found := _values(o, problems, searched=searched)) is not None}
    taken = [o for o in parsed if _key(o) in OWN and o not in swept]
    problems += [f"{o.input_line}: each run of a sweep has its own; --name names the sweep" for o in taken]
    problems += [f"{_key(o)}: each run of a sweep has its own" for o in swept if _key(o) in OWN]
    problems += [f"{k}: swept twice" for k in space if sum(_key(o) == k for o in swept) > 1]
    if not swept:
        problems.append("nothing is swept: give a key several values, as in method=NPO,GradDiff or seed=range(0,3)")
    if problems:
        raise ConfigError(problems)
    fixed = [o.input_line or "" for o in parsed if not o.is_sweep_override()]
    counted = [o for o in swept if isinstance(space[_key(o)], Choice)]
    combinations = BasicSweeper.split_arguments(counted, None)[0] if counted else []
    grid = [{k.lstrip("+~"): v for k, _, v in (text.partition("=") for text in c)} for c in combinations]
    unique = tuple({tuple(values.items()): values for values in grid}.values())
    return Sweep((*line.flags, *fixed), space, unique, {_key(o): o.get_key_element() for o in swept})


def _parsed(text: str, problems: list[str]) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as e:
        problems.append(f"{text}: cannot be read as key=value ({str(e).splitlines()[0]})")
        return None


def _key(override: Override) -> str:
    return override.get_key_element().lstrip("+~")


def _values(override: Override, problems: list[str], *, searched: bool) -> Choice | Span | None:
    value = override.value()
    if isinstance(value, IntervalSweep):
        if searched:
            return _span(override, problems)
        problems.append(f"{override.input_line}: an interval has no end of values; search it with --optuna N")
        return None
    if searched and isinstance(value, RangeSweep) and not value.shuffle:
        return _range(override)
    try:
        return Choice(tuple(override.sweep_string_iterator()))
    except HydraException as e:
        problems.append(f"{override.input_line}: {str(e).splitlines()[0]}; list the values")
        return None


def _span(override: Override, problems: list[str]) -> Span | None:
    value = override.value()
    assert isinstance(value, IntervalSweep)
    low, high, log = value.start, value.end, "log" in value.tags
    if low is None or high is None or low >= high or (log and low <= 0):
        problems.append(f"{override.input_line}: an interval goes from a lower to a higher number (above 0 for log)")
        return None
    return Span(float(low), float(high), isinstance(low, int) and isinstance(high, int), log)


def _range(override: Override) -> Choice | Span:
    """A range keeps its order for a search; Hydra's own end is not included."""
    texts = tuple(override.sweep_string_iterator())
    if len(texts) < 2:
        return Choice(texts)
    numbers = [float(t) for t in texts]
    integer = all(re.fullmatch(r"-?\d+", t) for t in texts)
    return Span(min(numbers), max(numbers), integer, step=abs(numbers[1] - numbers[0]))


def run_name(values: Values) -> str:
    """A directory's name that says the values: ``method-NPO_r-8_seed-0``, ``target_modules-q_proj+v_proj``.

    A key's last word stands for it where no other swept key has the same. What a directory's name should not hold is
    replaced, and a digest added where that, or cutting a long name, could make two names the same.
    """
    parts = [f"{short}-{_worded(v)}" for short, v in zip(short_keys(values), values.values(), strict=True)]
    plain = "_".join(parts)
    name = re.sub(r"[^\w.+-]", "-", plain)
    if len(name) <= LONGEST_NAME and all(_PLAIN.fullmatch(v) for v in values.values()) and name == plain:
        return name
    return f"{name[:LONGEST_NAME]}-{digest_json(dict(values)).rpartition(':')[2][:8]}"


def short_keys(values: Iterable[str]) -> list[str]:
    """Each key's last word, or the whole key where another one ends in the same word."""
    keys = list(values)
    last = [k.rpartition(".")[2] for k in keys]
    return [k if last.count(short) > 1 else short for k, short in zip(keys, last, strict=True)]


def _worded(value: str) -> str:
    """A list as its parts: ``[q,v]`` is ``q+v`` and ``[q]`` is ``q+``, which no plain value is."""
    if not (value.startswith("[") and value.endswith("]")):
        return value
    parts = value[1:-1].split(",")
    return "+".join(parts) if len(parts) > 1 else f"{parts[0]}+"


def corners(space: Space) -> list[Values]:
    """Combinations in which every choice and both ends of every span stand once: what a search can check beforehand."""
    ends = {
        k: list(s.values) if isinstance(s, Choice) else [number(s.low, s), number(s.high, s)] for k, s in space.items()
    }
    longest = max((len(v) for v in ends.values()), default=0)
    return [{k: v[min(n, len(v) - 1)] for k, v in ends.items()} for n in range(longest)]


def number(value: float, span: Span) -> str:
    """A number of a span as it is typed: four digits are enough where any number is allowed."""
    if span.integer:
        return str(round(value))
    short = f"{value:.4g}"
    return short if span.step is None and span.low <= float(short) <= span.high else repr(float(value))
