"""Token-by-token decoding in which finished rows leave the batch and waiting prompts take their places.

A batch that waits for its longest answer computes mostly padding, and a cache that grows by concatenation copies
itself at every step. Here rows share one buffer of keys and values with spare columns; from time to time it is laid
out anew, without the finished rows, with new ones, and without columns that nobody sees any more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from unfed.models.forward import causal_lm, last_logits

SPARE = 64
"""Free columns after a layout: as many steps follow without copying."""

TURNOVER = 4
"""A new layout comes as soon as one row in so many is done."""


class BufferLayer(DynamicLayer):
    """One layer's keys and values ``(R, H, W, D)`` as views of buffers with spare columns."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one column into the buffers. Raises ``RuntimeError`` when they are full."""
        used = _there(self.keys).shape[2]
        stop = used + key_states.shape[2]
        if stop > self._buffers[0].shape[2]:
            raise RuntimeError("the cache has no column left: it must be laid out before the next step")
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, used:stop] = new
        self.keys, self.values = (b[:, :, :stop] for b in self._buffers)
        return self.keys, self.values

    def lay_out(self, keep: Tensor, width: int, new: Any) -> None:
        """Keep rows with their last ``width`` columns and add the rows of ``new``, all aligned on the right."""
        keys = [] if self.keys is None or not len(keep) else [self.keys[keep, :, -width:]]
        values = [] if self.values is None or not len(keep) else [self.values[keep, :, -width:]]
        if new is not None:
            keys, values = [*keys, _there(new.keys)], [*values, _there(new.values)]
        # Spare columns hold zeros, since a masked column of anything else could be NaN, and 0 * NaN is NaN.
        self._buffers = (_aligned(keys, SPARE), _aligned(values, SPARE))
        self.keys, self.values = (b[:, :, : b.shape[2] - SPARE] for b in self._buffers)
        self.is_initialized = True


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _aligned(parts: Sequence[Tensor], spare: int) -> Tensor:
    """Parts ``(r, H, w, D)`` one below the other, their columns aligned on the right, then ``spare`` more of zeros."""
    rows, width = sum(len(p) for p in parts), max(p.shape[2] for p in parts)
    out = parts[0].new_zeros((rows, parts[0].shape[1], width + spare, parts[0].shape[3]))
    start = 0
    for part in parts:
        out[start : start + len(part), :, width - part.shape[2] : width] = part
        start += len(part)
    return out


def can_buffer(model: nn.Module) -> bool:
    """Whether every layer keeps all keys and values, and positions can be given: no sliding window, no recurrent
    state, no positions that come of the mask, no rotary frequencies that come of the batch."""
    inner = causal_lm(model)
    if getattr(inner.config, "is_encoder_decoder", False):
        return False
    scaling: Any = getattr(inner.config, "rope_parameters", None) or getattr(inner.config, "rope_scaling", None) or {}
    kinds = [scaling, *(v for v in scaling.values() if isinstance(v, dict))]  # some models have one for each layer type
    if any(k.get("rope_type", k.get("type")) in {"dynamic", "longrope"} for k in kinds):
        return False  # frequencies that follow the longest row of the batch
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return False
    layers = DynamicCache(config=inner.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


@dataclass
class _Row:
    """A prompt's number and what was generated so far."""

    prompt: int
    new: list[int] = field(default_factory=list)
    done: bool = False


@dataclass
class Decoder:
    """Answers to ``prompts`` (token ids), taken up in the order in which they stand in ``waiting``.

    At most ``rows`` are in the batch at once, and no more than that rows times (longest prompt + ``max_new_tokens``)
    stays within ``max_positions``; prompts pass the model in portions of ``max_tokens`` positions. One prompt may
    exceed either. ``process`` makes the processors of logits ``(R, V)`` float32 for rows that answer these prompts.
    ``hidden_id``: a token that attention does not see inside prompts.
    """

    model: nn.Module
    prompts: Sequence[Sequence[int]]
    waiting: list[int]
    stops: frozenset[int]
    max_new_tokens: int
    rows: int
    max_tokens: int
    max_positions: int
    pad: int
    process: Callable[[Sequence[int]], Callable[[Any, Any], Any]]
    hidden_id: int | None = None

    def __post_init__(self) -> None:
        device = next(self.model.parameters()).device
        self._running: list[_Row] = []
        self._layers: list[BufferLayer] = []
        self._cache = Cache(layers=[])
        self._mask = torch.zeros((0, SPARE), dtype=torch.int64, device=device)
        self._next = torch.zeros(0, dtype=torch.int64, device=device)

    @property
    def unfinished(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waiting) or not all(row.done for row in self._running)

    def advance(self) -> list[tuple[int, list[int]]]:
        """Lay the batch out and decode until that is due again; (prompt, tokens) of the rows that are done.

        Call it until nothing is ``unfinished``, in evaluation mode and without gradients.
        """
        keep = [i for i, row in enumerate(self._running) if not row.done]
        self._lay_out(keep, self._admit(keep))
        while fresh := self._admit(range(len(self._running))):
            self._lay_out(range(len(self._running)), fresh)
        for _ in range(SPARE):
            if sum(row.done for row in self._running) * TURNOVER >= len(self._running):
                break
            self._step()
        return [(row.prompt, row.new) for row in self._running if row.done]

    def _admit(self, keep: Sequence[int]) -> list[int]:
        """The next prompts to take up beside the rows ``keep``."""
        longest = max((len(self.prompts[self._running[i].prompt]) for i in keep), default=0)
        taken: list[int] = []
        for i in self.waiting:
            longest = max(longest, len(self.prompts[i]))
            count = len(keep) + len(taken) + 1
            width = max(len(self.prompts[k]) for k in (*taken, i))
            if count > self.rows or (taken and width * (len(taken) + 1) > self.max_tokens):
                break
            if count > 1 and count * (longest + self.max_new_tokens) > self.max_positions:
                break
            taken.append(i)
        del self.waiting[: len(taken)]
        return taken

    def _lay_out(self, keep: Sequence[int], fresh: Sequence[int]) -> None:
        """Keep some rows and take up fresh prompts; columns that no row sees are dropped."""
        kept = torch.tensor(list(keep), dtype=torch.int64, device=self._mask.device)
        used = self._mask.shape[1] - SPARE if not self._layers else _there(self._layers[0].keys).shape[2]
        mask, self._next = self._mask[kept, :used], self._next[kept]
        # argmax gives the first column that a row sees.
        width = used - int(mask.argmax(dim=1).min()) if len(kept) else 0
        self._running = [self._running[i] for i in keep]
        masks, layers, logits = [mask[:, used - width :]], None, None
        if fresh:
            ids, own = left_padded([self.prompts[i] for i in fresh], self.pad)
            own = own if self.hidden_id is None else own * (ids != self.hidden_id)
            masks.append(own.to(kept.device))
            cache = DynamicCache()
            logits = last_logits(self.model, ids.to(kept.device), masks[1], cache)
            layers = cache.layers
            self._layers += [BufferLayer() for _ in range(len(layers) - len(self._layers))]
            self._cache = Cache(layers=list(self._layers))
        for number, layer in enumerate(self._layers):
            layer.lay_out(kept, width, None if layers is None else layers[number])
            if layers is not None:
                layers[number] = DynamicLayer()  # what was copied can go before the next layer is copied
        self._mask = _aligned([m[:, None, :, None] for m in masks], SPARE)[:, 0, :, 0]
        if logits is not None:
            new = [_Row(i) for i in fresh]
            self._running += new
            self._next = torch.cat([self._next, self._choose(logits, new)])

    def _step(self) -> None:
        used = _there(self._layers[0].keys).shape[2]
        self._mask[:, used] = 1
        logits = last_logits(self.model, self._next[:, None], self._mask[:, : used + 1], self._cache)
        self._next = self._choose(logits, self._running)

    def _choose(self, logits: Tensor, rows: Sequence[_Row]) -> Tensor:
        """The next token of each row; rows that are done go on without being listened to."""
        chosen = self.process([row.prompt for row in rows])(self._next, logits.float()).argmax(dim=1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if not row.done:
                row.new.append(token)
                row.done = token in self.stops or len(row.new) == self.max_new_tokens
        return chosen


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts as token ids and mask ``(R, T)``, int64."""
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
