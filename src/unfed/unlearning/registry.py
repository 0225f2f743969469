"""Recipes by name, and the check of their hyperparameters before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from unfed.base import params as hyper
from unfed.base.errors import ConfigError, nearest
from unfed.unlearning.base import Recipe
from unfed.unlearning.distill import DistillRecipe
from unfed.unlearning.federaser import FedEraser
from unfed.unlearning.fedosd import FedOSD
from unfed.unlearning.interleaved import Interleaved
from unfed.unlearning.isolated import Isolated
from unfed.unlearning.local_then_recover import LocalThenRecover
from unfed.unlearning.not_lora import NotLora
from unfed.unlearning.pga import PGA
from unfed.unlearning.retrain import Retrain, Rollback
from unfed.unlearning.subtract import Subtract
from unfed.unlearning.task_arithmetic import TaskArithmetic
from unfed.unlearning.unlearning_adapter import UnlearningAdapter

RECIPES: Mapping[str, type[Recipe]] = MappingProxyType(
    {
        cls.title: cls
        for cls in (
            LocalThenRecover,
            Interleaved,
            Retrain,
            Rollback,
            FedEraser,
            PGA,
            FedOSD,
            Subtract,
            DistillRecipe,
            Isolated,
            UnlearningAdapter,
            TaskArithmetic,
            NotLora,
        )
    }
)


def recipe_problems(name: str, params: Mapping[str, Any]) -> list[str]:
    """Everything wrong with a recipe's name and hyperparameters (empty: it can be built)."""
    if name not in RECIPES:
        return [f"unknown recipe {name!r}{nearest(name, RECIPES)}"]
    return hyper.problems(RECIPES[name], params, "recipe")


def build_recipe(name: str, params: Mapping[str, Any]) -> Recipe:
    """The recipe ``name`` with ``params`` over its defaults; ``ConfigError`` lists every problem."""
    if found := recipe_problems(name, params):
        raise ConfigError(found)
    return RECIPES[name](**params)
