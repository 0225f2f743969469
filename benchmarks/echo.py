"""A round whose clients send back what they get: what is left is an engine's own share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from process import peaks, reset_peak, resident


def rounds_of(
    transport: Any,
    megabytes: float,
    clients: Sequence[str],
    rounds: int,
    *,
    idle: int,
    begins: Callable[[int], Any] = lambda _: None,
) -> dict[str, Any]:
    """Seconds of each of ``rounds`` rounds (one more comes first and does not count), in which an adapter of so many
    MB goes out and the updates are added up, the server's peak over what it had with no adapter, ``idle`` bytes, and
    the memory at the end that it shares with other processes. ``begins``: called before each."""
    import torch

    from unfed.aggregation.tree import RunningMean
    from unfed.base.types import AdapterState, Broadcast, ClientUpdate
    from unfed.federated.schedule import FitTask, Phase, Work
    from unfed.objectives.nll import NLL

    task = FitTask(Phase("echo", 1, {c: Work("train", NLL(), 1.0) for c in clients}), 0, 0)
    adapter = AdapterState({f"x{n:03d}": torch.randn(max(1, int(megabytes * 1e6 / 4 / 100))) for n in range(100)})
    seconds = []
    reset_peak()
    for number in range(rounds + 1):
        begins(number)
        began, mean = time.perf_counter(), RunningMean()
        for answer in transport.fit(task, Broadcast(adapter), clients):
            assert isinstance(answer, ClientUpdate), answer
            mean.add(answer.adapter, 1.0)
            del answer  # as the rounds do: it would stay in memory beside the next one
        mean.result()
        seconds.append(time.perf_counter() - began)
    return {
        "megabytes": megabytes,
        "seconds": seconds[1:],
        "peak_over_idle": peaks()["host"] - idle,
        "shared": resident("RssShmem"),
    }
