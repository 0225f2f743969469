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
    batch_size: int = 32

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
    """Evaluation mode without gradients; afterwards every module is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
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

    def __init__(self, seed: int, prompts: Sequence[int]) -> None:
        self._streams = [torch_generator(seed, "generate", i) for i in prompts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        noise = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self._streams])
        return scores - torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7))).to(scores.device, scores.dtype)


def _processors(decoding: Decoding, prompts: Sequence[int]) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if decoding.do_sample:
        if decoding.temperature != 1.0:
            found.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_p < 1.0:
            found.append(TopPLogitsWarper(decoding.top_p))
        found.append(_Gumbel(decoding.seed, prompts))
    return found


def _stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end-of-sequence id and the model's own (chat models have several)."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({int(i) for i in ids if isinstance(i, int)})


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


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
    configuration is not applied. ``budget.max_tokens`` counts prompt positions. ``mask_pad_ids`` hides every
    padding id inside a prompt too (what OpenUnlearning does; for ``parity``).
    """
    engine: Any = model
    pad, stops = pad_id(tokenizer), _stop_ids(engine, tokenizer)
    device = next(model.parameters()).device
    for batch in budget.batches([len(p) for p in prompts]):
        ids, mask = _left_padded([prompts[i] for i in batch], pad)
        if mask_pad_ids:
            mask = (ids != pad).to(mask.dtype)
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
                logits_processor=_processors(decoding, batch),
            )
        for i, new in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
            yield i, _text(tokenizer, new, stops)


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
