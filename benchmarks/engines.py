"""The engines' own share of a round, side by side: what messages cost where clients do nothing. Needs Ray, and for
--network NVFlare.

python benchmarks/engines.py [--workers 3] [--megabytes 0 10 100] [--rounds 7] [--network] [--output engines.json]

A round has a client for each worker, which sends back the adapter that it gets; the server adds the updates up. Ray
workers are processes with no model. inprocess is a function call: what is left is the sum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from echo import rounds_of
from process import resident


class Echo:
    """A Ray worker that answers with what all clients are sent."""

    def __init__(self, opening: Any) -> None:
        del opening
        from unfed.federated.messages import Message

        self.told = Message({})

    def answer(self, message: Any, shared: Any) -> Any:
        """As an honest client would that has learnt nothing."""
        from unfed.app.errands import Done, done_message, read_errand
        from unfed.base.types import ClientUpdate

        errand = read_errand(message, shared)
        return done_message(Done(ClientUpdate(errand.client_id, errand.broadcast.adapter, 1)))


def _rounds(transport: Any, given: argparse.Namespace) -> list[dict[str, Any]]:
    names, idle = [f"client_{n}" for n in range(given.workers)], resident()
    return [rounds_of(transport, megabytes, names, given.rounds, idle=idle) for megabytes in given.megabytes]


def in_process(given: argparse.Namespace) -> list[dict[str, Any]]:
    """``engine=inprocess``."""
    from unfed.base.types import ClientUpdate
    from unfed.federated.transport import InProcess

    transport = InProcess(lambda _, broadcast, client: ClientUpdate(client, broadcast.adapter, 1))
    return _rounds(transport, given)


def over_ray(given: argparse.Namespace) -> list[dict[str, Any]]:
    """``engine=ray``."""
    from unfed.app.ray_fleet import Errands
    from unfed.federated.messages import Message
    from unfed.federated.pool import AHEAD, Dealt
    from unfed.federated.ray import Place, RayPool, connected

    client: Any = argparse.Namespace(on_step=None, curves={}, store=None)
    memory = int(3e6 * max(given.megabytes) * (given.workers + AHEAD))
    with connected(Place(given.workers, 0.0, memory=memory)):
        pool = RayPool(given.workers, 0.0, Echo, Message({}))
        try:
            transport = Dealt(pool, Errands(client), 600.0)
            transport.open()
            return _rounds(transport, given)
        finally:
            pool.close()


def over_nvflare(given: argparse.Namespace) -> list[dict[str, Any]]:
    """``engine=nvflare``, by the program beside this one."""
    script, sizes = Path(__file__).resolve().with_name("network.py"), map(str, given.megabytes)
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "found.json"
        shape = ["--sites", str(given.workers), "--rounds", str(given.rounds), "--megabytes", *sizes]
        subprocess.run([sys.executable, str(script), *shape, "--output", str(output)], check=True, capture_output=True)
        return json.loads(output.read_text(encoding="utf-8"))


def main() -> None:
    """Measure one engine after the other and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0, 10, 100])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--network", action="store_true", help="NVFlare as well (benchmarks/network.py)")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    engines: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
        "inprocess": in_process,
        "ray": over_ray,
    }
    if given.network:
        engines["nvflare"] = over_nvflare
    found = {}
    for name, measure in engines.items():
        found[name] = measure(given)
        for entry in found[name]:
            entry["median"] = statistics.median(entry["seconds"])
            grown = entry["peak_over_idle"] / 1e6
            told = f"{entry['median']:.3f} s a round, server's peak {grown:.0f} MB over idle"
            told += f", {entry['shared'] / 1e6:.0f} MB shared at the end"
            print(f"{name}, {entry['megabytes']:g} MB: {told}", flush=True)
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
