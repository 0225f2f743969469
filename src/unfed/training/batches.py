"""One client's rows turned into optimizer steps: which rows belong together, split into micro-batches."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.data import DataLoader, Dataset

from unfed.base.errors import UnfedError
from unfed.base.seeding import torch_generator
from unfed.base.types import Batch, Split
from unfed.data.chat import EncodedExample
from unfed.data.collate import ForgetRetainPairs, collate, length_grouped_batches

Indices = Mapping[Split, Sequence[int]]


@dataclass(frozen=True)
class StepTotals:
    """Counts over a whole optimizer step (all its micro-batches), by split.

    ``positions`` are all positions of the padded micro-batches, padding included; ``lengths`` are the labelled tokens
    of each example.
    """

    examples: Mapping[Split, int]
    tokens: Mapping[Split, int]
    positions: Mapping[Split, int]
    lengths: Mapping[Split, tuple[int, ...]]


@dataclass(frozen=True)
class Step:
    """One optimizer step: its micro-batches, each with a batch for every split, and the totals."""

    micro: tuple[Mapping[Split, Batch], ...]
    totals: StepTotals


@dataclass(frozen=True)
class Collation:
    """How rows become tensors."""

    pad_token_id: int
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None

    def batch(self, examples: Sequence[EncodedExample]) -> Batch:
        """Pad to the longest of ``examples``."""
        side = "left" if self.padding_side == "left" else "right"
        return collate(examples, self.pad_token_id, side, self.pad_to_multiple_of)


@dataclass(frozen=True)
class TrainRows:
    """A client's encoded rows by split. ``alternate`` (if any) is aligned with ``forget``, row by row; where a question
    has several alternates, it is as many times as long, block after block."""

    splits: Mapping[Split, Sequence[EncodedExample]]

    def require(self, driver: Split, needs: frozenset[Split], who: str) -> None:
        """Raise ``UnfedError`` when a split that the objective needs has no rows."""
        for split in (driver, *(needs - {driver})):
            if not self.splits.get(split):
                raise UnfedError(
                    f"{who} has no {split} rows, which its objective needs: give it some (partition.rest), or choose a "
                    "method that needs none (method=GradAscent)"
                )


def plan_epoch(rows: TrainRows, driver: Split, needs: frozenset[Split], size: int, g: torch.Generator) -> list[Indices]:
    """Which rows each optimizer step of an epoch uses: every row of ``driver`` once, in groups of like length.

    Where retain rows are needed beside forget rows, each step draws as many, without replacement over the epoch.
    Of several alternates to a forget row, each epoch draws one.
    """
    lengths = tuple(len(e) for e in rows.splits[driver])
    if driver == "forget" and "retain" in needs:
        retain = tuple(len(e) for e in rows.splits["retain"])
        pairs = ForgetRetainPairs(lengths, retain, size).epoch(g)
        steps: list[dict[Split, Sequence[int]]] = [{"forget": f, "retain": r} for f, r in pairs]
    else:
        steps = [{driver: group} for group in length_grouped_batches(lengths, size, g)]
    if "alternate" in needs:
        count = len(rows.splits["forget"])
        blocks = len(rows.splits["alternate"]) // count
        for step in steps:
            forget = step["forget"]
            drawn = torch.randint(blocks, (len(forget),), generator=g).tolist() if blocks > 1 else [0] * len(forget)
            step["alternate"] = [i + count * block for i, block in zip(forget, drawn, strict=True)]
    return list(steps)


def poisson_epoch(rows: TrainRows, driver: Split, size: int, g: torch.Generator) -> list[Indices]:
    """As many steps as :func:`plan_epoch` has, each with a Poisson sample of the rows: every row is in it with
    probability ``size / rows`` (at most 1), on its own. A step may be empty, a row in several steps or in none."""
    lengths = [len(e) for e in rows.splits[driver]]
    rate = min(1.0, size / len(lengths))
    steps: list[Indices] = []
    for _ in range(steps_per_epoch(rows, driver, size)):
        chosen = (torch.rand(len(lengths), generator=g, dtype=torch.float64) < rate).nonzero().flatten().tolist()
        steps.append({driver: sorted(chosen, key=lambda i: lengths[i])})
    return steps


def steps_per_epoch(rows: TrainRows, driver: Split, size: int) -> int:
    """Optimizer steps of one epoch."""
    return math.ceil(len(rows.splits[driver]) / size)


class _Steps(Dataset[Step]):
    """Steps built on demand (in worker processes, if there are any)."""

    def __init__(self, rows: TrainRows, plan: Sequence[Indices], micro: int, collation: Collation) -> None:
        self._rows, self._plan, self._micro, self._collation = rows, plan, micro, collation

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> Step:
        parts: list[dict[Split, Batch]] = []
        for split, chosen in self._plan[index].items():
            examples = [self._rows.splits[split][i] for i in chosen]
            for k, start in enumerate(range(0, len(examples), self._micro)):
                if k == len(parts):
                    parts.append({})
                parts[k][split] = self._collation.batch(examples[start : start + self._micro])
        return Step(tuple(parts), totals_of(parts))


def totals_of(micro: Sequence[Mapping[Split, Batch]]) -> StepTotals:
    """Count examples, labelled tokens and positions of a step."""
    found: dict[Split, list[Batch]] = {}
    for batches in micro:
        for split, batch in batches.items():
            found.setdefault(split, []).append(batch)
    lengths: dict[Split, tuple[int, ...]] = {
        s: tuple(n for b in bs for n in b.num_label_tokens.tolist()) for s, bs in found.items()
    }
    return StepTotals(
        {s: len(each) for s, each in lengths.items()},
        {s: sum(each) for s, each in lengths.items()},
        {s: sum(b.input_ids.numel() for b in bs) for s, bs in found.items()},
        lengths,
    )


@dataclass(frozen=True)
class BatchPlan:
    """All that decides a client's batches in one round.

    ``sample``: ``poisson`` draws every step's rows on their own from (seed, path, epoch), ``secret`` from the operating
    system's entropy; ``None`` goes through all rows once an epoch.
    """

    rows: TrainRows
    driver: Split
    needs: frozenset[Split]
    batch_size: int
    accumulation: int
    seed_path: tuple[str | int, ...]
    workers: int = 0
    sample: Literal["poisson", "secret"] | None = None

    def epoch(self, seed: int, number: int, collation: Collation, skip: int = 0) -> Iterator[Step]:
        """The steps of one epoch but the first ``skip``, in an order that depends on (seed, path, number) alone."""
        g = torch_generator(seed, *self.seed_path, "order", number)
        if self.sample == "secret":
            g.manual_seed(secrets.randbits(63))
        if self.sample is None:
            plan = plan_epoch(self.rows, self.driver, self.needs, self.batch_size * self.accumulation, g)
        else:
            plan = poisson_epoch(self.rows, self.driver, self.batch_size * self.accumulation, g)
        steps = _Steps(self.rows, plan[skip:], self.batch_size, collation)
        if self.workers == 0:
            for i in range(len(steps)):
                yield steps[i]
            return
        loader = DataLoader(
            steps, batch_size=None, num_workers=self.workers, generator=torch.Generator(), shuffle=False
        )
        yield from loader
