"""Messages between machines: they come back as they went, and nothing else is read."""

from __future__ import annotations

import dataclasses
import io
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unfed.app.tasks import PARTS, read_task, task_message
from unfed.base.errors import ConfigError
from unfed.base.types import AdapterState, Broadcast, ClientUpdate
from unfed.federated import messages
from unfed.federated.messages import Message, MessageError, read_broadcast, read_update, update_message
from unfed.federated.schedule import FitTask, Phase, Work
from unfed.objectives.gru import GRU
from unfed.objectives.nll import NLL
from unfed.objectives.npo import NPO
from unfed.objectives.proximal import Proximal
from unfed.objectives.registry import OBJECTIVES
from unfed.objectives.rmu import RMU
from unfed.unlearning.pga import Ball

A, B = "m.lora_A.weight", "m.lora_B.weight"
STATE = AdapterState({A: torch.arange(6.0).view(2, 3), B: torch.ones(3, 2, dtype=torch.bfloat16)})
OTHER = AdapterState({A: -torch.ones(2, 3), B: torch.zeros(3, 2, dtype=torch.bfloat16)})


def same(one: AdapterState, other: AdapterState) -> bool:
    return one.digest() == other.digest()


def sent(message: Message) -> Message:
    return Message.unpack(message.pack())


def test_a_message_comes_back_bit_for_bit():
    found = sent(Message({"n": 3, "names": ["ä", "b"]}, {"one": STATE, "two": OTHER}))
    assert found.head == {"n": 3, "names": ["ä", "b"]}
    assert list(found.states) == ["one", "two"]
    assert same(found.states["one"], STATE) and same(found.states["two"], OTHER)


def test_a_tensor_that_is_a_view_travels_as_what_it_shows():
    wide = AdapterState({A: torch.arange(8.0).view(4, 2).T[:1]})
    assert torch.equal(sent(Message({}, {"s": wide})).states["s"][A], torch.tensor([[0.0, 2.0, 4.0, 6.0]]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        Message({"a": 1}).pack() + b"x",
        Message({"a": 1}, {"s": STATE}).pack()[:-1],
        Message({"a": 1}, {"s": STATE}).pack().replace(b"F32", b"F99"),
    ],
)
def test_other_bytes_are_refused(data):
    with pytest.raises(MessageError):
        Message.unpack(data)


def test_a_head_that_claims_more_tensors_than_there_are_is_refused():
    for states in ([["s", 2]], [["s", "many"]], [[1, 1]], [["s"]], 7):
        text = json.dumps({"head": {}, "states": states}).encode()
        with pytest.raises(MessageError):
            Message.unpack(struct.pack("<Q", len(text)) + text)


@given(st.binary(max_size=200), st.integers(0, 60))
def test_random_bytes_never_raise_anything_else(noise, place):
    whole = Message({"a": [1, "b"]}, {"s": STATE}).pack()
    for data in (noise, whole[:place] + noise + whole[place + len(noise) :]):
        try:
            Message.unpack(data)
        except MessageError:
            continue


def test_a_message_larger_than_allowed_is_refused():
    data = Message({}, {"s": STATE}).pack()
    assert Message.unpack(data, len(data)).states
    with pytest.raises(MessageError, match="larger than what is taken"):
        Message.unpack(data, len(data) - 1)


def test_frames_of_a_pipe_follow_one_another():
    pipe = io.BytesIO()
    for data in (b"one", b"", b"three"):
        messages.write_frame(pipe, data)
    pipe.seek(0)
    assert [messages.read_frame(pipe) for _ in range(4)] == [b"one", b"", b"three", None]
    pipe = io.BytesIO(pipe.getvalue()[:-1])
    assert [messages.read_frame(pipe) for _ in range(2)] == [b"one", b""]
    with pytest.raises(MessageError, match="breaks off"):
        messages.read_frame(pipe)


def test_an_update_comes_back_and_speaks_for_its_own_client_alone():
    update = ClientUpdate("c", STATE, 7, {"loss": 0.5}, 96)
    message = sent(update_message(update))
    found = read_update(message, "c")
    assert same(found.adapter, STATE)
    assert (found.num_examples, found.metrics, found.nbytes) == (7, {"loss": 0.5}, 96)
    with pytest.raises(MessageError, match="is of 'c'"):
        read_update(message, "d")


@pytest.mark.parametrize(
    ("key", "value"), [("num_examples", 7.5), ("num_examples", True), ("metrics", {"loss": "low"}), ("client", None)]
)
def test_an_update_that_says_something_else_is_refused(key, value):
    message = update_message(ClientUpdate("c", STATE, 7))
    with pytest.raises(MessageError):
        read_update(Message({**message.head, key: value}, message.states), "c")


def test_tensors_that_stay_at_the_client_do_not_travel_and_begin_with_the_runs_own():
    broadcast = Broadcast(OTHER, frozen=frozenset({A}), local=frozenset({B}))
    message = sent(messages.broadcast_message({}, broadcast, "c"))
    assert list(message.states["adapter"]) == [A]
    client, found = read_broadcast(message, STATE)
    assert client == "c"
    assert (found.frozen, found.local) == ({A}, {B})
    assert same(found.adapter, AdapterState({A: OTHER[A], B: STATE[B]}))


def test_a_client_with_a_rank_of_its_own_gets_that_and_the_residual():
    small = AdapterState({A: torch.ones(1, 3), B: torch.ones(3, 1)})
    broadcast = Broadcast(STATE, residual=OTHER, own={"c": small})
    _, found = read_broadcast(sent(messages.broadcast_message({}, broadcast, "c")), STATE)
    assert same(found.start("c"), small) and same(found.adapter, STATE)
    assert found.residual is not None and same(found.residual, OTHER)
    _, found = read_broadcast(sent(messages.broadcast_message({}, broadcast, "d")), OTHER)
    assert same(found.start("d"), STATE)


def fields_of(value):
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


@pytest.mark.parametrize(
    "objective",
    [
        *(cls() for name, cls in sorted(OBJECTIVES.items())),
        NLL("forget"),
        RMU(trainable_params_regex=("a", "b"), control_vec=(0.5, -0.25), seed=3),
        Proximal(GRU(NPO(beta=0.3), gamma=0.7), 0.02),
    ],
    ids=lambda o: o.name,
)
def test_every_objective_comes_back_equal(objective):
    work = Work("forget", objective, 1.5, spread=True, shown="x", args={"optim": "sgd", "optim_args": None})
    task = FitTask(Phase("local", 3, {"c": work, "d": Work("train", NLL(), 1.0)}), 4, 2)
    found, broadcast, client = read_task(sent(task_message(task, Broadcast(STATE), "c")), STATE)
    assert found == FitTask(Phase("local", 3, {"c": work}), 4, 2)
    assert client == "c" and same(broadcast.adapter, STATE)


def test_a_constraint_brings_its_adapters():
    work = Work("forget", PARTS["GradAscent"](), 5.0, constraint=Ball(0.5, 0.25, STATE, OTHER))
    task = FitTask(Phase("ascent", 1, {"c": work}, rule="adopt"), 0, 0)
    found, broadcast, _ = read_task(sent(task_message(task, Broadcast(OTHER), "c")), STATE)
    ball = found.phase.work["c"].constraint
    assert isinstance(ball, Ball) and (ball.radius, ball.reach) == (0.5, 0.25)
    assert same(ball.center, STATE) and same(ball.last, OTHER) and same(broadcast.adapter, OTHER)


def test_work_made_of_anything_else_is_neither_sent_nor_made():
    @dataclasses.dataclass(frozen=True)
    class NLL:  # the name alone is not enough
        rows: str = "train"

    task = FitTask(Phase("p", 1, {"c": Work("train", NLL(), 1.0)}), 0, 0)
    with pytest.raises(TypeError, match="no part of a client's work"):
        task_message(task, Broadcast(STATE), "c")
    good = task_message(
        FitTask(Phase("p", 1, {"c": Work("train", OBJECTIVES["NLL"](), 1.0)}), 0, 0), Broadcast(STATE), "c"
    )

    def altered(**objective):
        work = {**good.head["work"], "objective": objective}
        return Message({**good.head, "work": work}, good.states)

    with pytest.raises(MessageError, match="unknown, 'Popen'"):
        read_task(altered(**{"is": "Popen", "args": ["id"]}), STATE)
    with pytest.raises(MessageError, match="does not fit this release"):
        read_task(altered(**{"is": "NPO", "gama": 1.0}), STATE)
    with pytest.raises(ConfigError, match="beta"):
        read_task(altered(**{"is": "NPO", "beta": -1.0}), STATE)
    with pytest.raises(MessageError, match="lacks an adapter"):
        read_task(altered(state="part9"), STATE)
    with pytest.raises(MessageError, match="no task"):
        read_task(Message({**good.head, "phase_round": 1}, good.states), STATE)


def raw(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


@pytest.mark.parametrize(
    "value",
    ['"\\ud800"', '{"\\udfff": 1}', "NaN", "-Infinity", "1e999", "1" + "0" * 40, "[" * 70 + "]" * 70, "[[" * 5000],
    ids=["half a pair", "in a name", "NaN", "infinite", "too large", "a long number", "deep", "very deep"],
)
def test_a_head_that_could_not_be_counted_with_or_written_is_refused(value):
    """Each would have ended the server's run where it was compared, printed or written to the record."""
    data = raw(f'{{"head": {{"refused": {value}}}, "states": []}}')
    for read in (Message.unpack, Message.peek):
        with pytest.raises(MessageError):
            read(data)
    assert Message.unpack(raw('{"head": {"é": "\\ud83d\\ude00", "n": [1, 2.5, null, true]}, "states": []}')).head


def tensor_file(name: str, dtype: str, nbytes: int) -> bytes:
    header = json.dumps({name: {"dtype": dtype, "shape": [4], "data_offsets": [0, nbytes]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\1" * nbytes


@pytest.mark.parametrize(("dtype", "nbytes"), [("F8_E4M3", 4), ("C64", 32), ("F4", 2), ("U64", 32)])
def test_a_tensor_of_a_dtype_that_nobody_sends_is_refused(dtype, nbytes):
    """Not all of torch's dtypes can be summed up to see whether they are finite."""
    blob = tensor_file("x", dtype, nbytes)
    with pytest.raises(MessageError):
        Message.unpack(raw('{"head": {}, "states": [["s", 1]]}') + struct.pack("<Q", len(blob)) + blob)


def test_a_tensor_or_state_that_comes_twice_and_a_count_that_is_none_are_refused():
    blob = tensor_file("x", "F32", 16)
    piece = struct.pack("<Q", len(blob)) + blob
    assert list(Message.unpack(raw('{"head": {}, "states": [["s", 1]]}') + piece).states["s"]) == ["x"]
    for states, pieces in (('[["s", 2]]', 2), ('[["s", 1], ["s", 1]]', 2), ('[["s", true]]', 1), ('[["s", -1]]', 0)):
        with pytest.raises(MessageError):
            Message.unpack(raw(f'{{"head": {{}}, "states": {states}}}') + piece * pieces)


@pytest.mark.parametrize("value", [{"loss": True}, {"loss": float("nan")}])
def test_metrics_that_are_no_numbers_are_refused(value):
    message = update_message(ClientUpdate("c", STATE, 7))
    with pytest.raises(MessageError, match="metrics"):
        read_update(Message({**message.head, "metrics": value}, message.states), "c")


def test_fewer_than_no_bytes_cannot_have_travelled():
    message = update_message(ClientUpdate("c", STATE, 7))
    with pytest.raises(MessageError, match="nbytes is -5"):
        read_update(Message({**message.head, "nbytes": -5}, message.states), "c")


@pytest.mark.parametrize("head", [{"round": -1}, {"round": 100_000}, {"phase_round": 9}, {"rounds": 0}])
def test_a_round_that_no_run_has_is_refused(head):
    """What a client keeps has the round in its name: of five digits, or it would never be found and deleted."""
    from unfed.app.tasks import read_work, work_of

    made, states = work_of(FitTask(Phase("p", 9, {"c": Work("train", NLL(), 1.0)}), 3, 2), "c")
    assert read_work(Message(made, states), "c").round == 3
    with pytest.raises(MessageError, match="no task"):
        read_work(Message({**made, **head}, states), "c")
