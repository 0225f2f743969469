"""Hyperparameters as dataclass fields that know their own limits.

``objectives``, ``aggregation`` and ``unlearning`` declare their hyperparameters with :func:`number`, :func:`whole`,
:func:`choice`, :func:`flag` and :func:`pattern`; the border to the configuration asks :func:`problems` before anything
is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Protocol

from unfed.base.errors import ConfigError, nearest

_KEY = "hyperparameter"
STRICT: dict[str, Any] = {"extra": "forbid"}
"""``__pydantic_config__`` of a dataclass that the configuration fills: names it does not know are refused."""


class Rule(Protocol):
    """What a value of a hyperparameter must be."""

    def complaint(self, value: object) -> str | None:
        """Why ``value`` is refused, or ``None``."""
        ...


@dataclass(frozen=True)
class NumberRule:
    """A finite number within open (``above``, ``below``) or closed (``at_least``, ``at_most``) limits; ``whole``: an
    integer."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    whole: bool = False
    at_most: float | None = None

    def complaint(self, value: object) -> str | None:
        """Why ``value`` is refused, or ``None``."""
        limits = [
            f"{words} {limit:g}"
            for words, limit in (
                ("above", self.above),
                ("at least", self.at_least),
                ("below", self.below),
                ("at most", self.at_most),
            )
            if limit is not None
        ]
        kind = "a whole number" if self.whole else "a number"
        wanted = " ".join([f"must be {kind}", " and ".join(limits)]).strip()
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return f"{wanted}, not {value!r}"
        if self.whole and not isinstance(value, int):
            return f"{wanted}, not {value!r}"
        inside = (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )
        return None if inside else f"{wanted}, not {value!r}"


@dataclass(frozen=True)
class ChoiceRule:
    """One of a few values."""

    choices: tuple[str | None, ...]

    def complaint(self, value: object) -> str | None:
        """Why ``value`` is refused, or ``None``."""
        if (value is None or isinstance(value, str)) and value in self.choices:
            return None
        return f"unknown value {value!r}{nearest(str(value), [str(c) for c in self.choices])}"


@dataclass(frozen=True)
class PatternRule:
    """A regular expression; with ``several``, one or more of them (a text, or a list of texts)."""

    several: bool = False

    def complaint(self, value: object) -> str | None:
        """Why ``value`` is refused, or ``None``."""
        given = value if self.several and isinstance(value, list | tuple) else [value]
        if not given or not all(isinstance(v, str) and v for v in given):
            return f"must be {'regular expressions' if self.several else 'a regular expression'}, not {value!r}"
        for pattern in given:
            try:
                re.compile(str(pattern))
            except re.error as e:
                return f"{pattern!r} is not a regular expression: {e}"
        return None


@dataclass(frozen=True)
class FlagRule:
    """True or false."""

    def complaint(self, value: object) -> str | None:
        """Why ``value`` is refused, or ``None``."""
        return None if isinstance(value, bool) else f"must be true or false, not {value!r}"


@dataclass(frozen=True)
class OptionalRule:
    """``None``, or what ``rule`` allows."""

    rule: Rule

    def complaint(self, value: object) -> str | None:
        """Why ``value`` is refused, or ``None``."""
        found = None if value is None else self.rule.complaint(value)
        return found and found.replace(", not ", " or null, not ", 1)


def optional(rule: Rule) -> OptionalRule:
    """A rule that allows ``None`` as well."""
    return OptionalRule(rule)


def governed(default: Any, rule: Rule) -> Any:
    """A dataclass field for a hyperparameter with a rule of its own."""
    return field(default=default, metadata={_KEY: rule})


def number(
    default: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A dataclass field for a numeric hyperparameter."""
    return governed(default, NumberRule(above, at_least, below, at_most=at_most))


def whole(default: int, *, at_least: int | None = None) -> Any:
    """A dataclass field for a hyperparameter that counts something."""
    return governed(default, NumberRule(at_least=at_least, whole=True))


def flag(default: bool) -> Any:
    """A dataclass field for a hyperparameter that is true or false."""
    return governed(default, FlagRule())


def choice(default: str | None, choices: tuple[str | None, ...]) -> Any:
    """A dataclass field for a hyperparameter that is one of a few names."""
    return governed(default, ChoiceRule(choices))


def pattern(default: str) -> Any:
    """A dataclass field for a regular expression."""
    return governed(default, PatternRule())


def patterns(default: tuple[str, ...]) -> Any:
    """A dataclass field for one or more regular expressions; whoever declares it makes a tuple of what is given."""
    return governed(default, PatternRule(several=True))


def hyperparameters(cls: type) -> dict[str, Any]:
    """Names of the hyperparameters of a dataclass and their defaults (fields of other kinds are left out)."""
    return {f.name: f.default for f in fields(cls) if _KEY in f.metadata and f.default is not MISSING}


def problems(cls: type, params: Mapping[str, Any], prefix: str, family: Mapping[str, type] | None = None) -> list[str]:
    """Everything wrong with ``params`` as hyperparameters of ``cls``; keys are reported as ``prefix.key``.
    ``family``: what could have been chosen as ``prefix=name``, for whoever has chosen another one."""
    rules = {f.name: f.metadata[_KEY] for f in fields(cls) if _KEY in f.metadata}
    found = []
    for key, value in params.items():
        if key not in rules:
            owners = [f"{prefix}={name}" for name, other in (family or {}).items() if key in hyperparameters(other)]
            hint = f"; {', '.join(owners[:3])} would" if owners else nearest(key, rules) or "; it has none"
            found.append(f"{prefix}.{key}: {cls.__name__} has no such hyperparameter{hint}")
        elif (complaint := rules[key].complaint(value)) is not None:
            found.append(f"{prefix}.{key}: {complaint}")
    return found


@dataclass(frozen=True)
class Hyperparameters:
    """Base of a dataclass that refuses hyperparameters out of their limits, however it is made."""

    @property
    def name(self) -> str:
        """The published name: that of the class."""
        return type(self).__name__

    def settings(self) -> dict[str, Any]:
        """Hyperparameters by name, with the defaults filled in."""
        return {name: getattr(self, name) for name in hyperparameters(type(self))}

    def __post_init__(self) -> None:
        if found := problems(type(self), self.settings(), type(self).__name__):
            raise ConfigError(found)
