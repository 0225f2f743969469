"""The forward passes of an evaluation: token statistics of encoded answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from unfed.base.types import IGNORE_INDEX, Batch
from unfed.data.benchmarks import Layout
from unfed.data.chat import EncodedExample, Template
from unfed.data.collate import collate, collate_shared, shared_prefix, shared_width
from unfed.evaluation.cache import EvidenceCache
from unfed.metrics.stats import TokenStats
from unfed.models.forward import label_logps, labelled_logits, shared_logits
from unfed.models.generate import Budget, Decoding, Progress, pad_id
from unfed.models.kernels import give_back

log = logging.getLogger(__name__)

SHARING_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Mean difference (nats a token) that rounding may make between an answer scored alone and beside others; 0.1 for
the shorter types."""

_CHUNK_VALUES = 1 << 21
"""Logits handled at once in float32: 8 MiB for each of three arrays."""

_BETWEEN = 16
"""Batches after which freed memory goes back to the system: each time, what comes next has to ask for it again."""

_PADDED = 512
"""Positions from which on a batch of shared rows is large enough to end rather than to pad a shorter row by an eighth:
rows of several answers differ much in their lengths."""

Extra = Literal["details", "reference", "gradients", "fluency"]
"""What a metric may ask of a column beyond the labels' log-probabilities: is-argmax and moments, the reference
model's statistics, gradient norms; of generated answers, the base model's statistics."""

Column = tuple[str, str]
"""A split and a column of it: ``("forget", "perturbed_answer")``."""


@dataclass(frozen=True)
class Pass:
    """The model to look at and how: its tokenizer, template, batches, decoding.

    ``asked``: for each extra the columns that need it. ``reference`` opens the reference model for a ``with`` block.
    ``mask_pad_ids``: hide every padding id from attention, as OpenUnlearning does, not the padding alone.
    ``layouts``: of the splits whose rows are not plain questions and answers. ``cache`` is looked into first.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    template: Template
    budget: Budget = Budget()
    decoding: Decoding = Decoding()
    max_length: int | None = 512
    mask_pad_ids: bool = False
    asked: Mapping[Extra, frozenset[Column]] = field(default_factory=dict)
    reference: Callable[[], AbstractContextManager[nn.Module]] | None = None
    progress: Progress | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    cache: EvidenceCache | None = None

    def layout(self, split: str) -> Layout:
        """How the rows of ``split`` become text."""
        return self.layouts.get(split, Layout())

    def wants(self, extra: Extra, column: Column) -> bool:
        """Whether a metric asks for ``extra`` of ``column``."""
        return column in self.asked.get(extra, ())

    def tell(self, what: str, done: int, total: int) -> None:
        """Report progress, if anybody listens."""
        if self.progress is not None:
            self.progress(what, done, total)


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
    for number, (own, found) in enumerate(_forward(given, encoded)):
        where = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in own])
        flat[0, where] = _logps(found).cpu().numpy()
        chosen = np.repeat([details[i] for i in own], lengths[own])
        if chosen.any():
            tokens = torch.from_numpy(np.flatnonzero(chosen)).to(found.logits.device)
            flat[1:, where[chosen]] = _details(found, tokens).cpu().numpy()
        del found
        if number % _BETWEEN == _BETWEEN - 1:
            give_back()
        done += len(own)
        given.tell("scoring answers", done, len(encoded))
    others = (flat[1] == 1, flat[2], flat[3]) if any(details) else (None, None, None)
    return TokenStats(flat[0], offsets, tuple(e.example_id for e in encoded), *others)


@dataclass(frozen=True)
class _Found:
    """Logits ``(P, V)``, labels ``(N,)`` by answer and position, and the row of the logits that predicts each."""

    logits: Tensor
    labels: Tensor
    rows: Tensor


def _forward(given: Pass, encoded: Sequence[EncodedExample]) -> Iterator[tuple[list[int], _Found]]:
    """Batches of answers with what the model says at their labelled tokens.

    Answers to one question share its prompt where that is worth it and the model allows it.
    """
    pad, device = pad_id(given.tokenizer), next(given.model.parameters()).device
    prompts: dict[tuple[int, ...], list[int]] = {}
    for i, e in enumerate(encoded):
        prompts.setdefault(shared_prefix(e), []).append(i)
    groups = [g for own in prompts.values() for g in _portions(own, encoded, given.budget.max_tokens)]
    if not given.mask_pad_ids and _shares(given, encoded, groups):
        for own in _shared_batches(given.budget, [[encoded[i] for i in g] for g in groups]):
            batch = collate_shared([[encoded[i] for i in groups[g]] for g in own], pad).to(device)
            logits, rows = shared_logits(given.model, batch)
            yield [i for g in own for i in groups[g]], _Found(logits, batch.labels, rows)
        return
    for own in given.budget.batches([len(e) for e in encoded]):
        batch = collate([encoded[i] for i in own], pad)
        if given.mask_pad_ids:
            mask = (batch.input_ids != pad).to(batch.attention_mask.dtype)
            batch = Batch(batch.input_ids, mask, batch.labels, batch.example_ids)
        found = labelled_logits(given.model, batch.to(device))
        yield own, _Found(found.logits, found.labels, torch.arange(len(found.labels), device=found.logits.device))


def _portions(own: Sequence[int], encoded: Sequence[EncodedExample], most: int) -> Iterator[list[int]]:
    """Answers to one question in portions that would fit into a batch one by one, too."""
    portion: list[int] = []
    size = 0
    for i in own:
        if portion and size + len(encoded[i]) > most:
            yield portion
            portion, size = [], 0
        portion.append(i)
        size += len(encoded[i])
    yield portion


def _shared_batches(budget: Budget, groups: Sequence[Sequence[EncodedExample]]) -> Iterator[list[int]]:
    """Groups by number: the budget's batches, parted where that spares padding and leaves :data:`_PADDED` positions.

    A row counts as its positions, or twice those of its answers: unshared, answers are about half of all positions,
    and the logits of as many should fit in memory.
    """
    widths = [shared_width(g) for g in groups]
    answers = [width - len(shared_prefix(g[0])) + 1 for width, g in zip(widths, groups, strict=True)]
    for batch in budget.batches([max(w, 2 * a) for w, a in zip(widths, answers, strict=True)]):
        part: list[int] = []
        for g in sorted(batch, key=lambda g: -widths[g]):
            if part and len(part) * widths[part[0]] >= _PADDED and 8 * widths[g] <= 7 * widths[part[0]]:
                yield part
                part = []
            part.append(g)
        yield part


def _shares(given: Pass, encoded: Sequence[EncodedExample], groups: Sequence[list[int]]) -> bool:
    """Whether this model gives the answers of a shared row what it gives them one by one; tried on the longest answer.

    A kernel that takes no mask (flash attention), a sliding window shorter than the text, positions that come of the
    mask (ALiBi) or a recurrent layer show here.
    """
    several = [g for g in groups if len(g) > 1]
    if not several:
        return False
    group = [encoded[i] for i in max(several, key=lambda g: max(len(encoded[i]) for i in g))]
    pad, device = pad_id(given.tokenizer), next(given.model.parameters()).device
    alone = labelled_logits(given.model, collate(group, pad).to(device))
    want = label_logps(alone.logits, alone.labels)
    del alone
    batch = collate_shared([group], pad).to(device)
    try:
        logits, rows = shared_logits(given.model, batch)
        found = _logps(_Found(logits, batch.labels, rows))
    except (ValueError, TypeError, RuntimeError) as e:
        log.info("answers to one question are scored one by one (%s)", str(e).partition("\n")[0])
        return False
    dtype = next(given.model.parameters()).dtype
    off = float((found - want).abs().mean())
    if not off <= SHARING_TOLERANCE.get(dtype, 0.1):
        log.info("answers to one question are scored one by one (shared, they differ by %.2g nats)", off)
        return False
    return True


def _chunks(count: int, width: int) -> Iterator[slice]:
    """``count`` rows of ``width`` logits in portions of :data:`_CHUNK_VALUES`."""
    size = max(1, _CHUNK_VALUES // width)
    yield from (slice(start, min(start + size, count)) for start in range(0, count, size))


def _logps(found: _Found) -> Tensor:
    """Log-probability of each label, ``(N,)`` float32: one log-softmax for each row of the logits."""
    out = torch.empty(found.labels.shape, dtype=torch.float32, device=found.logits.device)
    for part in _chunks(*found.logits.shape):
        own = ((found.rows >= part.start) & (found.rows < part.stop)).nonzero().squeeze(1)
        logps = found.logits[part].float().log_softmax(dim=1)
        out[own] = logps[found.rows[own] - part.start, found.labels[own]]
    return out


def _details(found: _Found, tokens: Tensor) -> Tensor:
    """is-argmax, mean, variance of the labels ``tokens``: shape ``(3, len(tokens))``, computed once for each row."""
    distinct, which = found.rows[tokens].unique(return_inverse=True)
    best = torch.empty(len(distinct), dtype=torch.int64, device=found.logits.device)
    moments = torch.empty((2, len(distinct)), device=found.logits.device)
    for part in _chunks(len(distinct), found.logits.shape[1]):
        logits = found.logits[distinct[part]]
        logps = logits.float().log_softmax(dim=1)
        probs = logps.exp()
        # A vanished probability counts 0, also where its log-probability is infinite (masked vocabulary).
        logps.masked_fill_(probs == 0, 0)
        mean = (probs * logps).sum(dim=1)
        best[part], moments[0, part] = logits.argmax(dim=1), mean
        moments[1, part] = logps.sub_(mean.unsqueeze(1)).square_().mul_(probs).sum(dim=1)
    return torch.cat([(best[which] == found.labels[tokens]).float().unsqueeze(0), moments[:, which]])
