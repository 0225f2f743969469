"""The adapter rule and the clients' ranks against the rest of the configuration."""

from __future__ import annotations

from collections.abc import Iterator

from unfed.config.schema import FEDERATED_TRAINERS, RunConfig

KEY = "partition.ranks"


def shown(ranks: tuple[int, ...] | int) -> str:
    """The setting as a user writes it."""
    return f"{KEY}={ranks}" if isinstance(ranks, int) else f"{KEY}=[{','.join(map(str, ranks))}]"


def ranks_and_rules(config: RunConfig) -> Iterator[str]:
    """What is wrong with ``partition.ranks`` and ``aggregator.adapter``, as far as nothing on disk says."""
    trainer, aggregator, ranks = config.trainer, config.aggregator, config.partition.ranks
    if trainer is None:
        return
    name = aggregator.params.get("adapter") if aggregator is not None else None
    if name not in (None, "fedit") and not config.model.model_args.use_lora:
        yield f"aggregator.adapter={name}: works on LoRA factors; set model.model_args.use_lora=true, or adapter=fedit"
    if name == "hetlora" and config.privacy is not None and _gamma(config) < 1:
        yield (
            f"aggregator.adapter=hetlora: what rank a client gives up follows from its rows, which privacy="
            f"{config.privacy.name} does not cover; set aggregator.adapter_args={{gamma: 1}}"
        )
    if ranks is None:
        return
    if trainer.handler not in FEDERATED_TRAINERS:
        yield f"{shown(ranks)}: trainer={trainer.handler} works in one place, without clients; leave it out"
        return
    if not config.model.model_args.use_lora:
        yield f"{shown(ranks)}: ranks are those of LoRA; set model.model_args.use_lora=true, or leave it out"
    every = (ranks,) if isinstance(ranks, int) else ranks
    if not every or min(every) < 1:
        yield f"{shown(ranks)}: must be a rank of at least 1, or one for each client"
    elif (clients := trainer.method_args.num_clients) and (problem := count_problem(config, clients)):
        yield problem


def _gamma(config: RunConfig) -> float:
    from unfed.aggregation.adapters.hetlora import HetLoRA

    assert config.aggregator is not None
    given = config.aggregator.params.get("adapter_args") or {}
    return float(given.get("gamma", HetLoRA().gamma))


def count_problem(config: RunConfig, clients: int) -> str | None:
    """Why there are not as many ranks as ``clients``, or ``None``."""
    ranks = config.partition.ranks
    if ranks is None or isinstance(ranks, int) or len(ranks) == clients:
        return None
    counts = f"{len(ranks)} rank{'s' * (len(ranks) != 1)} for {clients} client{'s' * (clients != 1)}"
    return f"{shown(ranks)}: {counts}; give one for each, in their order, or one number for all"


def lora_settings(config: RunConfig) -> Iterator[str]:
    """Values of ``lora_config`` that make no adapter."""
    lora, prefix = config.model.model_args.lora_config, "model.model_args.lora_config"
    if lora is None:
        return
    if lora.r < 1:
        yield f"{prefix}.r={lora.r}: must be at least 1"
    if lora.lora_alpha <= 0:
        yield f"{prefix}.lora_alpha={lora.lora_alpha}: must be above 0"
    if not 0 <= lora.lora_dropout < 1:
        yield f"{prefix}.lora_dropout={lora.lora_dropout}: must be at least 0 and below 1"
    if not lora.target_modules:
        yield f"{prefix}.target_modules: names no module"
