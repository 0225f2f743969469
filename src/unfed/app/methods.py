"""The unlearning objective of a run, and whether it fits the run's model."""

from __future__ import annotations

from dataclasses import replace

from unfed.base.errors import ConfigError
from unfed.config.schema import RunConfig
from unfed.models.modules import check_scope
from unfed.models.shapes import adapted_shapes
from unfed.models.source import resolve_source
from unfed.objectives.base import Objective
from unfed.objectives.registry import build_objective
from unfed.objectives.rmu import RMU


def unlearning_objective(config: RunConfig) -> Objective:
    """The run's method with its hyperparameters; what it draws at random comes from the run's seed."""
    if config.method is None:
        raise ConfigError(["method: unlearning needs one (method=NPO, method=GradDiff, ...)"])
    objective = build_objective(config.method.name, config.method.params)
    return replace(objective, seed=config.seed) if isinstance(objective, RMU) else objective


def refuse_scope(config: RunConfig) -> None:
    """Raise ``ConfigError`` when the method names modules that the model lacks, as its shapes alone tell."""
    if config.mode != "unlearn" or config.method is None:
        return
    scope = unlearning_objective(config).needs.scope
    if scope is not None:
        args = config.model.model_args
        check_scope(adapted_shapes(args, resolve_source(args, config.model.tokenizer_args)), scope)
