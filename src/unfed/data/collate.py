"""Padded batches, length-grouped order, and forget/retain pairing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from unfed.base.types import IGNORE_INDEX, Batch, SharedBatch
from unfed.data.chat import EncodedExample


def collate(
    examples: Sequence[EncodedExample],
    pad_token_id: int,
    padding_side: Literal["right", "left"] = "right",
    pad_to_multiple_of: int | None = None,
) -> Batch:
    """Pad ``B`` examples to their longest ``T`` (rounded up to ``pad_to_multiple_of``).

    The attention mask is set by length, never by comparing with ``pad_token_id``: with pad = eos that would
    hide the turn ends inside the conversation.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    width = max(len(e) for e in examples)
    if pad_to_multiple_of:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(examples), width), pad_token_id, dtype=torch.long)
    labels = torch.full((len(examples), width), IGNORE_INDEX, dtype=torch.long)
    attention_mask = torch.zeros((len(examples), width), dtype=torch.long)
    for i, example in enumerate(examples):
        n = len(example)
        where = slice(0, n) if padding_side == "right" else slice(width - n, width)
        input_ids[i, where] = torch.tensor(example.input_ids, dtype=torch.long)
        labels[i, where] = torch.tensor(example.labels, dtype=torch.long)
        attention_mask[i, where] = 1
    return Batch(input_ids, attention_mask, labels, tuple(e.example_id for e in examples))


def shared_prefix(example: EncodedExample) -> tuple[int, ...]:
    """What examples must have in common to stand in one row: the prompt (at least one token)."""
    return example.input_ids[: max(1, example.prompt_len)]


@dataclass(frozen=True)
class _Tree:
    """One group's row: ids, positions, ends as in ``SharedBatch``, and for each example the places that predict it."""

    ids: list[int]
    positions: list[int]
    ends: list[int]
    predictors: list[list[int]]


def _tree(group: Sequence[EncodedExample]) -> _Tree:
    """The prompt once, then every beginning of an answer once that predicts another token."""
    prefix = shared_prefix(group[0])
    start = len(prefix)
    ids, positions, ends = list(prefix), list(range(start)), [0] * start
    predictors: list[list[int]] = [[] for _ in group]
    before: tuple[int, ...] = ()
    path: list[int] = []
    # In sorted order an answer shares the longest beginning with its neighbour, and nodes come depth first.
    for k in sorted(range(len(group)), key=lambda k: group[k].input_ids[start:-1]):
        answer = group[k].input_ids[start:]
        inner = answer[:-1]
        common = next((n for n, (a, b) in enumerate(zip(before, inner, strict=False)) if a != b), None)
        common = min(len(before), len(inner)) if common is None else common
        for node in path[common:]:
            ends[node] = len(ids)
        del path[common:]
        for token in inner[common:]:
            path.append(len(ids))
            ids.append(token)
            positions.append(start + len(path) - 1)
            ends.append(0)
        before = inner
        predictors[k] = [start - 1, *path] if answer else []
    for node in path:
        ends[node] = len(ids)
    return _Tree(ids, positions, ends, predictors)


def shared_width(examples: Sequence[EncodedExample]) -> int:
    """Positions of the row that :func:`collate_shared` makes of a group."""
    return len(_tree(examples).ids)


def collate_shared(groups: Sequence[Sequence[EncodedExample]], pad_token_id: int) -> SharedBatch:
    """One row for each group of examples with the same :func:`shared_prefix`, padded on the right."""
    trees = [_tree(g) for g in groups]
    width = max(len(t.ids) for t in trees)
    input_ids = torch.full((len(groups), width), pad_token_id, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    ends = torch.zeros_like(input_ids)
    predictors: list[int] = []
    labels: list[int] = []
    for row, (group, tree) in enumerate(zip(groups, trees, strict=True)):
        size, start = len(tree.ids), len(shared_prefix(group[0]))
        input_ids[row, :size] = torch.tensor(tree.ids, dtype=torch.long)
        position_ids[row, :size] = torch.tensor(tree.positions, dtype=torch.long)
        ends[row, :size] = torch.tensor(tree.ends, dtype=torch.long)
        ends[row, :start] = width  # padding sees the prompt, too: a position that sees nothing would be NaN
        for example, places in zip(group, tree.predictors, strict=True):
            predictors += [row * width + place for place in places]
            labels += example.input_ids[start:]
    flat = (torch.tensor(values, dtype=torch.long) for values in (predictors, labels))
    return SharedBatch(input_ids, position_ids, ends, *flat)


def length_grouped_batches(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator, mega: int = 50
) -> list[list[int]]:
    """One epoch's batches of indices: shuffled, sorted by length inside each ``mega * batch_size`` rows.

    Every index comes exactly once; one batch may be short. The order of the batches is shuffled again, so
    that lengths do not run from long to short. Depends on ``generator`` alone.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    order = torch.randperm(len(lengths), generator=generator).tolist()
    span = batch_size * max(1, mega)
    batches = []
    for start in range(0, len(order), span):
        group = sorted(order[start : start + span], key=lambda i: lengths[i], reverse=True)
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def draw_without_replacement(population: int, count: int, generator: torch.Generator) -> list[int]:
    """``count`` indices below ``population``: whole shuffles one after the other, the last one cut.

    No index comes twice before every index came once.
    """
    if population < 1:
        raise ValueError("cannot draw from no rows")
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += torch.randperm(population, generator=generator).tolist()
    return drawn[:count]


@dataclass(frozen=True)
class ForgetRetainPairs:
    """Batches of forget rows, each with as many retain rows; the forget set drives the epoch.

    Retain rows are drawn uniformly without replacement over the epoch (and shuffled anew when there are fewer
    of them than forget rows), so every retain row is as likely as any other. Both sides are grouped by length.
    """

    forget_lengths: tuple[int, ...]
    retain_lengths: tuple[int, ...]
    batch_size: int
    mega: int = 50

    def epoch(self, generator: torch.Generator) -> list[tuple[list[int], list[int]]]:
        """One epoch of (forget indices, retain indices); the two lists of a pair are equally long."""
        forget = length_grouped_batches(self.forget_lengths, self.batch_size, generator, self.mega)
        drawn = draw_without_replacement(len(self.retain_lengths), len(self.forget_lengths), generator)
        groups = length_grouped_batches([self.retain_lengths[i] for i in drawn], self.batch_size, generator, self.mega)
        by_size: dict[int, list[list[int]]] = {}
        for group in groups:
            by_size.setdefault(len(group), []).append([drawn[i] for i in group])
        # Both sides have the same number of rows, hence the same sizes: at most one batch is short.
        return [(batch, by_size[len(batch)].pop()) for batch in forget]
