"""Padding, length-grouped batches, forget/retain pairs: with properties."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unfed.base.types import IGNORE_INDEX
from unfed.data.chat import EncodedExample
from unfed.data.collate import ForgetRetainPairs, collate, draw_without_replacement, length_grouped_batches

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=120)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example(ids: list[int], prompt: int, name: str) -> EncodedExample:
    return EncodedExample(tuple(ids), (*[IGNORE_INDEX] * prompt, *ids[prompt:]), prompt, False, name)


PAD = 9
SHORT, LONG = example([1, PAD, 3], 2, "short"), example([1, PAD, 3, 4, PAD], 3, "long")


def test_the_mask_is_by_length_where_the_padding_id_is_also_a_token():
    batch = collate([SHORT, LONG], PAD)
    assert batch.input_ids.tolist() == [[1, PAD, 3, PAD, PAD], [1, PAD, 3, 4, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, -100, 3, -100, -100], [-100, -100, -100, 4, PAD]]
    assert batch.example_ids == ("short", "long") and batch.num_label_tokens.tolist() == [1, 2]


def test_left_padding_and_multiples():
    batch = collate([SHORT, LONG], 0, "left", 4)
    assert batch.input_ids.tolist() == [[0] * 5 + [1, PAD, 3], [0] * 3 + [1, PAD, 3, 4, PAD]]
    assert batch.attention_mask.sum(1).tolist() == [3, 5] and batch.labels[0].tolist() == [-100] * 7 + [3]
    assert collate([example([1, 2, 3, 4], 1, "x")], 0, "right", 4).input_ids.shape == (1, 4)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        collate([], 0)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 17), st.integers(0, 5), st.integers(1, 4))
def test_every_row_comes_exactly_once(lengths, batch_size, seed, mega):
    batches = length_grouped_batches(lengths, batch_size, generator(seed), mega)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    sizes = sorted((len(b) for b in batches), reverse=True)
    assert all(s == batch_size for s in sizes[:-1]) and 1 <= sizes[-1] <= batch_size
    assert batches == length_grouped_batches(lengths, batch_size, generator(seed), mega)


def test_batches_waste_little_and_are_not_in_order_of_length():
    lengths = torch.randint(10, 200, (400,), generator=generator(0)).tolist()

    def padding(batches) -> int:
        return sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)

    plain = torch.randperm(400, generator=generator(1)).split(8)
    grouped = length_grouped_batches(lengths, 8, generator(1))
    assert padding(grouped) < 0.1 * padding([b.tolist() for b in plain])
    longest = [max(lengths[i] for i in b) for b in grouped]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    assert grouped != length_grouped_batches(lengths, 8, generator(2))


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0"):
        length_grouped_batches([1], 0, generator(0))


@given(st.integers(1, 40), st.integers(0, 130), st.integers(0, 3))
def test_no_row_is_drawn_again_before_all_were_drawn(population, count, seed):
    drawn = draw_without_replacement(population, count, generator(seed))
    assert len(drawn) == count
    for start in range(0, count, population):
        part = drawn[start : start + population]
        assert len(set(part)) == len(part) and set(part) <= set(range(population))


@settings(deadline=None, max_examples=60)
@given(LENGTHS, LENGTHS, st.integers(1, 9), st.integers(0, 5))
def test_pairs_are_driven_by_the_forget_set(forget, retain, batch_size, seed):
    pairs = ForgetRetainPairs(tuple(forget), tuple(retain), batch_size)
    epoch = pairs.epoch(generator(seed))
    assert sorted(i for f, _ in epoch for i in f) == list(range(len(forget)))
    assert all(len(f) == len(r) for f, r in epoch)
    drawn = Counter(i for _, r in epoch for i in r)
    most = -(-len(forget) // len(retain))
    # Without replacement: how often two rows were drawn differs by one at most.
    assert all(most - 1 <= drawn[i] <= most for i in range(len(retain)))
    assert epoch == pairs.epoch(generator(seed))


def test_every_retain_row_is_as_likely_as_any_other():
    """The known defect: pairing by ``idx % len(forget)`` uses the first few retain rows alone."""
    pairs = ForgetRetainPairs((5,) * 4, tuple(range(1, 41)), 2)
    drawn = Counter(i for seed in range(400) for _, r in pairs.epoch(generator(seed)) for i in r)
    assert set(drawn) == set(range(40))
    # 1600 draws over 40 rows: 40 each, standard deviation 6; the length of a row does not matter.
    assert min(drawn.values()) > 15 and max(drawn.values()) < 70


def test_drawing_from_no_retain_rows_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        ForgetRetainPairs((1,), (), 1).epoch(generator(0))
