"""Answers to prompts: greedy or sampled, in batches, the same text whatever the batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from unfed.base.errors import ConfigError
from unfed.base.seeding import torch_generator
from unfed.models.decoding import Decoder, can_buffer, left_padded
from unfed.models.kernels import fast_linears

CACHED_PER_TOKEN = 4
"""Positions that generation may keep in its cache for each token of a batch: a cached position (keys and values of
each layer) is far smaller than one in the middle of a forward pass with its logits."""

Special = tuple[int, list[int], int | None]
"""The padding id, the ids that end a text, and the id that attention is not to see inside prompts."""

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how many are done, how many there are)."""


@dataclass(frozen=True)
class Decoding:
    """How text is generated; ``seed`` matters when ``do_sample`` is set."""

    max_new_tokens: int = 200
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Budget:
    """Upper bounds on one batch: ``max_tokens`` positions with padding, ``batch_size`` rows.

    One row longer than ``max_tokens`` makes a batch of its own.
    """

    max_tokens: int = 4096
    batch_size: int = 64

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices grouped by length, the longest first (whatever does not fit in memory shows at once)."""
        group: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            if group and (len(group) == self.batch_size or (len(group) + 1) * lengths[group[0]] > self.max_tokens):
                yield group
                group = []
            group.append(i)
        if group:
            yield group


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, by fast kernels; afterwards every module is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), fast_linears(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id, else the end-of-sequence id. Raises ``ConfigError`` when there is neither."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return found
    raise ConfigError(["the tokenizer has neither a pad nor an eos token; set one in its tokenizer_config.json"])


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise, so that the largest logit is a sample (Gumbel-max). Each prompt has its own stream,
    drawn on the CPU, so the text does not depend on the batch nor on the device."""

    def __init__(self, streams: Sequence[torch.Generator]) -> None:
        self._streams = streams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        noise = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self._streams])
        return scores - torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7))).to(scores.device, scores.dtype)


class _Sampling:
    """The processors of some prompts' logits; a prompt's stream goes on from call to call."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._streams: dict[int, torch.Generator] = {}

    def __call__(self, prompts: Sequence[int]) -> LogitsProcessorList:
        found, given = LogitsProcessorList(), self._decoding
        if given.do_sample:
            for i in prompts:
                if i not in self._streams:
                    self._streams[i] = torch_generator(given.seed, "generate", i)
            if given.temperature != 1.0:
                found.append(TemperatureLogitsWarper(given.temperature))
            if given.top_p < 1.0:
                found.append(TopPLogitsWarper(given.top_p))
            found.append(_Gumbel([self._streams[i] for i in prompts]))
        return found


def _stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end-of-sequence id and the model's own (chat models have several)."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({int(i) for i in ids if isinstance(i, int)})


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    budget: Budget,
    mask_pad_ids: bool = False,
) -> Iterator[tuple[int, str]]:
    """Yield (index of the prompt, text) as batches finish; the longest prompts come first.

    ``prompts`` are token ids. A text ends before the first end-of-sequence token, without special tokens and
    surrounding blanks. Greedy decoding is plain: a repetition penalty in the model's own generation
    configuration is not applied. ``mask_pad_ids`` hides every padding id inside a prompt too (what OpenUnlearning does;
    for ``parity``). ``budget.max_tokens`` bounds the prompts that pass the model at once; rows times (prompt + new
    tokens) stays within :data:`CACHED_PER_TOKEN` times as many.
    """
    stops = _stop_ids(model, tokenizer)
    way = _by_buffer if can_buffer(model) else _by_transformers
    hidden = pad_id(tokenizer) if mask_pad_ids else None
    for i, new in way(model, prompts, decoding, budget, (pad_id(tokenizer), stops, hidden)):
        yield i, _text(tokenizer, new, stops)


def _by_buffer(
    model: nn.Module, prompts: Sequence[Sequence[int]], decoding: Decoding, budget: Budget, special: Special
) -> Iterator[tuple[int, list[int]]]:
    pad, stops, hidden = special
    decoder = Decoder(
        model=model,
        prompts=prompts,
        waiting=[i for batch in budget.batches([len(p) for p in prompts]) for i in batch],
        stops=frozenset(stops),
        max_new_tokens=decoding.max_new_tokens,
        rows=budget.batch_size,
        max_tokens=budget.max_tokens,
        max_positions=CACHED_PER_TOKEN * budget.max_tokens,
        pad=pad,
        process=_Sampling(decoding),
        hidden_id=hidden,
    )
    while decoder.unfinished:
        with inference(model):
            found = decoder.advance()
        yield from found


def _by_transformers(
    model: nn.Module, prompts: Sequence[Sequence[int]], decoding: Decoding, budget: Budget, special: Special
) -> Iterator[tuple[int, list[int]]]:
    """Batch after batch, for models whose caches are of another kind."""
    engine: Any = model
    pad, stops, hidden = special
    device = next(model.parameters()).device
    sampling = _Sampling(decoding)
    for batch in budget.batches([len(p) for p in prompts]):
        ids, mask = left_padded([prompts[i] for i in batch], pad)
        if hidden is not None:
            mask = mask * (ids != hidden)
        # Every field that a model's own generation configuration may set is set here.
        config = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0,
            no_repeat_ngram_size=0, pad_token_id=pad, eos_token_id=stops, use_cache=True,
        )  # fmt: skip
        with inference(model):
            out = engine.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=sampling(batch),
            )
        yield from zip(batch, out[:, ids.shape[1] :].tolist(), strict=True)


def _text(tokenizer: PreTrainedTokenizerBase, new: Sequence[int], stops: Sequence[int]) -> str:
    end = next((n for n, token in enumerate(new) if token in stops), len(new))
    text = str(tokenizer.decode(list(new[:end]), skip_special_tokens=True))
    eos = tokenizer.eos_token
    return (text.split(eos, maxsplit=1)[0] if isinstance(eos, str) and eos else text).strip()


def generate_all(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding = Decoding(),
    budget: Budget = Budget(),
) -> list[str]:
    """:func:`generate`, as one list in the order of the prompts."""
    texts = [""] * len(prompts)
    for i, text in generate(model, tokenizer, prompts, decoding, budget):
        texts[i] = text
    return texts
