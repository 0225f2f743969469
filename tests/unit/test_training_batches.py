"""Which rows make an optimizer step: each once an epoch, in an order of the seed, split into micro-batches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from unfed.base.errors import UnfedError
from unfed.base.seeding import torch_generator
from unfed.base.types import IGNORE_INDEX
from unfed.data.chat import EncodedExample
from unfed.training.batches import BatchPlan, Collation, TrainRows, plan_epoch, steps_per_epoch, totals_of

PAIR = frozenset({"forget", "retain"})
COLLATION = Collation(pad_token_id=0)


def rows(count: int, start: int = 0) -> list[EncodedExample]:
    found = []
    for i in range(start, start + count):
        ids = tuple(range(1, 5 + i % 7))
        found.append(EncodedExample(ids, (IGNORE_INDEX, IGNORE_INDEX, *ids[2:]), 2, example_id=f"r{i}"))
    return found


def plan(count=10, *, batch=2, accumulation=2, path=("fit", 0, "client_0"), workers=0) -> BatchPlan:
    given = TrainRows({"train": rows(count)})
    return BatchPlan(given, "train", frozenset({"train"}), batch, accumulation, path, workers)


def ids_of(steps) -> list[list[tuple[str, ...]]]:
    return [[m["train"].example_ids for m in s.micro] for s in steps]


def test_an_epoch_has_every_row_once():
    steps = list(plan(10).epoch(0, 0, COLLATION))
    assert len(steps) == steps_per_epoch(plan(10).rows, "train", 4) == 3
    assert sorted(i for s in ids_of(steps) for m in s for i in m) == sorted(f"r{i}" for i in range(10))
    assert all(len(m) <= 2 for s in ids_of(steps) for m in s)


def test_the_order_depends_on_seed_round_client_and_epoch_and_on_nothing_else():
    usual = ids_of(plan().epoch(0, 0, COLLATION))
    torch.manual_seed(99)
    assert ids_of(plan().epoch(0, 0, COLLATION)) == usual
    others = [
        ids_of(plan().epoch(1, 0, COLLATION)),
        ids_of(plan().epoch(0, 1, COLLATION)),
        ids_of(plan(path=("fit", 1, "client_0")).epoch(0, 0, COLLATION)),
        ids_of(plan(path=("fit", 0, "client_1")).epoch(0, 0, COLLATION)),
    ]
    assert all(o != usual for o in others)
    assert len({str(o) for o in others}) == 4


def test_the_same_rows_make_a_step_however_it_is_cut():
    def members(batch: int, accumulation: int) -> list[set[str]]:
        steps = ids_of(plan(11, batch=batch, accumulation=accumulation).epoch(3, 0, COLLATION))
        return [{i for m in s for i in m} for s in steps]

    assert members(8, 1) == members(4, 2) == members(2, 4) == members(1, 8)


def test_totals_count_the_whole_step():
    given = rows(5)
    micro = [{"train": COLLATION.batch(given[:3])}, {"train": COLLATION.batch(given[3:])}]
    totals = totals_of(micro)
    assert totals.examples["train"] == 5
    assert totals.tokens["train"] == sum(e.num_label_tokens for e in given)
    assert totals.positions["train"] == 3 * 6 + 2 * 8
    assert totals.lengths["train"] == tuple(e.num_label_tokens for e in given)


def test_retain_rows_are_drawn_without_replacement_over_an_epoch():
    given = TrainRows({"forget": rows(6), "retain": rows(20, 100)})
    seen: Counter[int] = Counter()
    for epoch in range(30):
        steps = plan_epoch(given, "forget", PAIR, 4, torch_generator(0, "order", epoch))
        drawn = [i for s in steps for i in s["retain"]]
        assert len(drawn) == 6 == len(set(drawn))
        assert all(len(s["forget"]) == len(s["retain"]) for s in steps)
        seen.update(drawn)
    assert set(seen) == set(range(20))
    assert max(seen.values()) < 4 * min(seen.values())  # 9 each in the mean


def test_fewer_retain_rows_than_forget_rows_come_round_again():
    given = TrainRows({"forget": rows(7), "retain": rows(3, 100)})
    drawn = [i for s in plan_epoch(given, "forget", PAIR, 2, torch_generator(0)) for i in s["retain"]]
    assert sorted(Counter(drawn).values()) == [2, 2, 3]


def test_alternate_rows_go_with_their_forget_rows():
    given = TrainRows({"forget": rows(5), "retain": rows(5, 50), "alternate": rows(5)})
    for step in plan_epoch(given, "forget", frozenset({*PAIR, "alternate"}), 2, torch_generator(0)):
        assert step["alternate"] == step["forget"]


def test_worker_processes_change_nothing():
    alone = list(plan(7).epoch(0, 0, COLLATION))
    helped = list(plan(7, workers=2).epoch(0, 0, COLLATION))
    assert ids_of(alone) == ids_of(helped)
    for one, two in zip(alone, helped, strict=True):
        assert one.totals == two.totals
        for a, b in zip(one.micro, two.micro, strict=True):
            assert torch.equal(a["train"].input_ids, b["train"].input_ids)
            assert torch.equal(a["train"].labels, b["train"].labels)


def test_missing_rows_are_named_with_what_to_do():
    given = TrainRows({"forget": rows(2), "retain": []})
    with pytest.raises(UnfedError, match=r"client_2 has no retain rows.*method=GradAscent"):
        given.require("forget", PAIR, "client_2")
    given.require("forget", frozenset({"forget"}), "client_2")
