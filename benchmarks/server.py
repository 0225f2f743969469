"""What a round costs the server: 1,000 clients with an adapter of 10 MB each, as files on disk.

The adapters are those of SmolLM2-135M's shape with rank 8 on all linear layers, 420 tensors of float32. ``--distinct``
of them are written once and read over and over in place of as many as there are clients: the disk's cache serves them,
so that the figures are those of the server's own work, not of the disk.

Each side is a process of its own on the same files: ``read`` opens every update and looks at each of its values once;
``stream`` is a round of ``unfed`` (screening, running mean, aggregation error, the server's step); ``hold`` keeps all
updates and averages them when the last one is there, with as many as fit into ``--hold`` bytes. Peaks are the kernel's,
over what the process had when it held the broadcast adapter and was idle. On a machine with other work the processor's
seconds (one thread) say more than the clock's; both are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from process import peaks, reset_peak, resident
from setting import SHAPES, Shape, make_model, record

from unfed.aggregation.fedavg import FedAvg
from unfed.aggregation.registry import build_aggregator
from unfed.base.artifacts import read_tensors, write_tensors
from unfed.base.seeding import torch_generator
from unfed.base.types import AdapterState, Broadcast, ClientUpdate, ServerState
from unfed.federated.rounds import RoundsConfig, RunKeeper, run_rounds
from unfed.federated.schedule import FitTask, Phase, Schedule, Work
from unfed.models.adapter import snapshot
from unfed.objectives.nll import NLL

SIDES = ("read", "stream", "hold")
RANK = 8


def write_adapters(shape: Shape, directory: Path, count: int) -> list[Path]:
    """``count`` adapters near to each other, with both factors filled; the first one is what the server sends."""
    start = snapshot(make_model(shape, "cpu", RANK))
    files = [directory / f"adapter_{number}.safetensors" for number in range(count)]
    for number, file in enumerate(files):
        generator = torch_generator(0, "server", number)
        write_tensors(file, {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in start.items()})
    return files


class Files:
    """A transport whose clients have left their updates as files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def fit(self, task: FitTask, broadcast: Broadcast, client_ids: Sequence[str]) -> Iterator[ClientUpdate]:
        """One update for each client, read when it is asked for."""
        del task, broadcast
        for number, client in enumerate(client_ids):
            yield ClientUpdate(client, read_tensors(self._files[number % len(self._files)]), 10 + number % 7)


def stream(files: Sequence[Path], clients: int, start: AdapterState) -> None:
    """One round of FedAvg."""
    names = [f"client_{number:04d}" for number in range(clients)]
    schedule = Schedule((Phase("round", 1, {n: Work("train", NLL(), 1.0) for n in names}),))
    keep = RunKeeper()
    run_rounds(schedule, Files(files), build_aggregator("FedAvg", {}), ServerState(0, start), RoundsConfig(), keep)
    assert len(keep.records[0].clients) == clients


def read(files: Sequence[Path], clients: int, start: AdapterState) -> None:
    """Every update, opened and looked at once."""
    del start
    for number in range(clients):
        sum(float(t.sum()) for t in read_tensors(files[number % len(files)]).values())


def hold(files: Sequence[Path], clients: int, start: AdapterState) -> None:
    """All updates as copies in memory, averaged at the end by the same rule."""
    del start
    states = (read_tensors(files[number % len(files)]) for number in range(clients))
    held = [AdapterState({n: t.clone() for n, t in state.items()}) for state in states]
    FedAvg().combine((ClientUpdate(str(k), s, 10 + k % 7) for k, s in enumerate(held)), clients)


def one_side(side: str, files: Sequence[Path], clients: int) -> dict[str, float]:
    """Seconds and peak of one side, in this process."""
    torch.set_num_threads(1)
    start = AdapterState({n: t.clone() for n, t in read_tensors(files[0]).items()})
    work = {"read": read, "stream": stream, "hold": hold}[side]
    work(files, min(clients, 20), start)  # imports, allocator, disk cache
    reset_peak()
    idle, began, cpu = resident(), time.perf_counter(), time.process_time()
    work(files, clients, start)
    seconds, busy = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": seconds, "cpu": busy, "peak": peaks()["host"] - idle, "adapter": start.nbytes}


def measure(shape: Shape, clients: int, distinct: int, hold_bytes: int, repeats: int) -> dict[str, Any]:
    """All sides, in turn; of ``repeats`` the fastest of each, which other work on the machine has disturbed least."""
    with tempfile.TemporaryDirectory() as directory:
        files = write_adapters(shape, Path(directory), distinct)
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        held = max(1, min(clients, hold_bytes // files[0].stat().st_size))
        for _ in range(repeats):
            for side in SIDES:
                found[side].append(_in_process_of_its_own(side, files, held if side == "hold" else clients))
    best = {side: min(runs, key=lambda r: r["seconds"]) for side, runs in found.items()}
    adapter = best["read"]["adapter"]
    result: dict[str, Any] = {"clients": clients, "distinct_files": distinct, "adapter_bytes": adapter}
    for side in SIDES:
        result[f"{side}_seconds"] = [r["seconds"] for r in found[side]]
        result[f"{side}_cpu_seconds"] = [r["cpu"] for r in found[side]]
        result[f"{side}_peak_adapters"] = max(r["peak"] for r in found[side]) / adapter
    result["held_clients"] = held
    result["stream_over_read"] = best["stream"]["seconds"] / best["read"]["seconds"]
    result["stream_over_read_cpu"] = min(result["stream_cpu_seconds"]) / min(result["read_cpu_seconds"])
    result["hold_seconds_for_all"] = best["hold"]["seconds"] * clients / held
    return result


def _in_process_of_its_own(side: str, files: Sequence[Path], clients: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", side, str(clients), *map(str, files)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run all sides, or (``--one``) print a single one as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--distinct", type=int, default=8, help="files that stand for the updates of all clients")
    parser.add_argument("--hold", type=float, default=4e9, help="bytes that the side which holds all may take")
    parser.add_argument("--one", nargs="+", metavar="SIDE CLIENTS FILE", help="one side, in this process")
    given = parser.parse_args()
    if given.one:
        side, clients, *files = given.one
        print(json.dumps(one_side(side, [Path(f) for f in files], int(clients))))
    else:
        shape = SHAPES[given.shape]
        record("server", shape.name, measure(shape, given.clients, given.distinct, int(given.hold), given.repeats))


if __name__ == "__main__":
    main()
