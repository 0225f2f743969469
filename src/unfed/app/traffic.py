"""What a run will send, from the shapes of its adapter alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from unfed.aggregation.adapters.exact import FedEx, FLoRA
from unfed.aggregation.adapters.fed_sb import FedSB, core_name
from unfed.aggregation.lora import lora_pairs
from unfed.aggregation.registry import build_aggregator
from unfed.app.ranks import client_ranks
from unfed.app.wire import wire_of
from unfed.base.types import AdapterState, ServerState
from unfed.config.schema import RunConfig


@dataclass(frozen=True)
class Traffic:
    """Bytes over a run in which every client takes part in every round: to the server, and to the clients. Headers of
    messages and scales of ``int8`` are not in it."""

    up: float
    down: float


def traffic(
    config: RunConfig, shapes: Mapping[str, torch.Size], dtype: torch.dtype, clients: Sequence[str], rounds: int
) -> Traffic:
    """What travels of an adapter whose tensors have these ``shapes``, by the run's adapter rule and its wire.

    What lies beneath the adapter (FLoRA, FedEx-LoRA) is counted at its greatest rank: every round before has added one
    adapter's for each client (FedEx-LoRA, whose parts add up to 0: for each but one), and no more than the matrix has.
    Raises what :func:`unfed.app.ranks.client_ranks` raises.
    """
    given = config.aggregator
    name, params = (given.name, given.params) if given is not None else ("FedAvg", {})
    rule = build_aggregator(name, params, ranks=client_ranks(config, clients)).adapters
    one = torch.zeros((), dtype=dtype)  # behind every tensor: shapes and bytes are asked for, and nothing is computed
    adapter = {n: one.expand(shape) for n, shape in shapes.items()}
    pairs = lora_pairs(AdapterState(adapter))
    if isinstance(rule, FedSB):
        adapter |= {core_name(m): one.expand(shapes[a][0], shapes[a][0]) for m, (a, _) in pairs.items()}
    wire, state = wire_of(config), AdapterState(adapter)
    width_up = dtype.itemsize if wire.as_it_is else wire.up_bytes
    width_down = dtype.itemsize if wire.down == "float32" else torch.bfloat16.itemsize
    up = down = 0.0
    for number in range(rounds):
        sent = rule.broadcast(ServerState(number, state), clients)
        control = state.without(sent.frozen).nbytes if name == "Scaffold" else 0
        added = len(clients) * isinstance(rule, FLoRA) + (len(clients) - 1) * isinstance(rule, FedEx)
        beneath = _beneath(state, pairs, number * added)
        for client in clients:
            start = sent.start(client).without(sent.local | sent.known)
            up += sent.returned(client).numel * width_up + control
            down += (start.numel + beneath) * width_down + control
    return Traffic(up, down)


def _beneath(state: AdapterState, pairs: Mapping[str, tuple[str, str]], updates: int) -> int:
    """Values of a residual made of so many updates."""
    total = 0
    for a, b in pairs.values():
        rank, wide, tall = state[a].shape[0], state[a][0].numel(), state[b].shape[0]
        total += min(updates * rank, wide, tall) * (wide + tall)
    return total
