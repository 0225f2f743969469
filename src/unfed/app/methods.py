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
from unfed.objectives.wrappers import build_wrapper


def unlearning_objective(config: RunConfig) -> Objective:
    """The run's method in its wrapper, with their hyperparameters; what they draw comes from the run's seed."""
    if config.method is None:
        raise ConfigError(["method: unlearning needs one (method=NPO, method=GradDiff, ...)"])
    objective = build_objective(config.method.name, config.method.params)
    if isinstance(objective, RMU):
        objective = replace(objective, seed=config.seed)
    if config.wrapper is None:
        return objective
    return build_wrapper(config.wrapper.name, config.wrapper.params, objective)


def refuse_scope(config: RunConfig) -> None:
    """Raise ``ConfigError`` when the method names modules that the model lacks, as its shapes alone tell."""
    if config.mode != "unlearn" or config.method is None:
        return
    scope = unlearning_objective(config).needs.scope
    if scope is not None:
        args = config.model.model_args
        check_scope(adapted_shapes(args, resolve_source(args, config.model.tokenizer_args)), scope)
