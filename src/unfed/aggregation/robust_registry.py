"""Robust rules by name, and the check of their hyperparameters before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from unfed.aggregation.adapters.base import Scaling
from unfed.aggregation.robust import FLTrust, Krum, MultiKrum, NormClipping, RobustRule
from unfed.aggregation.robust_entries import Median, TrimmedMean
from unfed.base import params as hyper
from unfed.base.errors import ConfigError, nearest

ROBUST_RULES: Mapping[str, type[RobustRule]] = MappingProxyType(
    {cls.title: cls for cls in (Median, TrimmedMean, Krum, MultiKrum, NormClipping, FLTrust)}
)

SCREENING = "screening"
"""``robust=screening``: no rule, for what can be set beside one."""


def robust_problems(name: str, params: Mapping[str, Any]) -> list[str]:
    """Everything wrong with a rule's name and hyperparameters."""
    if name == SCREENING:
        return [
            f"robust.{key}: robust=screening has no rule; choose one of {', '.join(ROBUST_RULES)}" for key in params
        ]
    if name not in ROBUST_RULES:
        return [f"unknown robust rule {name!r}{nearest(name, ROBUST_RULES)}"]
    return hyper.problems(ROBUST_RULES[name], params, "robust", ROBUST_RULES)


def robust_complaint(name: str, params: Mapping[str, Any], count: int) -> str | None:
    """Why the rule would refuse a round of ``count`` clients, or ``None``."""
    return None if name == SCREENING else ROBUST_RULES[name](**params).complaint(count)


def build_robust(name: str, params: Mapping[str, Any], *, scaling: Scaling = 1.0, seed: int = 0) -> RobustRule:
    """The rule ``name`` with ``params`` over its defaults; ``ConfigError`` lists every problem.

    ``scaling``: alpha/r by module, or one number; ``seed``: of the randomised decomposition.
    """
    if found := robust_problems(name, params):
        raise ConfigError(found)
    return ROBUST_RULES[name](**params, scaling=scaling, seed=seed)
