"""A run that was killed, at whatever moment, goes on to the bytes that it would have had."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from pathlib import Path

import pytest
from fault_fixtures import delicate, digests, rounds_done, story

from unfed.app.rundir import run_status
from unfed.app.runs import run
from unfed.base.artifacts import LOCK_NAME
from unfed.base.errors import ArtifactError, UnfedError
from unfed.config.schema import AggregatorConfig, MethodConfig, RunConfig

ROUNDS = 6


@pytest.fixture(scope="module")
def make(small_run, finetuned):
    """A delicate run, which keeps nothing beside."""

    def config(directory: Path, **changes) -> RunConfig:
        return dataclasses.replace(delicate(small_run, finetuned, directory, ROUNDS), **changes)

    return config


@pytest.fixture(scope="module")
def undisturbed(make, tmp_path_factory):
    """The directory of a run that was left alone, and how long it took."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    began = time.monotonic()
    run(make(directory))
    return directory, time.monotonic() - began


def kill_at(processes, config: RunConfig, moment: float, *, after_round: int = 0) -> bool:
    """Start a run, and SIGKILL it ``moment`` seconds after ``after_round`` rounds are there. Whether it hit."""
    directory = Path(config.paths.output_dir)
    process = processes.Process(target=run, args=(config,))
    process.start()
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if (directory / LOCK_NAME).exists() and rounds_done(directory) >= after_round:
            break
        time.sleep(0.002)
    process.join(moment)
    process.kill()
    process.join()
    return process.exitcode == -9


def kill_often(make, directory: Path, processes, kills: int, undisturbed) -> None:
    place, whole = undisturbed
    draw = random.Random(kills)
    hits = 0
    for number in range(kills):
        left = whole * (1 - rounds_done(directory) / (ROUNDS + 1))
        hits += kill_at(processes, make(directory, resume=number > 0), draw.uniform(0, 0.8 * left))
    assert hits > 0
    run(make(directory, resume=True))
    assert digests(directory) == digests(place)
    assert story(directory) == story(place)
    assert run_status(directory) == "finished" and not (directory / LOCK_NAME).exists()


def test_killed_twice(make, undisturbed, processes, tmp_path):
    kill_often(make, tmp_path / "run", processes, 2, undisturbed)


@pytest.mark.slow
def test_killed_ten_times_at_random_moments(make, undisturbed, processes, tmp_path):
    kill_often(make, tmp_path / "run", processes, 10, undisturbed)


class KilledError(BaseException):
    """Stands for the end of the process."""


class Writes:
    """Counts renames (every file and directory is renamed into place) and ends the process at one of them."""

    def __init__(self, last: int = 10**9) -> None:
        self.seen, self.last, self._replace = 0, last, os.replace

    def __call__(self, *args, **kwargs):
        self.seen += 1
        if self.seen == self.last:
            raise KilledError
        return self._replace(*args, **kwargs)


@pytest.fixture(scope="module")
def renames(make, tmp_path_factory) -> int:
    """How many there are in an undisturbed run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", writes := Writes())
        run(make(tmp_path_factory.mktemp("count") / "run"))
    return writes.seen


@pytest.mark.parametrize("share", [0.05, 0.5, 0.97, 1.0])
def test_cut_off_at_a_write(make, undisturbed, renames, tmp_path, monkeypatch, share):
    """The moments that matter most are those between two renames."""
    monkeypatch.setattr(os, "replace", Writes(max(1, round(share * renames))))
    with pytest.raises(KilledError):
        run(make(tmp_path / "run"))
    monkeypatch.undo()
    run(make(tmp_path / "run", resume=True))
    assert digests(tmp_path / "run") == digests(undisturbed[0])


def test_a_running_run_is_left_alone_and_a_killed_one_is_taken_over(make, undisturbed, processes, tmp_path):
    directory = tmp_path / "run"
    process = processes.Process(target=run, args=(make(directory),))
    process.start()
    deadline = time.monotonic() + 60
    while rounds_done(directory) < 1 and time.monotonic() < deadline:
        time.sleep(0.002)
    try:
        with pytest.raises(ArtifactError, match=f"in use by process {process.pid} on"):
            run(make(directory, resume=True))
    finally:
        process.kill()
        process.join()
    assert (directory / LOCK_NAME).exists()
    with pytest.raises(UnfedError, match="resume=true goes on"):
        run(make(directory))
    run(make(directory, resume=True))
    assert digests(directory) == digests(undisturbed[0])


def cut_in_round(monkeypatch, number: int) -> None:
    from unfed.federated.client import Client

    fit = Client.fit

    def cut(self, task, adapter, client_id):
        if task.round == number:
            raise KilledError
        return fit(self, task, adapter, client_id)

    monkeypatch.setattr(Client, "fit", cut)


def test_unlearning_in_every_round_keeps_its_reference(small_run, finetuned, tmp_path, monkeypatch):
    """The reference policy is the adapter that the run began with, also for rounds after a resumption."""

    def config(name: str, **changes) -> RunConfig:
        shape = {"schedule": "interleaved", "global_rounds": 4, "unlearn_epochs": 8}
        args = {"pretrained_model_name_or_path": str(finetuned)}
        return dataclasses.replace(
            small_run("unlearn", tmp_path / name, model_args=args, method_args=shape, method=MethodConfig("NPO")),
            **changes,
        )

    whole = run(config("whole")).directory
    cut_in_round(monkeypatch, 2)
    with pytest.raises(KilledError):
        run(config("cut"))
    monkeypatch.undo()
    assert digests(run(config("cut", resume=True)).directory) == digests(whole)


@pytest.fixture
def half_done(make, tmp_path, monkeypatch):
    """A run that was cut off in its fifth round."""
    directory = tmp_path / "run"
    cut_in_round(monkeypatch, 4)
    with pytest.raises(KilledError):
        run(make(directory))
    monkeypatch.undo()
    assert rounds_done(directory) == 4
    return directory


@pytest.mark.parametrize("name", ["adapter.safetensors", "opt_m.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["truncated", "altered"])
def test_a_damaged_newest_checkpoint_costs_one_round(make, undisturbed, half_done, name, how):
    file = half_done / "checkpoints" / "round_00004" / name
    data = bytearray(file.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 1
    file.write_bytes(data)
    run(make(half_done, resume=True))
    assert digests(half_done) == digests(undisturbed[0])
    assert story(half_done) == story(undisturbed[0])


def test_another_configuration_is_refused_by_its_keys_and_nothing_is_lost(make, half_done, monkeypatch):
    before = {f: f.read_bytes() for f in half_done.rglob("*") if f.is_file()}
    monkeypatch.setattr("unfed.app.runs.load_model", None)  # refused before a model is opened
    config = make(half_done, resume=True, seed=5, aggregator=AggregatorConfig("FedAdam", {"server_lr": 0.02}))
    with pytest.raises(UnfedError) as raised:
        run(config)
    text = str(raised.value)
    assert "seed (was 0, now 5)" in text and "aggregator.params.server_lr (was 0.01, now 0.02)" in text
    assert {f: f.read_bytes() for f in half_done.rglob("*") if f.is_file()} == before


def test_another_adapter_under_the_same_name_is_refused(make, half_done, finetuned, tmp_path, monkeypatch):
    """The configuration is the same; what it names is not."""
    from unfed.models import load

    open_adapter = load._open_adapter

    def other(model, path, name, *, trainable):
        opened = open_adapter(model, path, name, trainable=trainable)
        next(p for p in opened.parameters() if p.requires_grad).data.add_(1.0)
        return opened

    monkeypatch.setattr(load, "_open_adapter", other)
    manifest = (half_done / "partition.json").read_bytes()
    with pytest.raises(UnfedError, match=r"inputs\.adapter \(was 'sha256:"):
        run(make(half_done, resume=True))
    assert (half_done / "partition.json").read_bytes() == manifest


def test_resuming_a_finished_run_changes_nothing(make, half_done, undisturbed):
    run(make(half_done, resume=True))
    run(make(half_done, resume=True))
    assert digests(half_done) == digests(undisturbed[0]) and story(half_done) == story(undisturbed[0])


def test_resuming_nothing_starts_with_the_first_round(make, undisturbed, tmp_path):
    run(make(tmp_path / "run", resume=True))
    assert digests(tmp_path / "run") == digests(undisturbed[0])


def test_reporting_and_evaluation_may_differ(make, half_done, undisturbed):
    config = make(half_done, resume=True)
    trainer = dataclasses.replace(config.trainer, args={**config.trainer.args, "logging_steps": 1, "run_name": "again"})
    run(dataclasses.replace(config, trainer=trainer))
    assert digests(half_done) == digests(undisturbed[0])
