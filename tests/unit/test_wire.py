"""The wire formats by hand-made numbers, and the two ends: bytes, what is remembered, what does not travel."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from safetensors.torch import load, save

from unfed.aggregation.registry import build_aggregator
from unfed.app.wire import ServerEnd
from unfed.base.errors import ConfigError
from unfed.base.params import hyperparameters
from unfed.base.types import SERVER, AdapterState, Broadcast, ClientUpdate, ServerState
from unfed.federated.messages import Message, MessageError, update_message
from unfed.federated.rounds import RoundsConfig, RunKeeper, run_rounds
from unfed.federated.schedule import FitTask, Phase, Schedule, Work
from unfed.federated.store import ClientStore
from unfed.federated.transport import InProcess
from unfed.federated.wire import WIRES, BFloat16, Float32, Int8, TopK, build_wire, wire_problems
from unfed.federated.wired import LOST, ClientEnd, Wired, pack_broadcast, unpack_broadcast, unpack_update
from unfed.objectives.nll import NLL

A, B = "m.lora_A.weight", "m.lora_B.weight"
CHANGE = AdapterState({A: torch.tensor([[1.0, -2.0, 0.5]]), B: torch.tensor([[0.25], [-127.0]])})
PHASE = Phase("p", 4, {"c": Work("train", NLL(), 1.0)})


def task(round_: int = 0) -> FitTask:
    return FitTask(PHASE, round_, round_)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def read(wire, change=CHANGE):
    return wire.decode(load(save(wire.encode(change, generator()))), change)


def test_float32_loses_nothing_and_bfloat16_keeps_eight_bits_of_each():
    assert read(Float32()).digest() == CHANGE.digest()
    one = AdapterState({A: torch.tensor([[1.0 + 2**-7 + 2**-9]])})
    assert read(BFloat16(), one)[A].item() == 1.0 + 2**-7


def test_int8_by_hand():
    arrays = Int8().encode(CHANGE, generator())
    assert arrays["scales"].tolist() == pytest.approx([2 / 127, 1.0])
    # 1 / (2/127) = 63.5, rounded to the even 64; 0.25 and -127 in steps of 1
    assert arrays["values"].tolist() == [64, -127, 32, 0, -127]
    found = read(Int8())
    torch.testing.assert_close(found[A], torch.tensor([[64 * 2 / 127, -2.0, 32 * 2 / 127]]))
    assert found[B].flatten().tolist() == [0.0, -127.0]


def test_int8_has_a_scale_for_each_rank_where_it_is_asked_for():
    change = AdapterState({A: torch.tensor([[1.0, 0, 0], [0, 100, 0]]), B: torch.tensor([[1.0, 0], [0, 5], [0, 0]])})
    arrays = Int8(scale="slice").encode(change, generator())
    assert arrays["scales"].tolist() == pytest.approx([1 / 127, 100 / 127, 1 / 127, 5 / 127])
    torch.testing.assert_close(dict(read(Int8(scale="slice"), change)), dict(change))


def test_rounding_at_random_is_right_on_the_average_and_seeded():
    change = AdapterState({A: torch.cat([torch.full((20_000,), 0.3), torch.tensor([127.0])])})
    wire = Int8(rounding="stochastic")
    found = read(wire, change)[A][:-1]
    assert set(found.tolist()) == {0.0, 1.0}
    assert found.mean().item() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 20_000))  # five standard deviations
    assert read(wire, change).digest() == read(wire, change).digest()


def test_topk_by_hand():
    arrays = TopK(fraction=0.4).encode(CHANGE, generator())
    assert arrays["values"].tolist() == [-2.0, -127.0]
    assert arrays["mask"].tolist() == [0b10010] and arrays["mask"].dtype == torch.uint8
    found = read(TopK(fraction=0.4))
    assert found[A].tolist() == [[0.0, -2.0, 0.0]] and found[B].flatten().tolist() == [0.0, -127.0]
    assert len(TopK(fraction=0.2001).encode(CHANGE, generator())["values"]) == 2  # ceil(1.0005)


def test_topk_in_steps_of_its_tensors():
    """A scale for each tensor, from what is sent of it: 2/127 and 1."""
    change = AdapterState({A: torch.tensor([[0.01, -2.0, 1.0]]), B: torch.tensor([[0.1], [-127.0]])})
    arrays = TopK(fraction=0.6, values="int8").encode(change, generator())
    assert arrays["values"].tolist() == [-127, 64, -127] and arrays["mask"].tolist() == [0b10110]
    torch.testing.assert_close(arrays["scales"], torch.tensor([2 / 127, 1.0]))
    found = read(TopK(fraction=0.6, values="int8"), change)
    torch.testing.assert_close(found[A], torch.tensor([[0.0, -2.0, 64 * 2 / 127]]))
    assert found[B].flatten().tolist() == [0.0, -127.0]
    rounded = read(TopK(fraction=0.2, values="bfloat16"), AdapterState({A: torch.tensor([[1.003, 0.0]])}))
    assert rounded[A].tolist() == [[1.0, 0.0]]  # bfloat16 has 1 and 1.0078125 there


def test_topk_counts_its_indices_in_blocks():
    change = AdapterState({A: torch.zeros(3 * 65_536)})
    for place in (65_535, 65_536, 3 * 65_536 - 1):
        change[A][place] = 1.0 + place
    wire = TopK(fraction=3 / change.numel)
    arrays = wire.encode(change, generator())
    assert arrays["counts"].tolist() == [1, 1, 1] and arrays["offsets"].tolist() == [65_535, 0, 65_535]
    assert read(wire, change).digest() == change.digest()


@pytest.mark.parametrize(
    ("wire", "bits"),
    [
        (Float32(), 32),
        (BFloat16(), 16),
        (Int8(), 8),
        (TopK(), 2.4),
        (TopK(fraction=0.01), 0.48),
        (TopK(fraction=0.1), 4.2),
        (TopK(fraction=0.27, values="int8"), 3.16),
    ],
)
def test_what_a_message_weighs(wire, bits):
    change = AdapterState({f"{n}.lora_A.weight": torch.randn(16, 512, generator=generator()) for n in range(8)})
    packed = ClientEnd(wire).pack(task(0), "c", AdapterState({n: torch.zeros(16, 512) for n in change}), change)
    assert len(packed.data) == pytest.approx(bits / 8 * 65_536, rel=0.01, abs=350)  # header, scales, counts
    assert wire.up_bytes * 8 == pytest.approx(bits)


@pytest.mark.parametrize("name", sorted(WIRES))
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_arrives_so_and_is_not_remembered(name, broken):
    end = ClientEnd(build_wire(name, {}))
    after = AdapterState({A: torch.tensor([[1.0, broken, 0.5]]), B: CHANGE[B]})
    start = AdapterState({A: torch.zeros(1, 3), B: torch.zeros(2, 1)})
    found = unpack_update(end.wire, end.pack(task(0), "c", start, after).data, start)
    assert found.problems_against(start) == [f"{A} has values that are not finite"]
    assert end.store.get("c", LOST, 1) is None


def test_nothing_is_lost_of_a_change_of_zero_or_of_a_tensor_without_values():
    nothing = AdapterState({A: torch.zeros(2, 3), B: torch.zeros(0, 2), "bias": torch.tensor(0.0)})
    for name in WIRES:
        assert read(build_wire(name, {}), nothing).digest() == nothing.digest()


@pytest.mark.parametrize(
    ("wire", "spoil", "said"),
    [
        (Int8(), {"values": torch.zeros(4, dtype=torch.int8)}, r"values is torch.int8 of shape \(4,\)"),
        (Int8(), {"values": torch.zeros(5)}, "values is torch.float32"),
        (TopK(), {"mask": None}, "the message has no counts"),
        (TopK(), {"mask": torch.tensor([32], dtype=torch.uint8)}, "mask points beyond the 5 values"),
        (TopK(), {"mask": torch.tensor([1, 0], dtype=torch.uint8)}, r"mask is torch.uint8 of shape \(2,\)"),
        (TopK(), {"mask": torch.tensor([3], dtype=torch.uint8)}, r"not torch.float32 of shape \(2,\)"),
        (BFloat16(), {"values": None}, "the message has no values"),
        (BFloat16(), {"buffer.x": torch.zeros(1)}, "other buffers than the adapter: x"),
    ],
)
def test_a_message_that_does_not_fit_is_refused(wire, spoil, said):
    arrays = {**wire.encode(CHANGE, generator()), **spoil}
    data = save({n: t for n, t in arrays.items() if t is not None})
    with pytest.raises(ValueError, match=said):
        unpack_update(wire, data, CHANGE)


def test_positions_that_do_not_fit_are_refused():
    change = AdapterState({A: torch.arange(100.0)})
    wire = TopK(fraction=0.01)
    arrays = wire.encode(change, generator())
    assert (arrays["offsets"].tolist(), arrays["counts"].tolist()) == ([99], [1])
    for spoil, said in (
        ({"offsets": torch.tensor([100], dtype=torch.uint16)}, "offsets points beyond the 100 values"),
        ({"counts": torch.tensor([-1], dtype=torch.int32)}, "counts has a number below 0"),
        ({"counts": torch.tensor([2], dtype=torch.int32)}, r"offsets is torch.uint16 of shape \(1,\)"),
    ):
        with pytest.raises(ValueError, match=said):
            unpack_update(wire, save({**arrays, **spoil}), change)


def test_names_and_limits():
    assert "int8" in wire_problems("int4", {})[0]
    assert wire_problems("topk", {"fraction": 0}) and wire_problems("float32", {"error_feedback": True})
    with pytest.raises(ConfigError, match=r"wire\.rounding"):
        build_wire("int8", {"rounding": "up"})
    assert hyperparameters(TopK) == {
        "down": "float32",
        "fraction": 0.05,
        "values": "float32",
        "error_feedback": True,
    }


def fit_of(by: dict[str, torch.Tensor], seen: list | None = None):
    """A client that adds ``by`` to what it got."""

    def fit(task, broadcast, client_id):
        start = broadcast.start(client_id)
        if seen is not None:
            seen.append(broadcast)
        sent = broadcast.returned(client_id)
        return ClientUpdate(client_id, AdapterState({n: start[n] + by[n] for n in sent}), 10, {"loss": 1.0})

    return fit


START = AdapterState({A: torch.tensor([[1.0, 2.0, 3.0]]), B: torch.tensor([[0.0], [1.0]])})


def test_what_was_lost_is_added_to_the_next_change():
    """Two rounds of [1, 0.6, 0] in the largest of 3 entries: round 0 sends 1, round 1 sends 1.2 = 0.6 + 0.6."""
    by = {A: torch.tensor([[1.0, 0.6, 0.0]])}
    start = AdapterState({A: torch.zeros(1, 3)})
    wired = Wired(fit_of(by), ClientEnd(TopK(fraction=0.33)))
    first = wired(task(), Broadcast(start), "c")
    assert first.adapter[A].tolist() == [[1.0, 0.0, 0.0]] and first.metrics["loss"] == 1.0
    assert first.metrics["wire_lost"] == pytest.approx(0.6 / math.sqrt(1.36))
    second = wired(task(1), Broadcast(start), "c")
    assert second.adapter[A].flatten().tolist() == pytest.approx([0.0, 1.2, 0.0])
    forgetful = Wired(fit_of(by), ClientEnd(TopK(fraction=0.33, error_feedback=False)))
    for number in range(2):
        assert forgetful(task(number), Broadcast(start), "c").adapter[A].tolist() == [[1.0, 0.0, 0.0]]


def test_a_round_done_again_finds_what_the_client_had_then(tmp_path):
    by = {A: torch.tensor([[1.0, 0.6, 0.0]])}
    start = AdapterState({A: torch.zeros(1, 3)})
    first = Wired(fit_of(by), ClientEnd(TopK(fraction=0.33), ClientStore(tmp_path)))
    kept = [first(task(n), Broadcast(start), "c").adapter.digest() for n in range(4)]
    again = Wired(fit_of(by), ClientEnd(TopK(fraction=0.33), ClientStore(tmp_path)))
    assert [again(task(n), Broadcast(start), "c").adapter.digest() for n in (2, 3)] == kept[2:]
    assert len(set(kept)) > 1


def test_tensors_that_stay_away_keep_their_memory():
    """RoLoRA trains B in one round and A in the next: what A lost waits for A."""
    by = {A: torch.tensor([[0.0, 0.5, 1.0]]), B: torch.tensor([[0.25], [1.0]])}
    end = ClientEnd(TopK(fraction=0.3))
    wired = Wired(fit_of(by), end)
    wired(task(0), Broadcast(START, frozen=frozenset({B})), "c")
    update = wired(task(1), Broadcast(START, frozen=frozenset({A})), "c")
    assert set(update.adapter) == {B} and update.adapter[B].flatten().tolist() == [0.0, 2.0]
    memory = end.store.get("c", LOST, 2)
    assert memory is not None
    assert memory[A].tolist() == [[0.0, 0.5, 0.0]] and memory[B].flatten().tolist() == [0.25, 0.0]


def test_a_phase_begins_without_the_memory_of_the_one_before():
    """What the targets lost while they learned what the server then subtracts must not arrive afterwards."""
    by = {A: torch.tensor([[1.0, 0.6, 0.0]])}
    wired = Wired(fit_of(by), ClientEnd(TopK(fraction=0.33)))
    start = Broadcast(AdapterState({A: torch.zeros(1, 3)}))
    wired(task(0), start, "c")
    fresh = FitTask(Phase("next", 2, PHASE.work), 1, 0)
    assert wired(fresh, start, "c").adapter[A].tolist() == [[1.0, 0.0, 0.0]]
    later = FitTask(fresh.phase, 2, 1)
    assert wired(later, start, "c").adapter[A].flatten().tolist() == pytest.approx([0.0, 1.2, 0.0])


def test_memory_of_another_shape_is_dropped():
    end = ClientEnd(TopK(fraction=0.5))
    end.store.put("c", LOST, 0, AdapterState({A: torch.ones(2, 3)}))
    start = AdapterState({A: torch.zeros(1, 3)})
    end.pack(task(1), "c", start, AdapterState({A: torch.tensor([[3.0, 2.0, 1.0]])}))
    memory = end.store.get("c", LOST, 2)
    assert memory is not None and memory[A].tolist() == [[0.0, 0.0, 1.0]]


def test_a_broadcast_in_sixteen_bits():
    exact = AdapterState({A: torch.tensor([[1.0 + 2**-12, 2.0, 3.0]]), B: START[B]})
    own = AdapterState({A: torch.tensor([[5.0]]), B: torch.tensor([[0.5], [0.75]])})
    residual = AdapterState({"m.lora_A.weight": torch.full((3, 3), 0.1)})
    sent = Broadcast(exact, residual, frozen=frozenset(), local=frozenset({B}), own={"d": own})
    wire = Float32(down="bfloat16")
    data = pack_broadcast(wire, sent, "c")
    assert data is not None and set(load(data)) == {f"adapter.{A}", f"residual.{A}"}
    seen: list[Broadcast] = []
    by = {A: torch.tensor([[2**-12, 0.0, 0.0]]), B: torch.zeros(2, 1)}
    update = Wired(fit_of(by, seen), ClientEnd(wire))(task(), sent, "c")
    (got,) = seen
    assert got.start("c")[A].tolist() == [[1.0, 2.0, 3.0]] and got.start("c")[B] is START[B]
    assert got.residual is not None and got.residual[A][0, 0].item() == pytest.approx(0.1, rel=2**-8)
    # The server adds the change to its own adapter, which nobody has rounded.
    assert update.adapter[A][0, 0].item() == 1.0 + 2 * 2**-12 and update.nbytes_down == len(data)
    other = unpack_broadcast(pack_broadcast(wire, sent, "d") or b"", sent, "d")
    assert other.start("d")[A].tolist() == [[5.0]] and other.adapter is exact
    assert pack_broadcast(Int8(), sent, "c") is None


def test_integer_tensors_and_dtypes_pass():
    start = AdapterState({A: torch.ones(1, 3, dtype=torch.bfloat16), "steps": torch.tensor([3])})
    after = AdapterState({A: torch.full((1, 3), 1.5, dtype=torch.bfloat16), "steps": torch.tensor([4])})
    found = unpack_update(Int8(), ClientEnd(Int8()).pack(task(0), "c", start, after).data, start)
    assert found[A].dtype == torch.bfloat16 and found[A].tolist() == [[1.5] * 3] and found["steps"].item() == 4


def test_rounds_average_what_was_decoded_and_count_its_bytes():
    by = {A: torch.tensor([[1.0, 0.004, 0.0]]), B: torch.tensor([[0.0], [0.0]])}
    plan = Schedule((Phase("p", 1, {c: Work("train", NLL(), 1.0) for c in ("c", "d")}),))

    def fit(task, broadcast, client_id):
        if client_id == "d":
            raise RuntimeError("on fire")
        return fit_of(by)(task, broadcast, client_id)

    keep = RunKeeper()
    wired = Wired(fit, ClientEnd(Int8(down="bfloat16", error_feedback=False)))
    end = run_rounds(
        plan, InProcess(wired), build_aggregator("FedAvg", {}), ServerState(0, START), RoundsConfig(), keep
    )
    # 0.004 is half of a step of 1/127 and a bit: it arrives as one.
    assert end.adapter[A].flatten().tolist() == pytest.approx([2.0, 2.0 + 1 / 127, 3.0])
    (record,) = keep.records
    down = pack_broadcast(Float32(down="bfloat16"), Broadcast(START), "c")
    assert down is not None and record.failures == {"d": "RuntimeError: on fire"}
    # The client that failed says nothing of what it received: counted as the tensors are.
    assert record.bytes_down == len(down) + START.nbytes
    packed = ClientEnd(Int8()).pack(task(0), "c", START, AdapterState({n: t + by[n] for n, t in START.items()}))
    assert record.bytes_up == len(packed.data)


def test_an_update_of_wrong_shape_is_left_for_the_server_to_name():
    def fit(task, broadcast, client_id):
        return ClientUpdate(client_id, AdapterState({A: torch.zeros(3, 3)}), 10)

    update = Wired(fit, ClientEnd(Int8()))(task(), Broadcast(START), "c")
    assert update.adapter[A].shape == (3, 3) and update.nbytes is None


def test_what_the_server_trains_itself_does_not_travel():
    seen: list[Broadcast] = []
    sent, by = Broadcast(START), {A: torch.full((1, 3), 0.3), B: torch.zeros(2, 1)}
    update = Wired(fit_of(by, seen), ClientEnd(Int8(down="bfloat16")))(task(), sent, SERVER)
    assert seen[0] is sent and update.nbytes is None and update.nbytes_down is None
    assert torch.equal(update.adapter[A], START[A] + 0.3)


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"), [("F4", [4], 2), ("F32", [2**63, 0], 0), ("F8_E4M3", [5], 5), ("F32", [4], 16)]
)
@pytest.mark.parametrize("name", sorted(WIRES))
def test_a_change_that_is_none_fails_its_client_and_no_more(name, dtype, shape, nbytes):
    """safetensors knows dtypes that torch, or we, do not; what is raised of them must not end the run."""
    header = json.dumps({"values": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    data = struct.pack("<Q", len(header)) + header + b"\1" * nbytes
    broadcast = Broadcast(AdapterState({A: torch.zeros(1, 3), B: torch.zeros(2, 1)}))
    message = update_message(ClientUpdate("c", broadcast.adapter, 1), data)
    with pytest.raises(MessageError, match=f"is not what wire={name} makes"):
        ServerEnd(build_wire(name, {})).decode(Message.unpack(message.pack()), broadcast, "c")


def test_more_bytes_than_the_tensors_have_cannot_have_travelled():
    broadcast = Broadcast(AdapterState({A: torch.zeros(1, 3)}))
    for nbytes in (None, 0, 12):
        message = update_message(ClientUpdate("c", broadcast.adapter, 1, nbytes=nbytes))
        assert ServerEnd(Float32()).decode(message, broadcast, "c").nbytes == nbytes
    with pytest.raises(MessageError, match="nbytes is 13"):
        ServerEnd(Float32()).decode(update_message(ClientUpdate("c", broadcast.adapter, 1, nbytes=13)), broadcast, "c")
