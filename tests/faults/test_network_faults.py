"""Faults of a real network on this machine: NVFlare's server, three sites, mutual TLS. Takes minutes.

Without NVFlare: ``test_sites.py`` and ``test_updates.py``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from fault_fixtures import rounds_done, until
from network_fixtures import GIVEN_UP, SITES, TRAINING, Network, processes, unfed

from unfed.base.artifacts import read_json
from unfed.base.errors import UnfedError
from unfed.federated.checkpoint import Checkpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(importlib.util.find_spec("nvflare") is None, reason="NVFlare is not installed (unfed[network])"),
]


@pytest.fixture(scope="module")
def base(small_base) -> str:
    return f"model.model_args.pretrained_model_name_or_path={small_base}"


@pytest.fixture(scope="module")
def undisturbed(network, base):
    """The weights after so many rounds on three sites, in one place."""
    given = (base, "task_name=dealt", "forget_split=forget01", "trainer.method_args.global_rounds=1")
    network.submit(*given, "--sites", ",".join(SITES))
    manifest = "partition.manifest=saves/finetune/dealt/partition.json"

    def weights(rounds: int) -> str:
        name = f"whole{rounds}"
        if not (network.place / "saves" / "finetune" / name).exists():
            given = (base, f"task_name={name}", "forget_split=forget01", f"trainer.method_args.global_rounds={rounds}")
            unfed("train", *TRAINING, *given, manifest, "paths.data_dir=data", cwd=network.place)
        return network.weights(f"finetune/{name}")

    return weights


class Job:
    """A run that was submitted, and whose first rounds are done."""

    def __init__(self, network: Network, base: str, name: str, rounds: int, *given: str) -> None:
        self.network, self.place = network, network.place / "saves" / "finetune" / name
        self.given = (base, f"task_name={name}", "forget_split=forget01", f"trainer.method_args.global_rounds={rounds}")
        self.options = given = given if "--sites" in given else ("--sites", ",".join(SITES), *given)
        self.told = network.place / f"{name}.txt"
        command = [sys.executable, "-m", "unfed.cli.main", "network", "submit", "--kit", str(network.admin)]
        with self.told.open("w") as file:
            self.process = subprocess.Popen(
                [*command, *TRAINING, *self.given, *given], stdout=file, stderr=file, cwd=network.place
            )
        until(lambda: rounds_done(self.place) >= 2 or self.process.poll() is not None, 300, "two rounds")
        assert self.process.poll() is None, self.said
        self.number = self.said.split("job ")[1].split()[0]

    @property
    def said(self) -> str:
        """By the command that submitted it."""
        return self.told.read_text(encoding="utf-8")

    def ended(self, seconds: float = 300) -> int:
        """The exit code of that command, when it has one."""
        return self.process.wait(seconds)

    @property
    def record(self) -> dict:
        return read_json(self.place / "run.json")

    def resume(self) -> str:
        """Submit it again from where it was; what it says."""
        return self.network.submit(*self.given, *self.options, "resume=true").stdout


def stopped_in_a_round(job: Job, pid: int) -> int:
    """Stop a process and wait until the server has been waiting for its site for a while; the round, from 0."""
    os.kill(pid, signal.SIGSTOP)
    before = None
    while before != (done := rounds_done(job.place)):
        before = done
        time.sleep(3.0)
    return done


def trainer_of(network: Network, site: str) -> int:
    (pid,) = processes("unfed.app.site", site, str(network.kits))
    return pid


def failures(job: Job) -> dict[int, dict[str, str]]:
    return {r["round"]: r["failures"] for r in job.record["rounds"] if r["failures"]}


def test_a_training_process_that_is_killed_is_named_and_replaced_in_the_next_round(network, base):
    job = Job(network, base, "killed", 60)
    pid = trainer_of(network, "site-2")
    lost = stopped_in_a_round(job, pid)
    os.kill(pid, signal.SIGKILL)
    assert job.ended() == 0
    assert failures(job) == {lost: {"site-2": "its training process ended (signal 9)"}}
    rounds = job.record["rounds"]
    assert (
        len(rounds) == 60 and rounds[lost]["clients"] == ["site-1", "site-3"] and rounds[-1]["clients"] == list(SITES)
    )


def test_a_site_slower_than_the_deadline_is_left_out_of_that_round(network, base):
    job = Job(network, base, "slow", 30, "engine.timeout=90")
    lost = stopped_in_a_round(job, trainer_of(network, "site-1"))
    assert job.ended() == 0
    assert failures(job) == {lost: {"site-1": "it was not done after 90 s"}}
    assert job.record["rounds"][-1]["clients"] == list(SITES)


def test_another_base_model_at_a_site_is_refused_with_both_named(network, base, make_base):
    place = network.kits / "site-3" / "base_model"
    kept = place.rename(place.with_name("kept"))
    make_base(place, seed=9)
    try:
        done = network.submit(base, "task_name=other", "forget_split=forget01", check=False)
    finally:
        shutil.rmtree(place)
        kept.rename(place)
    assert done.returncode == 1
    assert "error: site-3 has another base model than the server: its weights: " in done.stdout
    assert "the server's: " in done.stdout and not (network.place / "saves" / "finetune" / "other").exists()


class Proxy:
    """Passes bytes on between its own port and another one, until it is cut: then bytes and new connections wait, or,
    with ``drop``, connections are closed and new ones refused."""

    def __init__(self, to: int) -> None:
        self.to, self.whole, self.dropped, self.open = to, threading.Event(), False, []
        self.whole.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self.listener.accept()[0]
                if self.dropped:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self.to))
                self.open += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.whole.wait()
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self, seconds: float, *, drop: bool) -> None:
        self.whole.clear()
        self.dropped = drop
        if drop:
            for end in self.open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            self.open.clear()
        time.sleep(seconds)
        self.dropped = False
        self.whole.set()

    def close(self) -> None:
        self.listener.close()
        for end in self.open:
            end.close()


BEHIND = ("site-1", "site-3", "site-4")
"""The sites of a run with one that is reached through the proxy."""


@pytest.fixture(scope="module")
def behind(network):
    """A fourth site, whose only way to the server is a proxy; it has the rows of the second."""
    proxy = Proxy(network.port)
    project = network.place / "PROJECT.yml"
    text = project.read_text(encoding="utf-8")
    project.write_text(text.replace(f"port: {network.port}", f"port: {proxy.port}"), encoding="utf-8")
    unfed("network", "provision", "PROJECT.yml", cwd=network.place)  # the same authority, another port
    project.write_text(text, encoding="utf-8")
    kit = network.kits.with_name("prod_01") / "site-4"
    for folder in ("base_model", "data"):
        shutil.copytree(network.kits / ("site-2" if folder == "data" else "site-4") / folder, kit / folder)
    process = network.start(kit)
    until(lambda: "site-4" in network.connected(), 180, "the fourth site")
    yield proxy, kit, process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    proxy.close()


@pytest.mark.parametrize("drop", [False, True], ids=["silent", "closed"])
def test_a_connection_cut_for_twelve_seconds_costs_that_site_a_round_or_two(network, base, behind, drop):
    """Every question that is open when the line is cut stays unanswered longer than a site may take. The site is named
    and left out, and takes part again once the line is whole."""
    proxy, _, _ = behind
    job = Job(network, base, f"cut{drop}", 120, "--sites", ",".join(BEHIND))
    proxy.cut(12.0, drop=drop)
    assert job.ended(600) == 0
    lost = failures(job)
    assert 1 <= len(lost) < 20 and all(set(found) == {"site-4"} for found in lost.values()), lost
    assert all("no answer" in found["site-4"] or "does not answer" in found["site-4"] for found in lost.values()), lost
    rounds = job.record["rounds"]
    assert len(rounds) == 120 and rounds[-1]["clients"] == list(BEHIND)
    assert all(rounds[n]["clients"] == ["site-1", "site-3"] for n in lost)


def test_a_site_that_is_killed_is_named_in_every_round_from_then_on_and_takes_part_in_the_next_run(
    network, base, behind
):
    """NVFlare by itself ends a job a minute after it has given a site up. Once the rounds are over it asks the site how
    its part ended, which may not keep the next job waiting."""
    _, kit, process = behind
    given = ("--sites", ",".join(BEHIND), "trainer.args.num_train_epochs=8")
    job = Job(network, base, "lost", 24, *given)
    gone = [process.pid, *processes("worker_process", str(kit)), *processes("unfed.app.site", str(kit))]
    for pid in gone:  # all at once: the machine is gone
        os.kill(pid, signal.SIGKILL)
    process.wait()
    until(lambda: job.process.poll() is not None or job.record["status"] == "finished", 900, "the end of the rounds")
    assert job.ended(120) == 0, job.said
    lost, rounds = failures(job), job.record["rounds"]
    assert len(rounds) == 24 and sorted(lost) == list(range(min(lost), 24)) and min(lost) >= 2
    assert all(set(found) == {"site-4"} for found in lost.values()), lost
    assert all(rounds[n]["clients"] == ["site-1", "site-3"] for n in lost)
    assert sum(rounds[n]["seconds"] for n in lost) > GIVEN_UP + 60 + 30
    network.start(kit)
    until(lambda: "site-4" in network.connected(), 180, "the site that came back")
    again = Job(network, base, "found", 3, *given)
    assert again.ended() == 0
    assert failures(again) == {} and again.record["rounds"][-1]["clients"] == list(BEHIND)


def test_a_sites_part_in_the_job_that_is_killed_ends_the_job_and_the_run_is_resumed(network, base, undisturbed):
    """Not the site, and not its training process: the process between them, which is NVFlare's."""
    job = Job(network, base, "part", 60)
    (pid,) = processes("worker_process", str(network.kits / "site-2"))
    os.kill(pid, signal.SIGKILL)
    assert job.ended() == 1
    assert 2 <= rounds_done(job.place) < 60
    is_whole_when_resumed(job, network, undisturbed)


def test_a_server_that_is_killed_is_started_again_and_the_run_resumed(network, base, undisturbed):
    job = Job(network, base, "dead", 60)
    for pid in [network.running[0].pid, *processes("runner_process", job.number)]:  # all at once: the machine is gone
        os.kill(pid, signal.SIGKILL)
    network.running[0].wait()
    assert job.record["status"] == "running"
    goes_on(job, network, undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_server_and_the_run_is_resumed(network, base, undisturbed, number, code):
    job = Job(network, base, f"signal{code}", 60)
    os.kill(network.running[0].pid, number)
    assert network.running[0].wait(60) == code
    said = (network.place / "localhost.log").read_text(encoding="utf-8")
    assert f"stopped by {number.name}. A run that was under way goes on from its last finished round" in said
    until(lambda: not processes("runner_process", job.number), 60, "the end of the job's process")
    # NVFlare may end the job's process before the run could say so: then a lock is left whose owner is gone.
    assert job.record["status"] in {"failed", "running"}
    assert Checkpoints(job.place, {}).finished() == rounds_done(job.place)
    goes_on(job, network, undisturbed)


def goes_on(job: Job, network: Network, undisturbed) -> None:
    """Start the server again, let the sites come back, and resume."""
    before = rounds_done(job.place)
    assert 2 <= before < 60
    network.running[0] = network.start(network.kits / "localhost")
    network.running.pop()  # it stands first

    def there() -> bool:
        with contextlib.suppress(UnfedError):
            return set(SITES) <= network.connected()
        return False

    until(there, 300, "the sites")
    is_whole_when_resumed(job, network, undisturbed)


def is_whole_when_resumed(job: Job, network: Network, undisturbed) -> None:
    """It ends as it would have without the fault."""
    assert "resuming after round" in job.resume()
    assert len(job.record["rounds"]) == 60 and job.record["status"] == "finished"
    assert network.weights(f"finetune/{job.place.name}") == undisturbed(60)
