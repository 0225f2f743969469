"""Isolated shards in a run: which rows they train on, how their rounds run, and the one adapter that is served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from peft import PeftModel

from unfed.aggregation.base import Aggregator
from unfed.app.progress import say
from unfed.base.errors import UnfedError
from unfed.base.types import AdapterState, ServerState
from unfed.federated.client import ClientData
from unfed.federated.history import private_dir
from unfed.federated.rounds import run_rounds
from unfed.federated.shards import Shard, ShardStore, ShardWork, run_shards
from unfed.models.load import LoadedModel
from unfed.models.stack import concatenate, residual_model, stacked_model
from unfed.training.loop import Local
from unfed.unlearning.base import Plan, Situation


def limited(
    plan: Plan, situation: Situation, clients: Mapping[str, ClientData], start: AdapterState
) -> dict[str, ClientData]:
    """The clients with the rows that their shards train on: what was forgotten before is no part of them.

    Raises ``AdapterError`` for an adapter that cannot be stacked, and ``UnfedError`` where a shard that is to be
    trained again began with another adapter than this run would.
    """
    if plan.isolation is None:
        return dict(clients)
    concatenate([(1.0, start)])
    if situation.source is not None:
        before = ShardStore(situation.source.adapter)
        if any(before.start(s) != start.digest() for s in plan.isolation.again):
            raise UnfedError(
                f"recipe=isolated: the shards in {situation.source.adapter} began with another adapter than this run "
                "would (another base model, or another release of PEFT or torch), so training one again would not be "
                "the same training; fine-tune again with recipe=isolated"
            )
    rows = {c: set(ids) for s in plan.isolation.again for c, ids in s.rows.items()}
    return {
        c: replace(d, splits={**d.splits, "train": [e for e in d.splits["train"] if e.example_id in rows.get(c, ())]})
        for c, d in clients.items()
    }


def runner(plan: Plan, start: AdapterState, directory: Path) -> Callable[..., ServerState]:
    """What runs the plan's rounds, with the arguments of :func:`unfed.federated.rounds.run_rounds` but the schedule."""
    if plan.isolation is None:
        return partial(run_rounds, plan.schedule)
    private_dir(directory / "checkpoints")  # a checkpoint here is an adapter of a few clients, as a shard is
    return partial(run_shards, ShardWork(plan.schedule, plan.isolation.again, start, ShardStore(directory)))


def joined(
    plan: Plan, rule: Aggregator, situation: Situation, directory: Path, opened: tuple[LoadedModel, Local]
) -> tuple[LoadedModel, Local, AdapterState]:
    """The model with the stack of all shards, a loop on it, and the stack; the shards lie in ``directory`` then."""
    loaded, local = opened
    assert plan.isolation is not None
    assert isinstance(loaded.model, PeftModel)
    store = ShardStore(directory)
    if situation.source is not None:
        before = ShardStore(situation.source.adapter)
        for shard in plan.isolation.kept:
            store.put(shard, before.adapter(shard), before.start(shard))
        say(f"the shards as they were are still in {before.root}: delete them when the data must go")
    shards = sorted((*plan.isolation.again, *plan.isolation.kept), key=lambda s: s.index)
    weights = _weights(shards, rule)
    stack = concatenate([(w, store.adapter(s)) for s, w in zip(shards, weights, strict=True)])
    store.finish(list(zip(shards, weights, strict=True)), stack)
    say(f"shards: {len(shards)} served as one adapter of {stack.nbytes / 1e6:.2f} MB, kept in {store.root}")
    model = stacked_model(loaded.model, stack, len(shards))
    loop = Local(model, local.args, local.collation, local.seed)
    return replace(loaded, model=model), loop, stack


def with_residual(loaded: LoadedModel, local: Local, state: ServerState) -> tuple[LoadedModel, Local, AdapterState]:
    """Model, loop and adapter with what lies beneath the adapter made a part of it (exact aggregation)."""
    assert isinstance(loaded.model, PeftModel)
    assert state.base_residual is not None
    model, one = residual_model(loaded.model, state.adapter, state.base_residual)
    say(f"saved as one adapter of {one.nbytes / 1e6:.2f} MB: what exact aggregation keeps beneath it is a part of it")
    return replace(loaded, model=model), Local(model, local.args, local.collation, local.seed), one


def _weights(shards: list[Shard], rule: Aggregator) -> list[float]:
    """Shares that add up to 1, from the server's weight of each client."""
    found = [s.weight(rule.weight) for s in shards]
    return [w / sum(found) for w in found]
