"""Settings of recipes, and of what a training keeps for them, against the rest."""

from __future__ import annotations

from collections.abc import Iterator

from unfed.base.errors import nearest
from unfed.config.schema import FEDERATED_TRAINERS, RECIPES, WIRES, RunConfig


def recipe_settings(config: RunConfig) -> Iterator[str]:
    """A federated run's recipe and history."""
    trainer = config.trainer
    if trainer is None or trainer.handler not in FEDERATED_TRAINERS:
        return
    given = trainer.method_args.schedule
    if config.mode == "unlearn" and config.recipe is None:
        yield f"recipe: federated unlearning needs one{nearest('', RECIPES)}"
    elif config.recipe is not None and given not in {None, config.recipe.name}:
        yield f"trainer.method_args.schedule={given} contradicts recipe={config.recipe.name}"
    if config.recipe is not None and config.recipe.name == "isolated":
        yield from _isolated(config)
    if config.recipe is not None and config.recipe.name == "fedosd" and trainer.args.get("fp16"):
        yield (
            "trainer.args.fp16: recipe=fedosd has a client send one gradient a round, and fp16's loss scaling leaves "
            "out a step that overflows, as the first ones do; use trainer.args.bf16=true"
        )
    if config.history.every < 1:
        yield f"history.every={config.history.every}: must be at least 1"


def in_one_place(config: RunConfig, handler: str) -> Iterator[str]:
    """What has no meaning where one trainer owns every row."""
    if config.recipe is not None and config.recipe.name != RECIPES[0]:
        yield f"recipe={config.recipe.name}: trainer={handler} works in one place; leave it out"
    if config.wire is not None and config.wire.name != WIRES[0]:
        yield f"wire={config.wire.name}: trainer={handler} works in one place and sends nothing; leave it out"
    if config.history.keep:
        yield f"history: trainer={handler} works in one place, there are no clients' updates to keep"


def _isolated(config: RunConfig) -> Iterator[str]:
    args, key = config.model.model_args, "recipe=isolated"
    if config.history.keep:
        yield f"history.keep={','.join(config.history.keep)}: {key} keeps its shards, and no rounds; use history=none"
    if config.mode != "finetune":
        return
    if not args.use_lora:
        yield f"{key}: shards are served as one LoRA adapter; set model.model_args.use_lora=true"
    lora, prefix = args.lora_config, "model.model_args.lora_config"
    if lora is not None and lora.bias != "none":
        yield f"{prefix}.bias={lora.bias}: {key} puts LoRA factors side by side, which biases have not; use none"
    if lora is not None and lora.modules_to_save:
        yield f"{prefix}.modules_to_save: {key} puts LoRA factors side by side, which whole modules have not"
