"""Robust rules and hostile clients, against the rest of a run."""

from __future__ import annotations

from collections.abc import Iterator

from unfed.config.schema import FEDERATED_TRAINERS, HostileConfig, RobustConfig, RunConfig

OWN_RULE = ("federaser", "fedosd", "task_arithmetic")
"""Recipes whose server does not average as the aggregator does."""


def robust_settings(config: RunConfig) -> Iterator[str]:
    """A robust rule has clients to compare, and as many as it needs."""
    given = config.robust
    if given is None:
        return
    key = f"robust={given.name}"
    if config.trainer is None or config.trainer.handler not in FEDERATED_TRAINERS:
        yield f"{key}: there are no clients whose updates could be compared; leave it out"
        return
    if given.max_norm_ratio is not None and not given.max_norm_ratio > 1:
        yield f"robust.max_norm_ratio={given.max_norm_ratio:g}: must be above 1, or null"
    if config.recipe is not None and config.recipe.name in OWN_RULE:
        yield f"{key}: recipe={config.recipe.name} has a server rule of its own, which averages otherwise; leave it out"
    if given.name != "screening" and "sums" in config.history.keep:
        yield (
            f"history=sums: {key} does not just add up the clients' mean updates, so no sum of a client's updates says "
            "what it contributed; use history=updates"
        )
    if given.name != "fltrust" and given.root is not None:
        yield f"robust.root={given.root}: belongs to robust=fltrust; leave it out"
    yield from _counts(config, given, key)
    if given.name == "fltrust":
        yield from _root(config, given)


def _counts(config: RunConfig, given: RobustConfig, key: str) -> Iterator[str]:
    assert config.trainer is not None
    args = config.trainer.method_args
    if config.mode != "finetune" or args.num_clients is None or not args.num_clients > 0 < args.fraction_fit <= 1:
        return
    if complaint := too_few(config, given, args.num_clients):
        yield f"{key}: {complaint} (trainer.method_args.num_clients={args.num_clients})"


def too_few(config: RunConfig, given: RobustConfig, clients: int) -> str | None:
    """Why the rule says nothing over as many updates as a round of ``clients`` wants at most, or ``None``."""
    from unfed.aggregation.robust_registry import robust_complaint

    assert config.trainer is not None
    args = config.trainer.method_args
    wanted = config.clients.number or round(args.fraction_fit * clients)
    return robust_complaint(given.name, given.params, max(min(args.min_clients, clients), min(wanted, clients), 1))


def _root(config: RunConfig, given: RobustConfig) -> Iterator[str]:
    if given.root is None and config.mode == "finetune":
        yield "robust.root: the server needs rows of its own; give a number of training rows that it keeps, or a file"
    elif isinstance(given.root, int) and given.root < 1:
        yield f"robust.root={given.root}: must be at least 1, or a file"
    if config.recipe is not None and config.recipe.name in ("interleaved", "isolated"):
        why = {
            "interleaved": "some clients unlearn while others train, and what unlearns points away from the server",
            "isolated": "shards are to see no rows but their own",
        }[config.recipe.name]
        yield f"robust=fltrust: with recipe={config.recipe.name} {why}; take another rule"


def hostile_settings(config: RunConfig) -> Iterator[str]:
    """Hostile clients are some of a federated run's."""
    given = config.hostile
    if given is None:
        return
    if config.trainer is None or config.trainer.handler not in FEDERATED_TRAINERS:
        yield f"hostile={given.name}: there are no clients; leave it out"
        return
    yield from _attack(config, given)
    if given.count < 1:
        yield f"hostile.count={given.count}: must be at least 1"
    clients = config.trainer.method_args.num_clients
    if clients is not None and max(given.count, len(given.clients)) >= clients:
        yield f"hostile: {max(given.count, len(given.clients))} of {clients} clients; one at least is honest"


def _attack(config: RunConfig, given: HostileConfig) -> Iterator[str]:
    if given.name != "label_flip":
        if given.factor is not None and not given.factor > 0:
            yield f"hostile.factor={given.factor:g}: must be above 0"
        return
    if given.factor is not None:
        yield f"hostile.factor={given.factor:g}: hostile=label_flip changes rows, and scales nothing; leave it out"
    split = config.data.train if config.mode == "finetune" else config.data.retain
    if split is not None and split.question_key is None:
        yield "hostile=label_flip: plain text has no answers that could be exchanged; take another attack"
