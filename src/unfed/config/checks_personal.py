"""Settings of adapters that clients keep for themselves, and of rules whose server holds no whole adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator

from unfed.config.schema import FEDERATED_TRAINERS, RunConfig

ORDINARY_RECIPES = ("local_then_recover", "interleaved", "retrain")
"""Recipes in which clients do nothing but train, and the server nothing but the aggregator's rule."""


def personal_settings(config: RunConfig) -> Iterator[str]:
    """What does not go with ``personalise`` or with the adapter rule."""
    yield from _personalise(config)
    yield from _not_whole(config)


def _personalise(config: RunConfig) -> Iterator[str]:
    epochs = config.personalise.epochs
    key = f"personalise.epochs={epochs:g}"
    if not 0 <= epochs < math.inf:
        yield f"{key}: must be 0 (none) or above, and finite"
    elif epochs == 0:
        return
    elif config.mode == "eval" or config.trainer is None:
        yield f"{key}: belongs to a training, this run has mode={config.mode}"
    elif config.trainer.handler not in FEDERATED_TRAINERS:
        yield f"{key}: trainer={config.trainer.handler} works in one place, without clients; leave it out"
    elif not config.model.model_args.use_lora:
        yield (
            f"{key}: every client would keep a whole model of its own (model.model_args.use_lora=false); take a -lora "
            "model file, or leave it out"
        )


def _not_whole(config: RunConfig) -> Iterator[str]:
    """A rule whose server holds no ordinary adapter while rounds run does not go with what reckons with one."""
    name = config.aggregator.params.get("adapter") if config.aggregator is not None else None
    if name is None or config.mode == "eval":
        return
    from unfed.aggregation.adapters.registry import ADAPTER_RULES

    rule = ADAPTER_RULES[name]
    if rule.whole_at_server:
        return
    key = f"aggregator.adapter={name}"
    if not config.model.model_args.use_lora:
        yield f"{key}: is about LoRA factors, and model.model_args.use_lora=false trains all parameters"
    if config.history.keep:
        yield (
            f"history.keep={','.join(config.history.keep)}: {key}: {rule.why_not_whole}; leave history out "
            "(recipe=retrain needs none), or use aggregator.adapter=fedit"
        )
    recipe = config.recipe.name if config.recipe is not None else ORDINARY_RECIPES[0]
    if recipe not in ORDINARY_RECIPES:
        yield (
            f"recipe={recipe}: works on whole adapters at the server, and with {key} {rule.why_not_whole}; use "
            f"recipe={', '.join(ORDINARY_RECIPES)}, or aggregator.adapter=fedit"
        )
