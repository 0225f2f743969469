"""``engine=ray`` with Ray itself, in processes of their own: equal results, killed workers, a cluster that is there.

What is done with messages is tested without Ray in ``test_ray_fleet.py``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from network_fixtures import TRAINING, free_port, unfed

from unfed.base.artifacts import read_json, read_tensors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (unfed[ray])"),
]
RAY = ("engine=ray", "engine.workers=2")
ROUNDS = ("forget_split=forget01", "trainer.method_args.global_rounds=2")
MODEL = "model.model_args.pretrained_model_name_or_path="


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def learn(small_base, small_data):
    """The words of a fine-tuning."""
    data = f"paths.data_dir={small_data}"
    return lambda name, *more: ("train", *TRAINING, f"{MODEL}{small_base}", data, *ROUNDS, f"task_name={name}", *more)


@pytest.fixture(scope="module")
def forget(small_data):
    """The words of an unlearning of the fine-tuning ``here``."""
    given = ("method=NPO", "forget_split=forget01", "retain_split=retain99", f"paths.data_dir={small_data}")
    start = f"{MODEL}saves/finetune/here"
    return lambda name, *more: ("unlearn", *TRAINING, start, *given, f"task_name={name}", *more)


@pytest.fixture(scope="module")
def here(place, learn):
    """A fine-tuning in one process, ``saves/finetune/here``: its weights."""
    unfed(*learn("here"), cwd=place)
    return weights(place, "finetune/here")


def weights(place: Path, run: str) -> str:
    return read_tensors(place / "saves" / run / "adapter_model.safetensors").digest()


def rounds(place: Path, run: str) -> list:
    return read_json(place / "saves" / run / "run.json")["rounds"]


def descendants(pid: int) -> dict[int, str]:
    """Processes below ``pid``, with their titles."""
    parents, titles = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    found, new = set(), {pid}
    while new:
        found |= new
        new = {p for p, parent in parents.items() if parent in new}
    return {p: titles[p] for p in found - {pid}}


def at_work(pid: int) -> list[int]:
    """The workers of a run that are training."""
    return [p for p, title in descendants(pid).items() if title.startswith("ray::UnfedWorker.do")]


def started(place: Path, words) -> subprocess.Popen:
    with (place / "log").open("ab") as log:
        command = [sys.executable, "-m", "unfed.cli.main", *words]
        return subprocess.Popen(command, cwd=place, stdout=log, stderr=log, start_new_session=True)


def until(found, process, seconds=300):
    """What ``found`` finds while ``process`` runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if there := found():
            return there
        time.sleep(0.02)
    pytest.fail(f"it did not come to that (exit code {process.poll()})")


@pytest.mark.parametrize(
    "more", [("aggregator=Scaffold",), ("wire=topk", "wire.fraction=0.1")], ids=["control", "wire"]
)
def test_fine_tuning_with_kept_tensors_is_that_of_one_process(place, learn, more):
    name = more[0].partition("=")[2]
    unfed(*learn(f"{name}_here", *more), cwd=place)
    done = unfed(*learn(f"{name}_ray", *more, *RAY), cwd=place)
    assert weights(place, f"finetune/{name}_ray") == weights(place, f"finetune/{name}_here")
    assert "ray: 2 workers" in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("recipe", ["local_then_recover", "unlearning_adapter"])
def test_unlearning_is_that_of_one_process(place, here, forget, recipe):
    more = (f"recipe={recipe}",)
    unfed(*forget(f"{recipe}_here", *more), cwd=place)
    unfed(*forget(f"{recipe}_ray", *more, *RAY), cwd=place)
    assert weights(place, f"unlearn/{recipe}_ray") == weights(place, f"unlearn/{recipe}_here") != here


LONG = ("trainer.args.num_train_epochs=60", "trainer.method_args.global_rounds=1")
"""Long enough for a worker to be met at work."""


def test_a_killed_worker_is_replaced_and_the_result_is_the_same(place, learn):
    unfed(*learn("long_here", *LONG), cwd=place)
    process = started(place, learn("killed", *LONG, *RAY))
    (pid, *_) = until(lambda: at_work(process.pid), process)
    os.kill(pid, signal.SIGKILL)
    assert process.wait(600) == 0, (place / "log").read_text()[-3000:]
    assert weights(place, "finetune/killed") == weights(place, "finetune/long_here")
    assert rounds(place, "finetune/killed")[0]["failures"] == {}


def test_a_client_whose_worker_is_killed_twice_has_failed_and_the_round_goes_on(place, learn):
    process = started(place, learn("twice", *LONG, "engine=ray", "engine.workers=1"))
    (first,) = until(lambda: at_work(process.pid), process)
    os.kill(first, signal.SIGKILL)
    (second,) = until(lambda: [p for p in at_work(process.pid) if p != first], process)
    os.kill(second, signal.SIGKILL)
    assert process.wait(600) == 0, (place / "log").read_text()[-3000:]
    (only,) = rounds(place, "finetune/twice")
    assert list(only["failures"]) == ["client_0"] and "its worker died, and again" in only["failures"]["client_0"]
    assert only["clients"] == ["client_1", "client_2"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_of_ray_is_left_when_a_run_is_ended(place, learn, how):
    """But, after SIGKILL, two helpers of Ray's that go later, and the files: no worker, and nobody who gives work."""
    process = started(place, learn(f"ended_{how.name}", *LONG, *RAY))
    until(lambda: at_work(process.pid), process)
    there = descendants(process.pid)
    (own,) = {word for title in there.values() for word in re.findall(r"=(/tmp/unfed-\w+)", title)}
    forgotten = {p for p, title in there.items() if "Agent" in title} if how == signal.SIGKILL else set()
    assert len(forgotten) < len(there) - 3
    os.kill(process.pid, how)
    assert process.wait(120) == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    end = time.monotonic() + 60
    try:
        while left := [p for p in there.keys() - forgotten if lives(p)]:
            assert time.monotonic() < end, [there[p] for p in left]
            time.sleep(0.2)
        assert Path(own).exists() == (how == signal.SIGKILL)
    finally:
        for pid in filter(lives, there):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(own, ignore_errors=True)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def cluster(tmp_path):
    """A Ray cluster that runs already: its address."""
    port = free_port()
    head = [
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--node-ip-address=127.0.0.1",
        "--num-cpus=2",
        "--num-gpus=0",
    ]
    command = [sys.executable, "-m", "ray.scripts.scripts", *head, "--include-dashboard=false", "--disable-usage-stats"]
    with (tmp_path / "cluster.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: b"Ray runtime started" in (tmp_path / "cluster.log").read_bytes(), process)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_cluster_that_runs_is_used_and_goes_on(place, here, learn, cluster):
    for name in ("first", "second"):
        done = unfed(*learn(name, *RAY, f"engine.address={cluster}"), cwd=place)
        assert f"on the cluster at {cluster}" in done.stdout + done.stderr
        assert weights(place, f"finetune/{name}") == here
    refused = unfed(*learn("third", *RAY, "engine.workers=3", f"engine.address={cluster}"), cwd=place, check=False)
    assert refused.returncode == 2 and "the cluster has 2 CPUs" in refused.stderr
    assert not (place / "saves/finetune/third").exists()


def test_a_cluster_that_is_not_there_is_named_before_a_model_is_opened(place, learn):
    address = f"127.0.0.1:{free_port()}"
    refused = unfed(*learn("nowhere", *RAY, f"engine.address={address}"), cwd=place, check=False)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert f"engine.address={address}: no Ray cluster could be reached there" in refused.stderr
    assert not (place / "saves/finetune/nowhere").exists()
