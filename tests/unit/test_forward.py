"""The head on labelled positions gives what the whole forward pass gives, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import Cohere2Config, Gemma2Config, GPT2Config, LlamaConfig, Phi3Config, Qwen2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from unfed.base.types import IGNORE_INDEX, Batch
from unfed.models import forward

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(config: object) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: build(LlamaConfig(**SIZES)),
    "qwen2-tied": lambda: build(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "gemma2-softcap": lambda: build(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.05)),
    "cohere2-scaled": lambda: build(Cohere2Config(**SIZES, logit_scale=0.3)),
    "phi3": lambda: build(Phi3Config(**SIZES)),
    "gpt2": lambda: build(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)),
}


@pytest.fixture
def batch() -> Batch:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (3, 9), generator=g)
    labels = ids.clone()
    mask = torch.ones_like(ids)
    for row, (prompt, length) in enumerate([(4, 9), (2, 6), (5, 5)]):  # the last answer has no label
        labels[row, :prompt] = IGNORE_INDEX
        labels[row, length:] = IGNORE_INDEX
        ids[row, length:] = 0
        mask[row, length:] = 0
    return Batch(ids, mask, labels, ("a", "b", "c"))


def reference(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    labels = batch.labels[:, 1:]
    keep = labels != IGNORE_INDEX
    return logits[keep], labels[keep], keep.nonzero()[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_full_forward_pass(name: str, batch: Batch) -> None:
    model = MODELS[name]()
    with torch.no_grad():
        logits, labels, rows = reference(model, batch)
        found = forward.labelled_logits(model, batch)
    assert found.logits.shape == (9, 61)
    torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.rows, rows)


def test_the_head_sees_labelled_positions_only_and_the_hook_goes(batch: Batch) -> None:
    model = MODELS["llama"]()
    seen: list[torch.Size] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape))
    forward.labelled_logits(model, batch)
    assert seen == [(1, 9, 16)]
    assert not model.get_output_embeddings()._forward_pre_hooks
    with pytest.raises(IndexError):
        forward.labelled_logits(model, Batch(batch.input_ids + 1000, batch.attention_mask, batch.labels, ()))
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_under_peft_equal_the_full_pass(targets: str | list[str], checkpointing: bool, batch: Batch) -> None:
    torch.manual_seed(0)
    model = get_peft_model(MODELS["llama"](), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    logits, labels, _ = reference(model, batch)
    expected = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), trained)
    logps, _ = forward.token_logps(model, batch)
    got = torch.autograd.grad(-logps.sum(), trained)
    assert len(got) >= 4
    assert all(g.abs().max() > 0 for g in got)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_label_logps_in_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_CHUNK_VALUES", 3 * 17)
    g = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(11, 17, generator=g)).to(dtype).requires_grad_()
    labels = torch.randint(17, (11,), generator=g)
    weight = torch.randn(11, generator=g)
    expected = -F.cross_entropy(logits.float(), labels, reduction="none")
    got = forward.label_logps(logits, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)
    (grad,) = torch.autograd.grad((got * weight).sum(), logits)
    (want,) = torch.autograd.grad((expected * weight).sum(), logits)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, want)


def test_answer_logps_and_an_answer_without_labels(batch: Batch) -> None:
    model = MODELS["llama"]()
    with torch.no_grad():
        logps, rows = forward.token_logps(model, batch)
        whole = forward.answer_logps(model, batch)
    assert whole.shape == (3,)
    torch.testing.assert_close(whole[0], logps[rows == 0].sum())
    torch.testing.assert_close(whole[1], logps[rows == 1].sum())
    assert whole[2] == 0


def test_bf16_base_gives_float32_logps(batch: Batch) -> None:
    model = MODELS["llama"]().bfloat16()
    logps, _ = forward.token_logps(model, batch)
    assert logps.dtype == torch.float32
    logps.sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_left_padding_equals_right_padding(name: str, batch: Batch) -> None:
    model = MODELS[name]()
    left = [
        torch.full_like(x, fill)
        for x, fill in [(batch.input_ids, 0), (batch.attention_mask, 0), (batch.labels, IGNORE_INDEX)]
    ]
    for row in range(3):
        n = int(batch.attention_mask[row].sum())
        for new, old in zip(left, (batch.input_ids, batch.attention_mask, batch.labels), strict=True):
            new[row, 9 - n :] = old[row, :n]
    with torch.no_grad():
        a = forward.answer_logps(model, batch)
        b = forward.answer_logps(model, Batch(left[0], left[1], left[2], batch.example_ids))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_all_logits(batch: Batch) -> None:
    model = MODELS["llama"]()
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    torch.testing.assert_close(forward.all_logits(model, batch), out.logits)
