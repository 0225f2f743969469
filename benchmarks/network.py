"""A network's own share of a round: what messages cost, and what the server's memory grows by. Needs NVFlare.

python benchmarks/network.py [--sites 3] [--megabytes 0 10 100] [--rounds 5] [--output network.json]

A server and its sites run on this machine over mutual TLS, in processes of their own. The sites send back what they
get, through the pipe of their child process, so a round's seconds are all the network's. The server adds updates up.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent))
FLOORS = {10.0: 0.5}
"""Seconds that a round may take at most, by megabytes each way, with three sites on two cores that do nothing else."""
MOST_MEMORY = 500
"""MB that the server may grow by at most, whatever the size."""
CLASSES = ("network.EchoServer", "network.EchoSite")


def spent(place: Path) -> float:
    """CPU seconds so far of all processes that run kits below ``place``, and of their children."""
    ticks: dict[int, int] = {}
    parents: dict[int, int] = {}
    ours = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line, stat = (entry / "cmdline").read_bytes(), (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(entry.name)
        ticks[pid], parents[pid] = int(stat[11]) + int(stat[12]), int(stat[1])
        if str(place).encode() in line:
            ours.add(pid)
    return sum(n for pid, n in ticks.items() if pid in ours or parents[pid] in ours) / os.sysconf("SC_CLK_TCK")


def run(sizes: list[float], rounds: int, place: Path) -> list[dict[str, Any]]:
    """Inside ``@collab.main``: seconds of each round (the first one apart), CPU seconds of a round at all parties, and
    the peak over idle, by size."""
    from echo import rounds_of
    from process import resident

    from unfed.federated.messages import broadcast_message
    from unfed.federated.nvflare import CollabLink
    from unfed.federated.remote import Patience, Remote

    link = CollabLink(Patience())
    head = {"do": "fit", "num_examples": 1, "metrics": {}, "nbytes": None}
    remote = Remote(link, lambda _, broadcast, client: broadcast_message(head, broadcast, client), Patience())
    found, cpu, idle = [], [0.0], resident()

    def begins(number: int) -> None:
        if number == 1:
            cpu.append(spent(place))

    for megabytes in sizes:
        entry = rounds_of(remote, megabytes, link.sites(), rounds, idle=idle, begins=begins)
        found.append({**entry, "cpu": (spent(place) - cpu[-1]) / rounds})
    return found


def echo() -> None:
    """A site's child process: it answers with what it is asked."""
    from unfed.federated.child import serve

    serve(lambda message: message)


def main() -> None:
    """Provision, start, submit, wait, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0, 10, 100])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = _measured(Path(place), given)
    for entry in found:
        entry["median"] = statistics.median(entry["seconds"])
        grown = entry["peak_over_idle"] / 1e6
        floor = FLOORS.get(entry["megabytes"])
        against = f" (floor {floor:g})" if floor is not None else ""
        print(
            f"{entry['megabytes']:g} MB: {entry['median']:.3f} s a round{against}, "
            f"{entry['cpu']:.2f} s of CPU at all parties, server's peak {grown:.0f} MB over idle (floor {MOST_MEMORY})"
        )
    load = os.getloadavg()[0]
    print(f"load {load:.1f} on {os.cpu_count()} cores at the end")
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _measured(place: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    from unfed.app.network import Project, provision, start_command
    from unfed.app.nvflare_app import session

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sites = tuple(f"site-{n}" for n in range(1, given.sites + 1))
    kits = provision(Project("bench", "localhost", sites, port), place / "network")
    started, environment = [], {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    try:
        for party in ("localhost", *sites):
            _allow(kits / party, place)
            command = start_command(kits / party)
            with (place / f"{party}.log").open("wb") as log:
                process = subprocess.Popen(
                    command, cwd=kits / party, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            started.append(process)
        admin = kits / "admin@example.org"
        _wait_for(admin, set(sites))
        result = place / "found.json"
        _job(place / "job", sites, {"sizes": list(given.megabytes), "rounds": given.rounds, "result": str(result)})
        with session(admin) as opened:
            job = opened.submit_job(str(place / "job"))
            while not str(status := opened.get_job_status(job)).startswith("FINISHED"):
                time.sleep(1)
        if not result.is_file():
            raise SystemExit(f"the job ended with {status}: {(place / 'localhost.log').read_text()[-3000:]}")
        return json.loads(result.read_text(encoding="utf-8"))
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _allow(kit: Path, place: Path) -> None:
    """The benchmark's classes, which a real network does not permit."""
    file = kit / "local" / "resources.json"
    resources = json.loads(file.read_text(encoding="utf-8"))
    resources["class_allow_list"] += list(CLASSES)
    file.write_text(json.dumps(resources), encoding="utf-8")
    own = f"outputs: {place}\n"
    if kit.name != "localhost":
        own = f"data_dir: {place}\nbase_model: {place}\ndatasets: [none]\nlargest_payload: 4000\n"
    (kit / "local" / "unfed.yml").write_text(own, encoding="utf-8")


def _wait_for(admin: Path, sites: set[str]) -> None:
    from unfed.app.nvflare_app import session
    from unfed.base.errors import UnfedError

    until = time.monotonic() + 180
    while time.monotonic() < until:
        try:
            with session(admin) as opened:
                if {c.name for c in opened.get_system_info().client_info} >= sites:
                    return
        except UnfedError:
            pass
        time.sleep(2)
    raise SystemExit("the sites did not connect")


def _job(folder: Path, sites: tuple[str, ...], work: dict[str, Any]) -> None:
    runtime = "nvflare.collab.runtime"
    server = {
        "format_version": 2,
        "workflows": [
            {"id": "w", "path": f"{runtime}.controller.CollabController", "args": {"server_obj_id": "bench"}}
        ],
        "components": [{"id": "bench", "path": CLASSES[0], "args": {"work": json.dumps(work).encode().hex()}}],
    }
    executor = {"path": f"{runtime}.executor.CollabExecutor", "args": {"client_obj_id": "bench"}}
    site = {
        "format_version": 2,
        "executors": [{"tasks": ["*"], "executor": executor}],
        "components": [{"id": "bench", "path": CLASSES[1], "args": {}}],
    }
    deploy = {"server": ["server"], "site": list(sites)}
    meta = {"name": "bench", "resource_spec": {}, "min_clients": len(sites), "deploy_map": deploy}
    named = {"server/config/config_fed_server": server, "site/config/config_fed_client": site, "meta": meta}
    for name, body in named.items():
        file = folder / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(body), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        echo()
    else:
        main()
else:  # imported by a job: NVFlare is there
    from nvflare.collab import collab

    from unfed.federated.nvflare import SiteDesk

    class EchoServer:
        """The server's part of the job."""

        def __init__(self, work: str) -> None:
            self._work = json.loads(bytes.fromhex(work))

        @collab.main
        def run(self) -> None:
            """Called by NVFlare."""
            found = run(self._work["sizes"], self._work["rounds"], Path(self._work["result"]).parent)
            Path(self._work["result"]).write_text(json.dumps(found), encoding="utf-8")

    class EchoSite(SiteDesk):
        """A site's part of the job."""

        def __init__(self) -> None:
            super().__init__(lambda *_: [sys.executable, str(HERE), "--child"], lambda _: 4 * 10**9)
