"""Objectives by name, and the check of their hyperparameters before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from unfed.base import params as hyper
from unfed.base.errors import ConfigError, nearest
from unfed.objectives.base import Objective
from unfed.objectives.names import METHODS
from unfed.objectives.nll import NLL

OBJECTIVES: Mapping[str, type[Any]] = MappingProxyType(
    {"NLL": NLL}
    | {name: getattr(import_module(f"unfed.objectives.{module}"), name) for name, module in METHODS.items()}
)
UNLEARNING_METHODS: tuple[str, ...] = tuple(METHODS)
"""The objectives that unlearn; ``NLL`` is plain training."""


def objective_problems(name: str, params: Mapping[str, Any]) -> list[str]:
    """Everything wrong with an objective's name and hyperparameters (empty: it can be built)."""
    if name not in OBJECTIVES:
        return [f"unknown method {name!r}{nearest(name, OBJECTIVES)}"]
    return hyper.problems(OBJECTIVES[name], params, "method")


def build_objective(name: str, params: Mapping[str, Any]) -> Objective:
    """The objective ``name`` with ``params`` over its defaults; ``ConfigError`` lists every problem."""
    if found := objective_problems(name, params):
        raise ConfigError(found)
    return OBJECTIVES[name](**params)
