"""What is kept for later requests: sums that add up, updates as they were, states to go back to."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch

from unfed.aggregation.registry import build_aggregator
from unfed.base.errors import ArtifactError, UnfedError
from unfed.base.types import AdapterState, ClientUpdate, ServerState
from unfed.federated.history import History, HistorySettings
from unfed.federated.history_writer import HistoryWriter
from unfed.federated.rounds import RoundsConfig, RunKeeper, run_rounds
from unfed.federated.schedule import Participation, Phase, Schedule, Work
from unfed.objectives.nll import NLL

CLIENTS = {"a": 1, "b": 3, "c": 4}
NAME = "m.lora_A.weight"


def state(*values: float) -> AdapterState:
    return AdapterState({NAME: torch.tensor([list(values)])})


class Walkers:
    """Clients that each move the adapter in a direction of their own, further in every round."""

    def fit(self, task, broadcast, client_ids):
        for client in client_ids:
            step = torch.tensor([[float(CLIENTS[client]), float(task.round + 1)]])
            yield ClientUpdate(client, AdapterState({NAME: broadcast.adapter[NAME] + step}), CLIENTS[client])


def walk(
    directory: Path, settings: HistorySettings, rounds: int = 3, rule: str = "FedAvg", **participation
) -> ServerState:
    aggregator = build_aggregator(rule, {})
    history = HistoryWriter(directory, settings, aggregator)
    schedule = Schedule((Phase("finetune", rounds, {c: Work("train", NLL(), 1.0) for c in CLIENTS}),))
    start = ServerState(0, state(0.0, 0.0))
    history.begin(start)
    config = RoundsConfig(0, Participation(**participation))
    return run_rounds(schedule, Walkers(), aggregator, start, config, RunKeeper(history=history))


def test_sums_are_each_clients_share_and_what_the_others_alone_would_have_made(tmp_path):
    """Shares 1/8, 3/8, 4/8. Steps (n, t) for n = 1, 3, 4 and t = 1, 2, 3, so sums of t are 6.

    Own: share * (3 n, 6). Without b: mean of 1 and 4 with weights 1 and 4 is 17/5 a round.
    """
    walk(tmp_path, HistorySettings(("sums",)))
    kept = History(tmp_path)
    assert kept.summed_clients() == ["a", "b", "c"]
    assert torch.allclose(kept.sums("a").own[NAME], torch.tensor([[3 / 8, 6 / 8]]))
    assert torch.allclose(kept.sums("b").own[NAME], torch.tensor([[27 / 8, 18 / 8]]))
    assert torch.allclose(kept.sums("b").others[NAME], torch.tensor([[51 / 5, 6.0]]))
    assert len(list((tmp_path / "history" / "sums").iterdir())) == 3


def test_own_sums_add_up_to_the_whole_way(tmp_path):
    end = walk(tmp_path, HistorySettings(("sums",)), rounds=5, fraction_fit=0.67)
    kept = History(tmp_path)
    total = sum(kept.sums(c).own[NAME] for c in kept.summed_clients())
    assert torch.allclose(total, end.adapter[NAME] - kept.start()[NAME], atol=1e-5)


def test_a_client_that_comes_late_finds_all_rounds_before_in_the_others_sum(tmp_path):
    end = walk(tmp_path, HistorySettings(("sums", "updates")), rounds=6, fraction_fit=0.34)
    kept = History(tmp_path)
    seen = {n: [c for c, _ in kept.updates(n)] for n in kept.update_rounds()}
    late = next(c for c in kept.summed_clients() if c not in seen[0])
    alone = [n for n, clients in seen.items() if clients == [late]]
    moved_alone = sum(next(iter(dict(kept.updates(n)).values())).delta[NAME] for n in alone)
    assert torch.allclose(kept.sums(late).others[NAME], end.adapter[NAME] - moved_alone, atol=1e-5)


def test_updates_of_every_second_round_with_their_example_counts(tmp_path):
    walk(tmp_path, HistorySettings(("updates",), every=2), rounds=4)
    kept = History(tmp_path)
    assert kept.update_rounds() == [0, 2] and kept.rounds() == []
    found = dict(kept.updates(2))
    assert {c: k.num_examples for c, k in found.items()} == CLIENTS
    assert torch.equal(found["c"].delta[NAME], torch.tensor([[4.0, 3.0]]))
    assert kept.update_of(2, "nobody") is None and kept.update_of(0, "b").num_examples == 3


def test_states_of_all_rounds_with_the_servers_optimizer(tmp_path):
    end = walk(tmp_path, HistorySettings(("rounds",)), rule="FedAdam")
    kept = History(tmp_path)
    assert kept.rounds() == [0, 1, 2, 3]
    last = kept.state(3)
    assert last.adapter.digest() == end.adapter.digest() and sorted(last.opt_state) == ["m", "v"]
    assert torch.equal(kept.state(0).adapter[NAME], torch.zeros(1, 2)) and not kept.state(0).opt_state


def test_files_are_the_owners_alone(tmp_path):
    walk(tmp_path, HistorySettings(("rounds", "updates", "sums")))
    for place in (tmp_path / "history").rglob("*"):
        mode = stat.S_IMODE(place.stat().st_mode)
        assert mode == (0o700 if place.is_dir() else 0o600), place


def test_rules_that_remember_have_no_sums(tmp_path):
    with pytest.raises(UnfedError, match=r"history=sums: FedAdam .* aggregator=FedAvg"):
        HistoryWriter(tmp_path, HistorySettings(("sums",)), build_aggregator("FedAdam", {}))


def test_going_on_drops_what_is_of_later_rounds(tmp_path):
    settings = HistorySettings(("rounds", "updates", "sums"))
    walk(tmp_path, settings)
    HistoryWriter(tmp_path, settings, build_aggregator("FedAvg", {})).begin(ServerState(2, state(0.0, 0.0)))
    kept = History(tmp_path)
    assert kept.rounds() == [0, 1, 2] and kept.update_rounds() == [0, 1]
    assert torch.allclose(kept.sums("a").own[NAME], torch.tensor([[2 / 8, 3 / 8]]))


def test_a_killed_process_leaves_no_part_of_an_update_behind(tmp_path):
    """Names as the writers of files and directories give them, and the updates set aside in an unfinished round."""
    settings = HistorySettings(("rounds", "updates", "sums"))
    walk(tmp_path, settings)
    root = tmp_path / "history"
    for left in ("updates/.round_00002.x.part", "sums/.round_00003.x.part", ".pending"):
        (root / left).mkdir()
        (root / left / "00000.safetensors").write_bytes(b"a client's update")
    (root / ".history.json.x.part").write_text("{}")
    HistoryWriter(tmp_path, settings, build_aggregator("FedAvg", {})).begin(ServerState(2, state(0.0, 0.0)))
    assert not [f for f in root.rglob("*") if f.name.startswith(".")]


@pytest.mark.parametrize("kind", ["sums", "rounds"])
def test_a_history_with_a_gap_is_not_gone_on_with(tmp_path, kind):
    walk(tmp_path, settings := HistorySettings((kind,)))
    shutil.rmtree(tmp_path / "history" / kind / "round_00002")
    writer = HistoryWriter(tmp_path, settings, build_aggregator("FedAvg", {}))
    with pytest.raises(ArtifactError, match=rf"the {kind} after round 2 are gone"):
        writer.begin(ServerState(2, state(0.0, 0.0)))


def test_a_start_that_was_altered_is_refused(tmp_path):
    walk(tmp_path, HistorySettings(("sums",)))
    file = tmp_path / "history" / "start.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x3f")
    with pytest.raises(ArtifactError, match=r"start\.safetensors is missing or was altered"):
        History(tmp_path).start()


def test_what_was_altered_is_refused(tmp_path):
    walk(tmp_path, HistorySettings(("updates",)))
    place = tmp_path / "history" / "updates" / "round_00001"
    file = place / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ArtifactError, match="altered"):
        History(tmp_path).update_of(1, "a")
    manifest = json.loads((place / "round.json").read_text())
    (place / "round.json").write_text(json.dumps(manifest | {"round": 7}))
    with pytest.raises(ArtifactError, match=r"round\.json was altered"):
        list(History(tmp_path).updates(1))


def test_size_is_told_beforehand(tmp_path):
    """An adapter of two float32 values is 8 bytes: 4 states, 2 rounds of 3 updates, 3 rounds of 6 sums, the start."""
    settings = HistorySettings(("rounds", "updates", "sums"), every=2)
    assert settings.nbytes(3, 3, state(0.0, 0.0), slots=0) == 8 * (1 + 4 + 6 + 18)
    walk(tmp_path, settings)
    files = list((tmp_path / "history").rglob("*.safetensors"))
    assert len(files) == 1 + 4 + 6 + 18
