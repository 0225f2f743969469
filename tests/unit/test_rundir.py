"""The run directory: one run at a time, nothing lost, nothing overwritten by mistake."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from unfed.app.rundir import RUN_FILE, open_run, plain, run_status, training_identity
from unfed.base.artifacts import LOCK_NAME, atomic_dir, atomic_path, read_json, run_lock, write_json
from unfed.base.errors import ArtifactError, UnfedError


@pytest.fixture
def config(small_run, tmp_path):
    return small_run("finetune", tmp_path / "saves" / "task")


def out(config) -> Path:
    return Path(config.paths.output_dir)


def finish(config) -> None:
    with open_run(config) as run:
        run.note(rounds=[1, 2])


def cut_short(config) -> None:
    with pytest.raises(ZeroDivisionError), open_run(config):  # noqa: PT012
        (out(config) / "checkpoints" / "round_00001").mkdir(parents=True)
        raise ZeroDivisionError


def lock_of(directory: Path, pid: int, host: str | None = None, age: float = 60.0) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    lock = directory / LOCK_NAME
    lock.write_text(json.dumps({"pid": pid, "host": host or socket.gethostname(), "since": time.time() - age}))
    return lock


def dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_run_json_says_what_ran_and_how_it_ended(config):
    with open_run(config) as run:
        assert run_status(out(config)) == "running"
        run.note(rounds=[{"a": 1}])
    record = read_json(out(config) / RUN_FILE)
    assert record["status"] == "finished" and record["rounds"] == [{"a": 1}] and record["seed"] == 0
    assert record["config"]["trainer"]["args"]["learning_rate"] == 1e-2
    assert record["versions"]["torch"] and record["ended"] >= record["started"]
    assert not (out(config) / LOCK_NAME).exists()


def test_a_failure_is_recorded(config):
    with pytest.raises(UnfedError, match="too bad"), open_run(config):  # noqa: PT012
        (out(config) / "checkpoints").mkdir()
        raise UnfedError("too bad")
    record = read_json(out(config) / RUN_FILE)
    assert record["status"] == "failed" and record["error"] == "UnfedError: too bad"


def test_a_mistake_found_before_anything_was_made_leaves_the_place_as_it_was(config):
    with pytest.raises(UnfedError, match="mistake"), open_run(config):
        raise UnfedError("mistake")
    assert not out(config).exists()
    finish(config)
    before = (out(config) / RUN_FILE).read_bytes()
    with pytest.raises(UnfedError, match="mistake"), open_run(config):
        raise UnfedError("mistake")
    assert (out(config) / RUN_FILE).read_bytes() == before
    assert [p.name for p in out(config).parent.iterdir()] == [out(config).name]


def test_finished_runs_are_set_aside_one_after_the_other(config):
    for _ in range(3):
        finish(config)
    assert sorted(p.name for p in out(config).parent.iterdir()) == ["task", "task.1", "task.2"]
    assert read_json(out(config) / RUN_FILE)["set_aside"].endswith("task.2")


def test_a_run_that_was_cut_short_is_not_touched_unasked(config):
    cut_short(config)
    with pytest.raises(UnfedError, match="resume=true goes on from its last round, overwrite=true sets it"):
        finish(config)
    assert (out(config) / "checkpoints" / "round_00001").is_dir()
    finish(replace(config, overwrite=True))
    assert (out(config).with_name("task.1") / "checkpoints" / "round_00001").is_dir()
    assert not (out(config) / "checkpoints").exists()


def test_a_resumed_run_keeps_its_history(config):
    finish(config)
    started = read_json(out(config) / RUN_FILE)["started"]
    with pytest.raises(ZeroDivisionError), open_run(replace(config, resume=True)):
        raise ZeroDivisionError
    record = read_json(out(config) / RUN_FILE)
    assert record["rounds"] == [1, 2] and record["started"] == started and "resumed" in record
    finish(replace(config, resume=True))
    record = read_json(out(config) / RUN_FILE)
    assert record["status"] == "finished" and "error" not in record
    assert not out(config).with_name("task.1").exists()


def test_an_unreadable_record_counts_as_failed(config):
    finish(config)
    (out(config) / RUN_FILE).write_text("{")
    assert run_status(out(config)) == "failed"
    finish(replace(config, resume=True))
    assert run_status(out(config)) == "finished"


def test_two_runs_in_one_directory(config):
    lock_of(out(config), os.getppid(), age=75)
    with pytest.raises(ArtifactError, match=rf"in use by process {os.getppid()} on .* for 7\d s"):
        finish(config)
    assert (out(config) / LOCK_NAME).exists() and not (out(config) / RUN_FILE).exists()


def test_a_finished_run_is_not_set_aside_while_another_process_works_there(config):
    finish(config)
    lock_of(out(config), os.getppid())
    with pytest.raises(ArtifactError, match="in use by process"):
        finish(config)
    assert out(config).is_dir() and not out(config).with_name("task.1").exists()


def test_a_lock_of_another_host_is_not_taken_over(config):
    lock_of(out(config), dead_pid(), host="elsewhere")
    with pytest.raises(ArtifactError, match="on elsewhere"):
        finish(config)


def test_the_lock_of_a_dead_process_is_taken_over(config):
    lock_of(out(config), dead_pid())
    finish(config)
    assert run_status(out(config)) == "finished"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
def test_a_torn_lock_is_taken_over(config, content):
    lock = lock_of(out(config), 1)
    lock.write_text(content)
    old = time.time() - 10
    os.utime(lock, (old, old))
    finish(config)


def test_of_many_that_find_a_dead_lock_one_takes_it(tmp_path):
    lock_of(tmp_path, dead_pid())
    code = """
import sys, time
from pathlib import Path
from unfed.base.artifacts import run_lock
from unfed.base.errors import ArtifactError
try:
    with run_lock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(5)
except ArtifactError:
    print("refused", flush=True)
"""
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [p.stdout.readline().strip() for p in started]
    for p in started:
        p.kill()
        p.communicate()
    assert sorted(said) == ["held", "refused", "refused", "refused"]


def test_a_lock_goes_with_its_directory_and_takes_no_other_along(tmp_path):
    with run_lock(tmp_path):
        lock_of(tmp_path, os.getppid())  # the directory was set aside and another run began in its place
    assert (tmp_path / LOCK_NAME).exists()


def test_a_failed_run_leaves_what_was_there(config):
    out(config).mkdir(parents=True)
    (out(config) / "notes.log").write_text("mine")
    with pytest.raises(UnfedError, match="boom"), open_run(config):
        raise UnfedError("boom")
    assert [f.name for f in out(config).iterdir()] == ["notes.log"]


def test_leftovers_of_a_killed_process_are_removed(config):
    cut_short(config)
    part = out(config) / "checkpoints" / ".round_00002.abc.part"
    part.mkdir()
    (part / "adapter.safetensors").write_bytes(b"half")
    (out(config) / ".run.json.xyz.part").write_text("{")
    finish(replace(config, resume=True))
    assert not part.exists() and not list(out(config).glob(".*.part"))


@pytest.mark.parametrize("mode", ["finetune", "unlearn", "eval"])
@pytest.mark.parametrize("key", ["pretrained_model_name_or_path", "lora_model_path"])
def test_the_output_may_not_be_the_input(config, mode, key):
    finish(config)
    args = replace(config.model.model_args, **{key: str(out(config))})
    own = replace(config, mode=mode, model=replace(config.model, model_args=args), overwrite=True)
    with pytest.raises(UnfedError, match=f"{key}=.* is also the output directory"):
        finish(own)
    assert run_status(out(config)) == "finished"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("where", ["pathlib.Path.mkdir", "os.open", "tempfile.mkstemp"])
def test_an_output_directory_that_cannot_be_written_to(config, monkeypatch, where, code):
    out(config).parent.mkdir(parents=True)

    def refuse(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(where, refuse)
    with pytest.raises(ArtifactError, match=os.strerror(code)):
        finish(config)


def test_a_full_disk_leaves_the_previous_file_whole(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"v": 1})

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for broken in ("os.replace", "os.fsync"):
        monkeypatch.setattr(broken, full)
        with pytest.raises(ArtifactError, match=r"cannot write .*a\.json: No space left"):
            write_json(tmp_path / "a.json", {"v": 2})
        monkeypatch.undo()
    assert read_json(tmp_path / "a.json") == {"v": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_atomic_writes_are_undone_on_any_error(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "f") as part:  # noqa: PT012
        part.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), atomic_dir(tmp_path / "d") as part:  # noqa: PT012
        (part / "f").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_the_identity_of_a_training(config):
    """Where to, how to report and evaluate may change between a run and its resumption; nothing else may."""
    usual = training_identity(config)
    assert usual == training_identity(replace(config, resume=True, overwrite=True, task_name="x"))
    trainer = config.trainer
    quiet = replace(trainer, args={**trainer.args, "logging_steps": 3, "report_to": "tensorboard", "run_name": "r"})
    assert usual == training_identity(replace(config, trainer=quiet))
    assert usual == json.loads(json.dumps(usual))
    for other in (
        replace(config, seed=1),
        replace(config, trainer=replace(trainer, args={**trainer.args, "learning_rate": 1.0})),
        replace(config, partition=replace(config.partition, alpha=9.0)),
    ):
        assert training_identity(other) != usual


def test_plain_data():
    assert plain({"a": (1, 2), 3: {"b": None}}) == {"a": [1, 2], "3": {"b": None}}
