"""Wrappers by name, and whether one fits around an objective, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from unfed.base import params as hyper
from unfed.base.errors import ConfigError, nearest
from unfed.objectives.base import Objective
from unfed.objectives.ewc import EWC
from unfed.objectives.gru import GRU
from unfed.objectives.sam import SAM
from unfed.objectives.wrapper import Wrapper

WRAPPERS: Mapping[str, type[Wrapper]] = MappingProxyType({cls.__name__: cls for cls in (SAM, GRU, EWC)})


def wrapper_problems(name: str, params: Mapping[str, Any]) -> list[str]:
    """Everything wrong with a wrapper's name and hyperparameters."""
    if name not in WRAPPERS:
        return [f"unknown wrapper {name!r}{nearest(name, WRAPPERS)}"]
    return hyper.problems(WRAPPERS[name], params, "wrapper")


def misfits(name: str, inner: Objective) -> list[str]:
    """Why the wrapper ``name`` cannot go around ``inner``."""
    missing = sorted(WRAPPERS[name].splits - inner.needs.splits)
    if not missing:
        return []
    way = "take a method with one (method=GradDiff), and method.alpha above 0"
    return [f"wrapper={name}: needs a {missing[0]} term, and method={inner.name} has none here; {way}"]


def build_wrapper(name: str, params: Mapping[str, Any], inner: Objective) -> Wrapper:
    """The wrapper ``name`` around ``inner``; ``ConfigError`` lists every problem."""
    if found := wrapper_problems(name, params) or misfits(name, inner):
        raise ConfigError(found)
    return WRAPPERS[name](inner, **params)
