"""What clients keep for themselves reaches back as far as the checkpoints do."""

from __future__ import annotations

import pytest
import torch

from unfed.base.types import AdapterState
from unfed.federated.store import ClientStore


def state(value: float) -> AdapterState:
    return AdapterState({"x": torch.full((2,), value)})


def value(store: ClientStore, round_: int) -> float | None:
    found = store.get("c0", "kind", round_)
    return None if found is None else float(found["x"][0])


@pytest.fixture(params=["memory", "disk"])
def make(request, tmp_path):
    return lambda **given: ClientStore(tmp_path if request.param == "disk" else None, **given)


def test_the_last_entries_stay(make):
    store = make(keep=3)
    for n in range(12):
        store.put("c0", "kind", n, state(n))
    assert [value(store, n) for n in (12, 11, 10, 9, 4)] == [11.0, 10.0, 9.0, None, None]


def test_with_every_nth_checkpoint_what_a_client_had_then_stays_too(make):
    """Round 4's checkpoint is the state before round 4 (from 0); this client took part in rounds 0, 2, 3, 5, 9, ..."""
    store = make(keep=2, every=4)
    for n in (0, 2, 3, 5, 9, 10, 11, 12, 13):
        store.put("c0", "kind", n, state(n))
    assert [value(store, n) for n in (4, 8, 12, 13, 14)] == [3.0, 5.0, 11.0, 12.0, 13.0]
    store.put("c0", "kind", 8, state(80.0))  # the run went back to round 8
    assert [value(store, n) for n in (4, 8, 9, 12)] == [3.0, 5.0, 80.0, 80.0]
