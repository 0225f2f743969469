"""Settings of ``privacy=`` against the rest: what a kind of privacy would not hold for is refused, with the way out."""

from __future__ import annotations

from collections.abc import Iterator

from unfed.config.schema import FEDERATED_TRAINERS, RunConfig
from unfed.objectives.names import BY_EXAMPLE

CENTRAL_RECIPES = ("interleaved", "retrain", "rollback")
"""Recipes in which every round's updates go through the server's rule, where the noise is."""
EXAMPLE_RECIPES = ("local_then_recover", *CENTRAL_RECIPES)
"""Recipes in which clients do nothing but train by the local loop."""


def privacy_settings(config: RunConfig) -> Iterator[str]:
    """What does not go with the kind of privacy that is asked for."""
    if config.privacy is None:
        return
    name, key = config.privacy.name, f"privacy={config.privacy.name}"
    if config.mode == "eval" or config.trainer is None:
        yield f"{key}: is about training, and mode={config.mode} trains nothing; leave it out"
        return
    if name != "example" and config.trainer.handler not in FEDERATED_TRAINERS:
        yield f"{key}: trainer={config.trainer.handler} has no clients to protect; use privacy=example"
        return
    if config.mode == "finetune" and config.recipe is not None and name != "local":
        yield f"{key}: recipe={config.recipe.name} trains shards that are joined without it; use privacy=local"
    yield from {"central": _central, "local": _local, "example": _example}[name](config, key)


def _recipe(config: RunConfig, key: str, known: tuple[str, ...]) -> Iterator[str]:
    recipe = config.recipe.name if config.recipe is not None else None
    if config.mode == "unlearn" and recipe is not None and recipe not in known:
        yield f"{key}: recipe={recipe} does more with clients' work than {key} covers; use recipe={', '.join(known)}"


def _central(config: RunConfig, key: str) -> Iterator[str]:
    from unfed.aggregation.privacy import CentralPrivacy

    assert config.privacy is not None
    yield from _recipe(config, key, CENTRAL_RECIPES)
    rule = config.aggregator
    if rule is not None and rule.params.get("weighting", "examples") != "uniform":
        yield f"{key}: bounds each client's part by giving all the same weight; set aggregator.weighting=uniform"
    if (robust := config.robust) is not None:
        yield f"robust={robust.name}: is no sum of the clients' updates, whose noise {key} reckons with; leave one out"
    if lost := sorted({"updates", "sums"} & set(config.history.keep)):
        yield f"history.keep={','.join(lost)}: keeps clients' updates without {key}'s noise; use history=none or rounds"
    settings = CentralPrivacy(**config.privacy.params)
    if settings.adaptive and settings.bit_noise is not None and 2 * settings.bit_noise <= settings.noise_multiplier:
        yield (
            f"privacy.bit_noise={settings.bit_noise:g}: must be above {settings.noise_multiplier / 2:g}, half of "
            "privacy.noise_multiplier: the noisy count alone would cost more than both may"
        )


def _local(config: RunConfig, key: str) -> Iterator[str]:
    del config, key
    yield from ()


def _example(config: RunConfig, key: str) -> Iterator[str]:
    args, lora = config.model.model_args, config.model.model_args.lora_config
    prefix = "model.model_args"
    if not args.use_lora:
        yield f"{key}: clips the gradients of LoRA factors example by example; set {prefix}.use_lora=true"
    elif lora is not None and lora.bias != "none":
        yield f"{prefix}.lora_config.bias={lora.bias}: {key} clips gradients of LoRA factors alone; use none"
    elif lora is not None and lora.modules_to_save:
        yield f"{prefix}.lora_config.modules_to_save: {key} clips gradients of LoRA factors alone; leave it out"
    assert config.trainer is not None
    if config.trainer.args.get("fp16"):
        yield f"trainer.args.fp16: {key} clips gradients, which fp16's loss scaling changes; use trainer.args.bf16=true"
    if config.wrapper is not None:
        yield f"wrapper={config.wrapper.name}: makes no gradient of single examples, which {key} clips; leave it out"
    if config.aggregator is not None and config.aggregator.name == "FedProx":
        yield f"aggregator=FedProx: adds a penalty on the weights, which is no sum over examples ({key}); use FedAvg"
    yield from _recipe(config, key, EXAMPLE_RECIPES)
    if config.mode == "unlearn" and config.method is not None and _uses_method(config):
        yield from _method(config, key)


def _uses_method(config: RunConfig) -> bool:
    from unfed.unlearning.registry import RECIPES

    return config.recipe is None or RECIPES[config.recipe.name].demands.method


def _method(config: RunConfig, key: str) -> Iterator[str]:
    from unfed.objectives.registry import build_objective

    assert config.method is not None
    name = config.method.name
    if name not in BY_EXAMPLE:
        yield f"method={name}: its loss is no sum over examples, which {key} needs; use method={', '.join(BY_EXAMPLE)}"
    elif "retain" in build_objective(name, config.method.params).needs.splits:
        yield f"method={name}: {key} takes a step's examples from one split; set method.alpha=0 (recovery retains)"
