"""Checkpoints: one directory a round, whole or not there, of this configuration or refused."""

from __future__ import annotations

import errno
import json
import logging
import shutil

import pytest
import torch

from unfed.base.artifacts import digest_json
from unfed.base.errors import ArtifactError, UnfedError
from unfed.base.types import AdapterState, ServerState
from unfed.federated.checkpoint import Checkpoints, RoundRecord, differing_keys

CONFIG = {"seed": 0, "trainer": {"args": {"learning_rate": 1e-3}}, "names": ["a", "b"]}


def state(round_: int, value: float = 0.0) -> ServerState:
    tensors = AdapterState({"a": torch.full((2, 2), value), "b": torch.arange(3.0, dtype=torch.bfloat16)})
    return ServerState(round_, tensors, {"m": tensors, "v": AdapterState({"a": torch.ones(2, 2)})})


def record(round_: int) -> RoundRecord:
    return RoundRecord(
        round_,
        "p",
        ("c0", "c1"),
        {"c2": "late"},
        7,
        "sha256:x",
        "sha256:y",
        10,
        20,
        0.5,
        0.01,
        True,
        {"c0": {"loss": 1.5}},
    )


def filled(directory, rounds: int = 3, keep: int = 5, every: int | None = None) -> Checkpoints:
    found = Checkpoints(directory, CONFIG, keep, every)
    for n in range(1, rounds + 1):
        found.save(state(n, n / 3), [record(i) for i in range(n)])
    return found


def names(directory) -> list[str]:
    return sorted(d.name for d in (directory / "checkpoints").iterdir())


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    found, records = filled(tmp_path).latest()
    assert found.round == 3 and found.adapter.digest() == state(3, 1.0).adapter.digest()
    assert {k: v.digest() for k, v in found.opt_state.items()} == {
        k: v.digest() for k, v in state(3, 1.0).opt_state.items()
    }
    assert records == [record(i) for i in range(3)]


def test_each_round_has_its_directory_and_the_last_ones_stay(tmp_path):
    filled(tmp_path)
    assert names(tmp_path) == ["round_00001", "round_00002", "round_00003"]
    filled(tmp_path / "two", rounds=4, keep=2)
    assert names(tmp_path / "two") == ["round_00003", "round_00004"]
    filled(tmp_path / "least", rounds=2, keep=0)
    assert names(tmp_path / "least") == ["round_00002"]


def test_every_nth_round_stays_beside_the_last_ones(tmp_path):
    found = filled(tmp_path, rounds=11, keep=2, every=4)
    assert names(tmp_path) == ["round_00004", "round_00008", "round_00010", "round_00011"]
    for name in names(tmp_path)[1:]:
        truncate(tmp_path / "checkpoints" / name / "adapter.safetensors")
    assert found.finished() == 4 and found.latest()[0].round == 4
    found.save(state(5), [record(i) for i in range(5)])
    assert names(tmp_path) == ["round_00004", "round_00005"], "later rounds are of the run that could not be resumed"


def test_how_many_rounds_are_finished_is_known_without_their_configuration(tmp_path):
    filled(tmp_path, rounds=3)
    anybody = Checkpoints(tmp_path, {})
    assert anybody.finished() == 3
    flip(tmp_path / "checkpoints" / "round_00003" / "opt_v.safetensors")
    assert anybody.finished() == 2
    (tmp_path / "checkpoints" / "round_00002" / "state.json").write_text("{}")
    assert anybody.finished() == 1


def test_without_rounds_there_is_nothing(tmp_path):
    empty = Checkpoints(tmp_path, CONFIG)
    assert empty.latest() is None and not empty.exist() and empty.finished() == 0
    empty.check()
    assert filled(tmp_path).exist()


def truncate(file) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))


def strip_record(file) -> None:
    """A record of another release, whose digest is right."""
    manifest = json.loads(file.read_text())
    del manifest["records"][0]["phase"], manifest["digest"]
    file.write_text(json.dumps({**manifest, "digest": digest_json(manifest)}))


def change_a_loss(file) -> None:
    file.write_text(file.read_text().replace("1.5", "1.6"))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("adapter.safetensors", truncate),
        ("adapter.safetensors", flip),
        ("adapter.safetensors", lambda f: f.unlink()),
        ("opt_v.safetensors", flip),
        ("state.json", truncate),
        ("state.json", lambda f: f.unlink()),
        ("state.json", lambda f: f.write_text("[]")),
        ("state.json", lambda f: f.write_text('{"round": 3}')),
        ("state.json", strip_record),
        ("state.json", change_a_loss),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_round_before(tmp_path, caplog, name, damage):
    found = filled(tmp_path)
    damage(tmp_path / "checkpoints" / "round_00003" / name)
    with caplog.at_level(logging.WARNING):
        back, records = found.latest()
    assert back.round == 2 and len(records) == 2
    assert "round_00003 is not whole" in caplog.text
    found.save(state(3, 1.0), [record(i) for i in range(3)])  # the round is done again over the damaged one
    assert found.latest()[0].round == 3


def test_all_damaged_is_none(tmp_path):
    found = filled(tmp_path, rounds=2)
    for n in (1, 2):
        flip(tmp_path / "checkpoints" / f"round_0000{n}" / "adapter.safetensors")
    assert found.latest() is None


def test_rounds_that_cannot_be_read_do_not_push_out_new_ones(tmp_path):
    filled(tmp_path, rounds=5, keep=2)
    for directory in (tmp_path / "checkpoints").iterdir():
        (directory / "state.json").write_text("{}")
    found = Checkpoints(tmp_path, CONFIG, 2)
    assert found.latest() is None and found.exist()
    found.save(state(1), [record(0)])
    assert [d.name for d in (tmp_path / "checkpoints").iterdir()] == ["round_00001"]
    assert found.latest()[0].round == 1


def test_what_was_left_half_written_is_no_checkpoint(tmp_path):
    found = filled(tmp_path)
    half = tmp_path / "checkpoints" / ".round_00004.abc.part"
    shutil.copytree(tmp_path / "checkpoints" / "round_00003", half)
    assert found.latest()[0].round == 3


@pytest.mark.parametrize("ask", ["latest", "check"])
def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path, ask):
    filled(tmp_path)
    other = {"seed": 1, "trainer": {"args": {"learning_rate": 2e-3, "optim": "sgd"}}, "names": ("a", "b")}
    with pytest.raises(UnfedError) as raised:
        getattr(Checkpoints(tmp_path, other), ask)()
    text = str(raised.value)
    assert "seed (was 0, now 1)" in text
    assert "trainer.args.learning_rate (was 0.001, now 0.002)" in text
    assert "trainer.args.optim (was absent, now 'sgd')" in text
    assert "names" not in text and "overwrite=true" in text


def test_checking_early_compares_what_is_known_early(tmp_path):
    Checkpoints(tmp_path, {**CONFIG, "inputs": {"adapter": "sha256:1"}}).save(state(1), [])
    Checkpoints(tmp_path, CONFIG).check()
    with pytest.raises(UnfedError, match=r"inputs\.adapter \(was 'sha256:1', now 'sha256:2'\)"):
        Checkpoints(tmp_path, {**CONFIG, "inputs": {"adapter": "sha256:2"}}).latest()


def test_differing_keys_see_through_tuples():
    assert differing_keys({"a": [1, 2], "b": {"c": None}}, {"a": (1, 2), "b": {"c": None}}) == []
    assert differing_keys({"a": [1, 2]}, {"a": [2, 1]}) == ["a (was [1, 2], now [2, 1])"]


@pytest.mark.parametrize("broken", ["os.replace", "unfed.base.artifacts.save_file"])
def test_a_full_disk_leaves_the_round_before_whole(tmp_path, monkeypatch, broken):
    found = filled(tmp_path, rounds=2)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(broken, full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        found.save(state(3), [])
    monkeypatch.undo()
    assert names(tmp_path) == ["round_00001", "round_00002"] and found.latest()[0].round == 2
