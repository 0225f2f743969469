"""Settings of an engine, and what cannot be done where the clients' rows are on other machines (``nvflare``). Workers
(``ray``) do all that one process does."""

from __future__ import annotations

import math
from collections.abc import Iterator

from unfed.config.schema import FEDERATED_TRAINERS, EngineConfig, RunConfig

OF = {
    ("workers", "gpus_per_worker", "threads", "address"): ("ray",),
    ("ping", "misses", "rate"): ("nvflare",),
    ("timeout", "same_versions"): ("ray", "nvflare"),
}
"""Settings, and whose they are."""
LONGEST = 1e9
"""Seconds that can be waited for: the clocks of systems and libraries end soon after."""
MOST = 1024
"""Workers, and threads of each. More threads than a machine can start end a process without a word."""
SMALLEST_PART = 1e-4
"""Of a GPU: Ray's own unit."""
NOT_OVER_A_NETWORK = {
    "isolated": "its shards are trained on rows that it picks, and are served from one place",
    "distill": "it looks for retain rows near the forget rows, which would have to leave their sites",
    "unlearning_adapter": "its clients train on top of a second adapter, which is not sent yet",
    "task_arithmetic": "its clients train on top of a second adapter, which is not sent yet",
}
"""Recipes, and why not."""


def engine_settings(config: RunConfig) -> Iterator[str]:
    """Numbers out of their limits, settings of another engine; for ``nvflare``, what needs the rows at the server."""
    engine = config.engine
    if engine.keep_checkpoints < 1:
        yield f"engine.keep_checkpoints={engine.keep_checkpoints}: must be at least 1"
    if engine.keep_every is not None and engine.keep_every < 1:
        yield f"engine.keep_every={engine.keep_every}: must be at least 1, or null for none but the last"
    for key in ("timeout", "ping"):
        value = getattr(engine, key)
        if not 0 < value <= LONGEST:
            yield f"engine.{key}={value:g}: must be above 0, and at most {LONGEST:g}"
    if not 1 <= engine.rate < math.inf:
        yield f"engine.rate={engine.rate:g}: must be at least 1, and finite"
    if engine.misses < 1:
        yield f"engine.misses={engine.misses}: must be at least 1"
    yield from _of_others(config)
    yield from _workers(config)
    if engine.name == "nvflare":
        yield from _network(config)


def _of_others(config: RunConfig) -> Iterator[str]:
    """Settings that this run's engine does not look at."""
    engine, default = config.engine, EngineConfig()
    for names, whose in OF.items():
        for name in names if engine.name not in whose else ():
            if (value := getattr(engine, name)) != getattr(default, name):
                shown = f"{value:g}" if isinstance(value, float) else value
                engines = " and ".join(f"engine={w}" for w in whose)
                yield f"engine.{name}={shown}: is a setting of {engines}, and this run has engine={engine.name}"


def _workers(config: RunConfig) -> Iterator[str]:
    engine, key = config.engine, "engine=ray"
    if engine.name != "ray":
        return
    for name in ("workers", "threads"):
        if (value := getattr(engine, name)) is not None and not 1 <= value <= MOST:
            yield f"engine.{name}={value}: must be at least 1, and at most {MOST}"
    gpus = engine.gpus_per_worker
    if gpus is not None and gpus != 0 and not (SMALLEST_PART <= gpus <= 1 or (1 < gpus < math.inf and gpus % 1 == 0)):
        yield f"engine.gpus_per_worker={gpus:g}: must be 0, between {SMALLEST_PART:g} and 1, or a whole number"
    if (address := engine.address) is not None and address != "auto" and not _host_and_port(address):
        yield (
            f"engine.address={address}: must be auto, or HOST:PORT of a Ray cluster whose machine this is part of (Ray "
            "Client's ray:// is not supported); leave it out to start one here"
        )
    if config.mode == "eval" or config.trainer is None or config.trainer.handler not in FEDERATED_TRAINERS:
        yield f"{key}: deals clients to workers; evaluate, and train in one place, with engine=inprocess"


def _host_and_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and "://" not in address and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16


def _network(config: RunConfig) -> Iterator[str]:
    key, way = "engine=nvflare", "leave it out, or use engine=inprocess where all rows are in one place"
    if config.mode == "eval" or config.trainer is None or config.trainer.handler not in FEDERATED_TRAINERS:
        yield f"{key}: trains across sites; evaluate, and train in one place, with engine=inprocess"
        return
    if not config.model.model_args.use_lora:
        yield f"model.model_args.use_lora=false: over a network adapters travel, not whole models ({key})"
    if config.recipe is not None and config.recipe.name in NOT_OVER_A_NETWORK:
        why = NOT_OVER_A_NETWORK[config.recipe.name]
        yield f"recipe={config.recipe.name}: not with {key}: {why}; use recipe=local_then_recover or recipe=retrain"
    yield from _rules(config, key, way)
    if config.oracle is not None:
        yield f"oracle={config.oracle}: with {key} the oracle is a run of its own; {way}"
    for name in ("idk", "alternate", "exclude"):
        if getattr(config.data, name) is not None:
            yield f"data.{name}: is read where the rows are, and {key} has them at the sites; {way}"
    for name in ("authors", "topics"):
        if getattr(config.forget, name):
            yield f"forget.{name}: {key} has no rows to look in; a request travels as forget.ids or forget.clients"
    if config.mode == "finetune" and config.partition.manifest is not None:
        yield f"partition.manifest: with {key} each site owns what it has; leave it out"


def _rules(config: RunConfig, key: str, way: str) -> Iterator[str]:
    """Server rules that work with rows, or with what stays at a client."""
    rule = config.aggregator.params.get("adapter") if config.aggregator is not None else None
    if rule in ("fedsa", "fed_sb"):
        yield f"aggregator.adapter={rule}: not with {key} yet: it begins, or ends, with what is at the clients; {way}"
    if config.robust is not None and config.robust.name == "fltrust":
        yield f"robust=fltrust: needs rows at the server, and {key} has none there; take another rule"
    if config.hostile is not None:
        yield f"hostile={config.hostile.name}: is for studies in one process; {way}"
