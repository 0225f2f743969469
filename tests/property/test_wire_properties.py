"""What holds of every wire format on whatever change: error bounds, and that error feedback loses nothing for good."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unfed.base.types import AdapterState
from unfed.federated.schedule import FitTask, Phase, Work
from unfed.federated.wire import WIRES, BFloat16, Float32, Int8, TopK, Wire, flat
from unfed.federated.wired import LOST, ClientEnd, unpack_update
from unfed.objectives.nll import NLL

LOSSY = (
    BFloat16(),
    Int8(),
    Int8(scale="slice"),
    Int8(rounding="stochastic"),
    TopK(fraction=0.1),
    TopK(fraction=0.5),
    TopK(fraction=0.05, values="bfloat16"),
    TopK(fraction=0.3, values="int8"),
)


def task(round_: int) -> FitTask:
    return FitTask(Phase("p", 9, {"c": Work("train", NLL(), 1.0)}), round_, round_)


@st.composite
def changes(draw, rounds: int = 1) -> list[AdapterState]:
    """Changes of one adapter with factors, a bias and a convolution, of sizes that differ by orders of magnitude."""
    rank, wide, tall = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    shapes = {"a.lora_A.weight": (rank, wide), "a.lora_B.weight": (tall, rank), "bias": (tall,), "c": (rank, 2, 3, 1)}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = 10.0 ** draw(st.integers(-6, 4))
    return [
        AdapterState(
            {n: torch.randn(s, generator=generator) * size * 10.0**i for i, (n, s) in enumerate(shapes.items())}
        )
        for _ in range(rounds)
    ]


def zeros(like: AdapterState) -> AdapterState:
    return AdapterState({n: torch.zeros_like(t) for n, t in like.items()})


def there_and_back(wire: Wire, change: AdapterState) -> AdapterState:
    packed = ClientEnd(wire).pack(task(0), "c", zeros(change), change)
    return unpack_update(wire, packed.data, zeros(change))


@given(drawn=changes())
def test_a_round_trip_is_as_near_as_the_format_says(drawn):
    (change,) = drawn
    assert there_and_back(Float32(), change).digest() == change.digest()
    for wire, steps in ((Int8(), 0.5), (Int8(rounding="stochastic"), 1.0)):
        found = there_and_back(wire, change)
        for name, tensor in change.items():
            step = float(tensor.abs().max()) / 127
            assert float((found[name] - tensor).abs().max()) <= step * steps * (1 + 1e-4)
    fine = there_and_back(Int8(scale="slice"), change)
    rows = change["a.lora_A.weight"]
    if rows.shape[0] <= rows.shape[1]:
        step = rows.abs().amax(dim=1, keepdim=True) / 127
        assert bool(((fine["a.lora_A.weight"] - rows).abs() <= step * 0.5 * (1 + 1e-4)).all())
    halved = there_and_back(BFloat16(), change)
    for name, tensor in change.items():
        assert bool(((halved[name] - tensor).abs() <= 2**-8 * tensor.abs() + 1e-38).all())


@given(drawn=changes(), fraction=st.floats(0.01, 1.0))
def test_topk_keeps_the_largest_and_contracts(drawn, fraction):
    """``||x - C(x)||^2 <= (1 - k/N) ||x||^2`` (Stich et al. 2018, lemma A.1), which error feedback needs."""
    (change,) = drawn
    found, wanted = flat(there_and_back(TopK(fraction=fraction), change)), flat(change)
    k = math.ceil(fraction * len(wanted))
    assert int((found != 0).sum()) == k
    assert bool((found[found != 0] == wanted[found != 0]).all())
    assert k == len(wanted) or float(wanted[found == 0].abs().max()) <= float(found[found != 0].abs().min())
    lost = float((wanted - found).double().square().sum())
    assert lost <= (1 - k / len(wanted)) * float(wanted.double().square().sum()) * (1 + 1e-6)


@settings(max_examples=30)
@given(drawn=changes(rounds=6), wire=st.sampled_from(LOSSY))
def test_what_arrives_and_what_waits_add_up_to_what_was_done(drawn, wire):
    """The sum of decoded changes and the memory after the last round is the sum of the true changes; so the server is
    never further behind than one memory, however many rounds."""
    end, arrived = ClientEnd(wire), flat(zeros(drawn[0]))
    for number, change in enumerate(drawn):
        packed = end.pack(task(number), "c", zeros(change), change)
        arrived += flat(unpack_update(wire, packed.data, zeros(change)))
    memory = end.store.get("c", LOST, len(drawn))
    assert memory is not None
    done = sum(flat(c).double() for c in drawn)
    scale = max(float(flat(c).abs().max()) for c in drawn)
    torch.testing.assert_close(arrived.double() + flat(memory).double(), done, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", sorted(WIRES))
def test_equal_changes_are_equal_bytes(name):
    change = AdapterState({"a": torch.randn(3, 5, generator=torch.Generator().manual_seed(1))})
    one, two = (ClientEnd(WIRES[name](), seed=3).pack(task(2), "c", zeros(change), change).data for _ in range(2))
    assert one == two


def test_rounding_at_random_differs_between_clients_rounds_and_seeds():
    change = AdapterState({"a": torch.rand(400, generator=torch.Generator().manual_seed(1))})
    wire = Int8(rounding="stochastic")
    drawn = [("c", 0, 0), ("d", 0, 0), ("c", 1, 0), ("c", 0, 1)]
    found = {ClientEnd(wire, seed=s).pack(task(r), c, zeros(change), change).data for c, r, s in drawn}
    assert len(found) == 4
