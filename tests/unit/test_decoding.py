"""Rows that leave and enter a running batch give the texts that they give alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from unfed.models import decoding
from unfed.models.decoding import Decoder, can_buffer
from unfed.models.generate import Budget, Decoding, _by_buffer, _by_transformers, inference

PROMPTS = [list(range(5, 5 + n)) for n in (3, 11, 7, 5, 9, 4, 6, 12, 8, 10)]
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
STOPS = [3, 4, 7]
"""With these three of 40 tokens as ends, answers of random models end early, late, or not at all."""


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    found = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.6))
    return found.eval()


def texts(way: Any, model: Any, given: Decoding, budget: Budget, hidden: int | None = None) -> list[list[int]]:
    found = dict(way(model, PROMPTS, given, budget, (0, STOPS, hidden)))
    assert sorted(found) == list(range(len(PROMPTS)))
    ends = [next((n for n, t in enumerate(found[i]) if t in STOPS), len(found[i])) for i in range(len(PROMPTS))]
    return [found[i][:end] for i, end in enumerate(ends)]


@pytest.mark.parametrize("rows", [1, 3, 10])
@pytest.mark.parametrize("spare", [2, 64])
def test_the_same_texts_as_one_prompt_at_a_time(
    model: Any, rows: int, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "SPARE", spare)
    for given in (Decoding(max_new_tokens=30), Decoding(max_new_tokens=30, do_sample=True, top_p=0.9, seed=5)):
        expected = texts(_by_transformers, model, given, Budget(batch_size=1))
        assert texts(_by_buffer, model, given, Budget(max_tokens=40, batch_size=rows)) == expected
        assert len({len(t) for t in expected}) > 3  # rows leave the batch at different steps


def test_hidden_tokens_are_hidden_in_both_ways(model: Any) -> None:
    given = Decoding(max_new_tokens=12)
    found = texts(_by_buffer, model, given, Budget(batch_size=4), hidden=6)
    assert found == texts(_by_transformers, model, given, Budget(batch_size=1), hidden=6)
    assert found != texts(_by_buffer, model, given, Budget(batch_size=4))


def test_the_batch_keeps_its_bounds(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []
    real = decoding.last_logits

    def told(model: Any, ids: Any, mask: Any, cache: Any) -> Any:
        seen.append((*ids.shape, mask.shape[1]))
        return real(model, ids, mask, cache)

    monkeypatch.setattr(decoding, "last_logits", told)
    # 4 rows of at most 12 + 20 tokens are 128 positions; prompts enter in portions of 24 tokens: two of 12.
    longest_first = sorted(range(10), key=lambda i: -len(PROMPTS[i]))
    decoder = Decoder(model, PROMPTS, longest_first, frozenset(STOPS), max_new_tokens=20, rows=8, max_tokens=24,
                      max_positions=128, pad=0, process=lambda _: lambda _ids, scores: scores)  # fmt: skip
    found: list[int] = []
    while decoder.unfinished:
        with inference(model):
            found += [i for i, _ in decoder.advance()]
    assert sorted(found) == list(range(10))
    assert max(rows * width for rows, width, _ in seen if width > 1) <= 24
    assert max(rows * columns for rows, _, columns in seen) <= 128
    assert max(rows for rows, width, _ in seen if width == 1) >= 4  # and it makes use of them


def test_other_caches_are_left_to_transformers(model: Any, tiny_model_dir: Path) -> None:
    assert can_buffer(model)
    assert can_buffer(AutoModelForCausalLM.from_pretrained(tiny_model_dir))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not can_buffer(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dynamic)))
    sliding = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()
    assert not can_buffer(sliding)
