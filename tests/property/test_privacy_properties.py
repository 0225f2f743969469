"""Clipping holds as stored, whatever the dtype; without noise and with a wide bound it changes nothing."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unfed.aggregation.central import Central, CentralNoise, Clipping
from unfed.aggregation.fedavg import FedAvg
from unfed.aggregation.gaussian import clipped
from unfed.aggregation.privacy import CentralPrivacy
from unfed.aggregation.tree import delta, norm
from unfed.base.types import AdapterState, ClientUpdate, ServerState

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def drawn(seed: int, scale: float, dtype: torch.dtype) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    return AdapterState(
        {name: (torch.randn(shape, generator=g) * scale).to(dtype) for name, shape in (("a", (3, 5)), ("b", (7,)))}
    )


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scales=st.tuples(st.floats(1e-4, 100), st.floats(1e-4, 100)),
    bound=st.floats(1e-6, 1e3),
    dtype=DTYPES,
)
def test_a_clipped_update_is_never_further_than_the_bound(seed, scales, bound, dtype):
    start, update = drawn(seed, scales[0], dtype), drawn(seed + 1, scales[1], dtype)
    short, length = clipped(start, update, bound)
    assert norm(delta(short, start)) <= bound
    assert length == norm(delta(update, start))
    assert {n: (t.dtype, t.shape) for n, t in short.items()} == {n: (t.dtype, t.shape) for n, t in start.items()}
    if length <= bound:
        assert short is update
    elif dtype is torch.float32 and bound > 1e-2 * scales[0]:
        assert norm(delta(short, start)) >= bound * (1 - 1e-3), "no shorter than it must be"


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), clients=st.integers(1, 6), adaptive=st.booleans(), dtype=DTYPES)
def test_no_noise_and_a_wide_bound_are_plain_uniform_fedavg(seed, clients, adaptive, dtype):
    updates = [ClientUpdate(f"c{n}", drawn(seed + n, 1.0, dtype), n + 1) for n in range(clients)]
    central = Central(CentralPrivacy(clip=1e9, noise_multiplier=0.0, adaptive=adaptive), (float(clients),), 0)
    private = FedAvg(weighting="uniform", filters=(Clipping(central),), noise=CentralNoise(central))
    begin, plain = ServerState(0, drawn(seed - 1, 1.0, dtype)), FedAvg(weighting="uniform")
    ends = [rule.advance(begin, rule.combine(updates, clients, begin)).adapter for rule in (plain, private)]
    assert ends[0].digest() == ends[1].digest()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), clients=st.integers(1, 6), factor=st.floats(1, 1e3), bound=st.floats(1e-3, 10))
def test_one_client_moves_the_result_by_the_bound_over_the_expected_number(seed, clients, factor, bound):
    """The sensitivity that the noise is made for: what a client sends in place of nothing."""
    zero = AdapterState({n: torch.zeros_like(t) for n, t in drawn(0, 1.0, torch.float32).items()})
    begin = ServerState(0, zero)
    others = [ClientUpdate(f"c{n}", drawn(seed + n, 1.0, torch.float32), 1) for n in range(clients)]
    loud = ClientUpdate("loud", drawn(seed + 99, factor, torch.float32), 1000)
    central = Central(CentralPrivacy(clip=bound, noise_multiplier=0.0), (clients + 1.0,), 0)
    rule = FedAvg(weighting="uniform", filters=(Clipping(central),), noise=CentralNoise(central))
    ends = [rule.combine(given, clients + 1, begin).adapter for given in (others, [*others, loud])]
    assert norm(delta(*ends)) <= bound / (clients + 1) * (1 + 1e-5) + 1e-6
