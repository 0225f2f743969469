"""The one pass over the model: every answer of every split scored once, every question answered once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from unfed.base.errors import DataError
from unfed.base.types import IGNORE_INDEX, Batch, Example
from unfed.data.chat import EncodedExample, Template, encode_pairs, encode_prompts
from unfed.data.collate import collate, collate_shared, shared_prefix, shared_width
from unfed.metrics.probability import avg_loss
from unfed.metrics.stats import Array, TokenStats
from unfed.models.forward import label_logps, labelled_logits, shared_logits
from unfed.models.generate import Budget, Decoding, Progress, generate, inference, pad_id

log = logging.getLogger(__name__)

SHARING_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Mean difference (nats a token) that rounding may make between an answer scored alone and beside others; 0.1 for
the shorter types."""

_CHUNK_VALUES = 1 << 21
"""Logits handled at once in float32: 8 MiB for each of three arrays."""

Column = tuple[str, str]
"""A split and a column of it: ``("forget", "perturbed_answer")``."""


@dataclass(frozen=True)
class Answers:
    """The scored answers of one column.

    ``counts`` ``(rows,)`` says how many answers belong to each row; ``listed`` that the data holds a list
    there. ``cut`` counts the answers that ``max_length`` shortened.
    """

    stats: TokenStats
    texts: tuple[str, ...]
    counts: Array
    listed: bool
    cut: int

    @property
    def losses(self) -> Array:
        """``avg_loss`` of each answer, in the order of rows."""
        return avg_loss(self.stats)

    @property
    def losses_by_row(self) -> list[Array]:
        """``avg_loss`` of each row's answers."""
        return np.split(self.losses, np.cumsum(self.counts)[:-1])


@dataclass(frozen=True)
class Generations:
    """Prompts (as text), true answers and generated answers of one split, in the order of rows."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """All that the metrics look at. ``missing`` says why a column or a split's generations are not there."""

    answers: Mapping[Column, Answers]
    generations: Mapping[str, Generations]
    missing: Mapping[Column, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """The model to look at and how: its tokenizer, template, batches, decoding.

    ``details``: columns for which more than the labels' log-probabilities is wanted (see :func:`score`).
    ``mask_pad_ids``: hide every padding id from attention, as OpenUnlearning does, not the padding alone.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    template: Template
    budget: Budget = Budget()
    decoding: Decoding = Decoding()
    max_length: int | None = 512
    mask_pad_ids: bool = False
    details: frozenset[Column] = frozenset()
    progress: Progress | None = None

    def tell(self, what: str, done: int, total: int) -> None:
        """Report progress, if anybody listens."""
        if self.progress is not None:
            self.progress(what, done, total)


def column_problem(rows: Sequence[Example], split: str, column: str) -> str | None:
    """Why a column cannot be scored: the split has no rows, or none of them has the column.

    Raises ``DataError`` when only some rows have it, or when one holds something else than text.
    """
    if not rows:
        return f"there are no rows for {split}"
    without = [i for i, row in enumerate(rows) if column not in row]
    if len(without) == len(rows):
        return f"the {split} rows have no column {column!r}"
    if without:
        raise DataError(f"{split}: row {without[0] + 1} has no column {column!r}, though other rows have it")
    listed = isinstance(rows[0][column], list)
    for i, row in enumerate(rows):
        value = row[column]
        texts = value if isinstance(value, list) else [value]
        if isinstance(value, list) != listed or not texts or not all(isinstance(t, str) for t in texts):
            kind = "a list of texts" if listed else "a text"
            raise DataError(f"{split}: row {i + 1} has no answer in {column!r}; it should be {kind}")
    return None


def collect(
    given: Pass,
    rows_by_split: Mapping[str, Sequence[Example]],
    columns: Sequence[Column],
    generated: Sequence[str],
) -> Evidence:
    """Score the ``columns`` and answer the questions of the splits in ``generated``.

    Answers are batched by length across columns and splits; every result stands in the order of the rows and
    does not depend on the batches beyond float32 rounding. The model's mode is restored, no gradient is kept.
    """
    missing: dict[Column, str] = {}
    for split, column in dict.fromkeys([*columns, *((s, "answer") for s in generated)]):
        problem = column_problem(rows_by_split.get(split, ()), split, column)
        if problem is not None:
            missing[split, column] = problem
    wanted = [c for c in dict.fromkeys(columns) if c not in missing]
    split_names = [s for s in dict.fromkeys(generated) if (s, "answer") not in missing]
    with inference(given.model):
        answers = _score_columns(given, rows_by_split, wanted)
        generations = _generate_splits(given, rows_by_split, split_names)
    return Evidence(answers, generations, missing)


def _score_columns(
    given: Pass, rows_by_split: Mapping[str, Sequence[Example]], columns: Sequence[Column]
) -> dict[Column, Answers]:
    encoded: list[EncodedExample] = []
    details: list[bool] = []
    spans: dict[Column, tuple[int, int]] = {}
    for split, column in columns:
        own = _encode(given, rows_by_split[split], column)
        spans[split, column] = (len(encoded), len(encoded) + len(own))
        encoded += own
        details += [(split, column) in given.details] * len(own)
    stats = score(given, encoded, details)
    out = {}
    for (split, column), (start, stop) in spans.items():
        values = [row[column] for row in rows_by_split[split]]
        listed = isinstance(values[0], list)
        out[split, column] = Answers(
            stats=stats.slice(start, stop),
            texts=tuple(t for v in values for t in (v if listed else [v])),
            counts=np.array([len(v) if listed else 1 for v in values]),
            listed=listed,
            cut=sum(e.truncated for e in encoded[start:stop]),
        )
    return out


def _encode(given: Pass, rows: Sequence[Example], column: str) -> list[EncodedExample]:
    pairs: list[tuple[str, str]] = []
    ids: list[str] = []
    for n, row in enumerate(rows):
        texts = row[column] if isinstance(row[column], list) else [row[column]]
        pairs += [(row["question"], text) for text in texts]
        ids += [str(row.get("id", n))] * len(texts)
    found = encode_pairs(given.tokenizer, given.template, pairs, given.max_length)
    return [replace(e, example_id=i) for e, i in zip(found, ids, strict=True)]


def score(given: Pass, encoded: Sequence[EncodedExample], details: Sequence[bool]) -> TokenStats:
    """Token statistics of encoded answers, in their order.

    ``details`` says for each answer whether is-argmax, mean and variance are wanted; where they are not, they
    read false, NaN and NaN (and are ``None`` when no answer wants them): they cost two more passes over the
    vocabulary.
    """
    lengths = np.array([sum(label != IGNORE_INDEX for label in e.labels[1:]) for e in encoded], dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    flat = np.full((4 if any(details) else 1, int(offsets[-1])), np.nan, dtype=np.float32)
    done = 0
    for own, logits, labels in _forward(given, encoded):
        where = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in own])
        flat[0, where] = label_logps(logits, labels).cpu().numpy()
        chosen = np.repeat([details[i] for i in own], lengths[own])
        if chosen.any():
            tokens = torch.from_numpy(np.flatnonzero(chosen)).to(logits.device)
            flat[1:, where[chosen]] = _details(logits, labels, tokens).cpu().numpy()
        done += len(own)
        given.tell("scoring answers", done, len(encoded))
    others = (flat[1] == 1, flat[2], flat[3]) if any(details) else (None, None, None)
    return TokenStats(flat[0], offsets, tuple(e.example_id for e in encoded), *others)


def _forward(given: Pass, encoded: Sequence[EncodedExample]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of answers with the logits and labels of their labelled tokens, by answer and position.

    Answers to one question share its prompt where that is worth it and the model allows it.
    """
    pad, device = pad_id(given.tokenizer), next(given.model.parameters()).device
    prompts: dict[tuple[int, ...], list[int]] = {}
    for i, e in enumerate(encoded):
        prompts.setdefault(shared_prefix(e), []).append(i)
    groups = list(prompts.values())
    if len(groups) < len(encoded) and not given.mask_pad_ids and _shares(given, encoded, groups):
        for own in given.budget.batches([_shared_cost([encoded[i] for i in g]) for g in groups]):
            batch = collate_shared([[encoded[i] for i in groups[g]] for g in own], pad).to(device)
            yield [i for g in own for i in groups[g]], shared_logits(given.model, batch), batch.labels
        return
    for own in given.budget.batches([len(e) for e in encoded]):
        batch = collate([encoded[i] for i in own], pad)
        if given.mask_pad_ids:
            mask = (batch.input_ids != pad).to(batch.attention_mask.dtype)
            batch = Batch(batch.input_ids, mask, batch.labels, batch.example_ids)
        found = labelled_logits(given.model, batch.to(device))
        yield own, found.logits, found.labels


def _shared_cost(group: Sequence[EncodedExample]) -> int:
    """Positions of a group, or twice its labelled tokens: unshared, answers are about half of all positions, and
    the logits of as many labels should fit in memory."""
    labels = sum(len(e) - len(shared_prefix(e)) for e in group)
    return max(shared_width(group), 2 * labels)


def _shares(given: Pass, encoded: Sequence[EncodedExample], groups: Sequence[list[int]]) -> bool:
    """Whether this model gives the answers of a shared row what it gives them one by one; tried on the longest.

    A kernel without masks of its own (flash attention), a sliding window shorter than the row, positions that
    come of the mask (ALiBi) or a recurrent layer show here.
    """
    several = [g for g in groups if len(g) > 1]
    group = [encoded[i] for i in max(several, key=lambda g: shared_width([encoded[i] for i in g]))]
    pad, device = pad_id(given.tokenizer), next(given.model.parameters()).device
    alone = labelled_logits(given.model, collate(group, pad).to(device))
    want = label_logps(alone.logits, alone.labels)
    del alone
    batch = collate_shared([group], pad).to(device)
    try:
        found = label_logps(shared_logits(given.model, batch), batch.labels)
    except (ValueError, TypeError, RuntimeError) as e:
        log.info("answers to one question are scored one by one (%s)", str(e).partition("\n")[0])
        return False
    dtype = next(given.model.parameters()).dtype
    off = float((found - want).abs().mean())
    if not off <= SHARING_TOLERANCE.get(dtype, 0.1):
        log.info("answers to one question are scored one by one (shared, they differ by %.2g nats)", off)
        return False
    return True


def _details(logits: Tensor, labels: Tensor, tokens: Tensor) -> Tensor:
    """is-argmax, mean, variance at the rows ``tokens`` of ``logits`` ``(N, V)``: shape ``(3, len(tokens))``."""
    out = torch.empty((3, len(tokens)), device=logits.device)
    size = max(1, _CHUNK_VALUES // logits.shape[1])
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        logps = logits[part].float().log_softmax(dim=1)
        probs = logps.exp()
        # A vanished probability counts 0, also where its log-probability is infinite (masked vocabulary).
        logps.masked_fill_(probs == 0, 0)
        mean = (probs * logps).sum(dim=1)
        out[0, start : start + size] = logits[part].argmax(dim=1) == labels[part]
        out[1, start : start + size] = mean
        out[2, start : start + size] = logps.sub_(mean.unsqueeze(1)).square_().mul_(probs).sum(dim=1)
    return out


def _generate_splits(
    given: Pass, rows_by_split: Mapping[str, Sequence[Example]], splits: Sequence[str]
) -> dict[str, Generations]:
    questions = [row["question"] for s in splits for row in rows_by_split[s]]
    prompts = encode_prompts(given.tokenizer, given.template, questions)
    texts = [""] * len(prompts)
    stream = generate(
        given.model, given.tokenizer, prompts, given.decoding, given.budget, mask_pad_ids=given.mask_pad_ids
    )
    for done, (i, text) in enumerate(stream, 1):
        texts[i] = text
        given.tell("generating answers", done, len(prompts))
    shown = given.tokenizer.batch_decode([list(p) for p in prompts], skip_special_tokens=True)
    out: dict[str, Generations] = {}
    start = 0
    for split in splits:
        rows = rows_by_split[split]
        own = slice(start, start + len(rows))
        out[split] = Generations(tuple(shown[own]), tuple(r["answer"] for r in rows), tuple(texts[own]))
        start = own.stop
    return out
