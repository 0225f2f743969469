"""A run that is killed, stopped by a signal, out of disk, damaged on disk, or started twice: nothing whole is lost."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_fixtures import command, digests, leftovers, rounds_done, story, until

from unfed.app.rundir import run_status
from unfed.app.runs import run
from unfed.base.artifacts import read_json
from unfed.base.errors import ArtifactError, UnfedError, WriteError
from unfed.cli.launch import guarded
from unfed.federated.checkpoint import Checkpoints
from unfed.federated.client import Client

STOPS = ((signal.SIGTERM, 143), (signal.SIGINT, 130))


def goes_on_to_the_same_bytes(make, directory: Path, undisturbed: Path) -> None:
    assert leftovers(directory) == []
    run(make(directory, resume=True))
    assert digests(directory) == digests(undisturbed)
    assert story(directory) == story(undisturbed)
    assert run_status(directory) == "finished" and leftovers(directory) == []


# --- the trainer is killed --------------------------------------------------------------------------------------------


def test_the_trainer_is_killed_in_the_middle_of_a_round(make, undisturbed, processes, tmp_path):
    directory = tmp_path / "run"
    process = processes.Process(target=run, args=(make(directory),))
    process.start()
    until(lambda: rounds_done(directory) >= 2, 120, "two rounds")
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and run_status(directory) == "running"
    with pytest.raises(UnfedError, match="holds a run that was cut short: resume=true goes on from its last round"):
        run(make(directory))
    run(make(directory, resume=True))
    assert digests(directory) == digests(undisturbed) and story(directory) == story(undisturbed)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_a_signal_in_a_round_ends_the_run_with_what_is_whole(
    make, undisturbed, tmp_path, monkeypatch, capsys, number, code
):
    directory = tmp_path / "run"
    signalled_in_round(monkeypatch, 3, number)
    assert guarded(lambda: run(make(directory)) and 0) == code
    monkeypatch.undo()
    said = f"stopped by {number.name}. {directory} holds 3 finished rounds, whole: the same command with resume=true"
    assert said in capsys.readouterr().err
    record = read_json(directory / "run.json")
    assert record["status"] == "stopped" and record["error"] == f"Stopped: stopped by {number.name}"
    assert Checkpoints(directory, {}).finished() == 3
    goes_on_to_the_same_bytes(make, directory, undisturbed)


def signalled_in_round(monkeypatch, round_: int, number: int) -> None:
    fit = Client.fit

    def fitting(self, task, broadcast, client_id):
        if task.round == round_:
            os.kill(os.getpid(), number)
            time.sleep(5)  # a signal is noticed between two instructions of Python's
        return fit(self, task, broadcast, client_id)

    monkeypatch.setattr(Client, "fit", fitting)


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_a_signal_while_a_round_is_saved_waits_until_it_is(
    make, undisturbed, tmp_path, monkeypatch, capsys, number, code
):
    directory, save = tmp_path / "run", Checkpoints.save

    def signalled(self, state, records):
        if state.round == 4:
            os.kill(os.getpid(), number)
        save(self, state, records)

    monkeypatch.setattr(Checkpoints, "save", signalled)
    assert guarded(lambda: run(make(directory)) and 0) == code
    monkeypatch.undo()
    assert "holds 4 finished rounds" in capsys.readouterr().err
    assert rounds_done(directory) == 4
    goes_on_to_the_same_bytes(make, directory, undisturbed)


def test_a_second_signal_is_not_kept_waiting(make, undisturbed, tmp_path, monkeypatch, capsys):
    directory, save = tmp_path / "run", Checkpoints.save

    def signalled_twice(self, state, records):
        if state.round == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        save(self, state, records)

    monkeypatch.setattr(Checkpoints, "save", signalled_twice)
    assert guarded(lambda: run(make(directory)) and 0) == 130
    monkeypatch.undo()
    assert "holds 3 finished rounds" in capsys.readouterr().err
    goes_on_to_the_same_bytes(make, directory, undisturbed)


def test_a_signal_before_the_first_round_leaves_the_place_as_it_was(make, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"
    signalled_in_round(monkeypatch, 0, signal.SIGTERM)
    plain = dataclasses.replace(make(directory), history=type(make(directory).history)())
    assert guarded(lambda: run(plain) and 0) == 143
    assert f"No round was finished in {directory}: the same command starts afresh" in capsys.readouterr().err
    assert not directory.exists()


def test_what_a_signal_did_before_it_does_again_afterwards():
    before = [signal.getsignal(number) for number, _ in STOPS]
    assert guarded(lambda: 0) == 0
    assert [signal.getsignal(number) for number, _ in STOPS] == before


@pytest.mark.parametrize(("number", "code"), [STOPS[0], pytest.param(*STOPS[1], marks=pytest.mark.slow)])
def test_a_signal_to_the_command_itself(small_base, small_data, tmp_path, repo_root, number, code):
    """A real process, as a batch system or Ctrl-C ends it."""
    given = [
        "experiment=finetune/tofu/default", "task_name=long", "model=tiny-lora", "eval=null", "forget_split=forget01",
        f"model.model_args.pretrained_model_name_or_path={small_base}", f"paths.data_dir={small_data}",
        "trainer.args.report_to=none", "trainer.method_args.global_rounds=5000",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(repo_root / "src"), "OMP_NUM_THREADS": "1"}
    started = [sys.executable, "-m", "unfed.cli.main", "train", *given]
    process = subprocess.Popen(
        started, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    directory = tmp_path / "saves" / "finetune" / "long"
    try:
        until(lambda: rounds_done(directory) >= 2, 200, "two rounds")
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    done = Checkpoints(directory, {}).finished()
    assert 2 <= done == rounds_done(directory) == len(read_json(directory / "run.json")["rounds"])
    assert f"stopped by {number.name}. saves/finetune/long holds {done} finished rounds, whole" in said
    assert "Traceback" not in said and leftovers(directory) == []


# --- the disk is full, or not writable --------------------------------------------------------------------------------


def refuse(code: int):
    def refusing(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return refusing


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_the_round_before(
    make, undisturbed, tmp_path, monkeypatch, capsys, code
):
    directory, save = tmp_path / "run", Checkpoints.save

    def full_at_the_fourth(self, state, records):
        if state.round == 4:
            monkeypatch.setattr(os, "fsync", refuse(code))
        save(self, state, records)

    monkeypatch.setattr(Checkpoints, "save", full_at_the_fourth)
    assert guarded(lambda: run(make(directory)) and 0) == 2
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert f"error: cannot write {directory}/checkpoints/" in said and os.strerror(code) in said
    assert f"{directory} holds 3 finished rounds, whole: the same command with resume=true goes on from there" in said
    assert "Traceback" not in said and rounds_done(directory) == 3
    goes_on_to_the_same_bytes(make, directory, undisturbed)


@pytest.mark.parametrize("what", ["history", "model", "tokenizer"])
def test_a_disk_that_is_full_elsewhere(make, undisturbed, tmp_path, monkeypatch, what):
    directory = tmp_path / "run"
    where = {
        "history": "unfed.base.artifacts.save_file",
        "model": "unfed.models.adapter.save_file",
        "tokenizer": "transformers.PreTrainedTokenizerBase.save_pretrained",
    }[what]
    with monkeypatch.context() as patch:
        patch.setattr(where, refuse(errno.ENOSPC))
        with pytest.raises(UnfedError, match="No space left on device"):
            run(make(directory))
    run(make(directory, resume=True))
    assert digests(directory) == digests(undisturbed)


def test_a_file_that_the_system_lets_not_grow(make, undisturbed, processes, tmp_path):
    """The system's own refusal (EFBIG by a limit on file sizes), in a process of its own."""
    directory, said = tmp_path / "run", tmp_path / "said"
    process = processes.Process(target=command, args=(make(directory), str(said), 4096, 3))
    process.start()
    process.join(200)
    text = said.read_text()
    assert process.exitcode == 2, text
    assert "File too large" in text and f"{directory} holds 3 finished rounds, whole" in text
    assert "Traceback" not in text
    goes_on_to_the_same_bytes(make, directory, undisturbed)


SMALL_DISK = """
set -e
mount -t tmpfs -o size={size} tmpfs "$1"
shift
"$@" && exit 99 || code=$?
test "$(find disk -name '*.part' -o -name .unfed.lock | wc -l)" = 0
ls disk/run/checkpoints > rounds
mount -o remount,size=64m tmpfs disk
"$@" resume=true
mkdir out && cp disk/run/*.safetensors disk/run/run.json out
echo "code=$code" > out/code
"""


def can_mount(place: Path) -> bool:
    place.mkdir()
    tried = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    return bool(shutil.which("unshare")) and subprocess.run(tried, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_a_real_disk_that_is_full(small_base, small_data, tmp_path, repo_root):
    """A file system of its own with room for some rounds: ENOSPC as it comes from the system, then more room."""
    if not can_mount(tmp_path / "try"):
        pytest.skip("no file system can be mounted here (unshare -rm)")
    given = [
        "experiment=finetune/tofu/default", "task_name=run", "model=tiny-lora", "eval=null", "forget_split=forget01",
        f"model.model_args.pretrained_model_name_or_path={small_base}", f"paths.data_dir={small_data}",
        "trainer.args.report_to=none", "trainer.method_args.global_rounds=8", "engine.keep_every=1",
    ]  # fmt: skip
    (tmp_path / "disk").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(repo_root / "src"), "OMP_NUM_THREADS": "1"}
    started = [sys.executable, "-m", "unfed.cli.main", "train", *given]
    first = [*started, "paths.output_dir=whole"]
    done = subprocess.run(first, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size = sum(f.stat().st_size for f in (tmp_path / "whole" / "checkpoints").rglob("*") if f.is_file()) // 2
    script = SMALL_DISK.format(size=size)
    told = ["unshare", "-rm", "bash", "-c", script, "small", "disk", *started, "paths.output_dir=disk/run"]
    done = subprocess.run(told, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "code").read_text() == "code=2\n"
    rounds = [n for n in (tmp_path / "rounds").read_text().split() if n.startswith("round_")]
    assert 0 < len(rounds) < 8
    assert "No space left on device" in done.stderr and f"holds {len(rounds)} finished round" in done.stderr
    assert "Traceback" not in done.stderr
    adapters = [(tmp_path / place / "adapter_model.safetensors").read_bytes() for place in ("out", "whole")]
    assert adapters[0] == adapters[1]
    assert len(read_json(tmp_path / "out" / "run.json")["rounds"]) == 8


# --- checkpoints that are damaged -------------------------------------------------------------------------------------


@pytest.fixture
def half_done(make, tmp_path, monkeypatch) -> Path:
    """A run that was cut off in its sixth round; rounds 3, 4 and 5 are there."""
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        signalled_in_round(patch, 5, signal.SIGTERM)
        assert guarded(lambda: run(make(directory)) and 0) == 143
    assert sorted(d.name for d in (directory / "checkpoints").iterdir()) == [f"round_0000{n}" for n in (3, 4, 5)]
    return directory


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def alter(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, alter, lambda f: f.unlink()], ids=["truncated", "altered", "missing"])
@pytest.mark.parametrize("newest", [1, 2])
def test_a_damaged_checkpoint_gives_way_to_the_newest_whole_one(
    make, undisturbed, half_done, caplog, capsys, damage, newest
):
    """The round before; where that is damaged as well, the one that ``engine.keep_every`` kept."""
    damaged = [5, 4][:newest]
    for number in damaged:
        damage(half_done / "checkpoints" / f"round_0000{number}" / "adapter.safetensors")
    with caplog.at_level(logging.WARNING):
        run(make(half_done, resume=True))
    for number in damaged:
        assert f"checkpoint round_0000{number} is not whole, using the round before" in caplog.text
    assert f"resuming after round {min(damaged) - 1}" in capsys.readouterr().err
    assert digests(half_done) == digests(undisturbed) and story(half_done) == story(undisturbed)


def test_with_no_whole_checkpoint_the_run_says_so_and_begins_again(make, undisturbed, half_done, capsys):
    for place in (half_done / "checkpoints").iterdir():
        truncate(place / "adapter.safetensors")
    run(make(half_done, resume=True))
    assert "resume=true: no checkpoint can be read, starting with the first round" in capsys.readouterr().err
    assert digests(half_done) == digests(undisturbed)


# --- two runs, and no place for one ------------------------------------------------------------------------------


def test_two_runs_in_one_directory_are_refused_with_the_owner_and_its_age(make, undisturbed, processes, tmp_path):
    directory = tmp_path / "run"
    process = processes.Process(target=run, args=(make(directory),))
    process.start()
    try:
        until(lambda: rounds_done(directory) >= 1, 120, "a round")
        os.kill(process.pid, signal.SIGSTOP)
        for again in (make(directory, resume=True), make(directory, overwrite=True), make(directory)):
            with pytest.raises(ArtifactError, match=rf"in use by process {process.pid} on \S+ for \d+ s"):
                run(again)
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.join(200)
    assert process.exitcode == 0 and digests(directory) == digests(undisturbed)


def test_a_refused_write_names_the_place_before_anything_is_trained(make, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", refuse(errno.EROFS))
    monkeypatch.setattr(Client, "fit", None)
    with pytest.raises(WriteError, match=f"cannot make the output directory {tmp_path / 'run'}: Read-only file system"):
        run(make(tmp_path / "run"))


def test_the_record_of_a_stopped_run_is_whole_json(half_done):
    assert json.loads((half_done / "run.json").read_text(encoding="utf-8"))["status"] == "stopped"
