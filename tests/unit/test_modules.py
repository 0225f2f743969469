"""Modules by name: outputs equal to the whole pass's, weights that are confined, and the mistakes of both."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from unfed.base.errors import ConfigError
from unfed.base.types import Batch
from unfed.models.adapter import trainable_parameters
from unfed.models.modules import base_name, check_scope, confined, find_module, module_output, reached
from unfed.objectives.base import Scope

SIZES = {
    "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": (LlamaConfig(**SIZES), "model.layers", ["q_proj", "down_proj"]),
    "gemma2": (Gemma2Config(**SIZES, head_dim=8), "model.layers", ["q_proj", "down_proj"]),
    "gpt2": (
        GPT2Config(vocab_size=61, n_embd=16, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=2),
        "transformer.h",
        ["c_attn"],
    ),
}


def build(name="llama", *, lora=True, layers=None):
    config, _, targets = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if lora:
        shape = LoraConfig(r=2, target_modules=targets, layers_to_transform=layers, fan_in_fan_out=name == "gpt2")
        model = get_peft_model(model, shape)
        for n, p in model.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p)
    return model.eval()


def batch() -> Batch:
    ids = torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return Batch(ids, mask, ids, ("a", "b", "c"))


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_of_a_block_and_its_gradients_are_those_of_the_whole_pass(name, lora):
    model, given = build(name, lora=lora), batch()
    _, blocks, _ = CONFIGS[name]
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = model(input_ids=given.input_ids, attention_mask=given.attention_mask, output_hidden_states=True)
    real = given.attention_mask.bool()
    for layer in (0, 1):
        output = module_output(model, given, rf"{blocks}\.{layer}")
        torch.testing.assert_close(output[real], whole.hidden_states[layer + 1][real])
        grads = [
            torch.autograd.grad(x[real].square().sum(), parameters, retain_graph=True, allow_unused=True)
            for x in (output, whole.hidden_states[layer + 1])
        ]
        for mine, theirs in zip(*grads, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    after = model(input_ids=given.input_ids, attention_mask=given.attention_mask)
    assert torch.equal(after.logits, whole.logits), "nothing is left behind"


def test_a_module_within_a_block_and_the_last_block(monkeypatch):
    model, given = build(), batch()
    inner, seen = model.get_base_model(), []
    inner.model.layers[1].mlp.register_forward_hook(lambda _m, _a, out: seen.append(out))
    last = inner.model.layers[2].register_forward_hook(lambda _m, _a, out: seen.append(out))
    model(input_ids=given.input_ids, attention_mask=given.attention_mask)
    last.remove()
    mlp, block = seen
    real = given.attention_mask.bool()
    torch.testing.assert_close(module_output(model, given, r"model\.layers\.1\.mlp")[real], mlp[real])
    torch.testing.assert_close(module_output(model, given, r"model\.layers\.2")[real], block[real])
    ran = []
    inner.model.layers[2].self_attn.register_forward_hook(lambda *_: ran.append(2))
    inner.model.layers[0].self_attn.register_forward_hook(lambda *_: ran.append(0))
    module_output(model, given, r"model\.layers\.1")
    assert ran == [0], "what comes after the block is not computed"


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_are_those_without(reentrant):
    model, given, grads = build(), batch(), []
    parameters = trainable_parameters(model)
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad(set_to_none=True)
        module_output(model, given, r"model\.layers\.1").square().mean().backward()
        grads.append({n: p.grad for n, p in parameters.items() if p.grad is not None})
    assert len(grads[0]) == 8  # q_proj and down_proj, A and B, of two layers
    assert grads[0].keys() == grads[1].keys()
    for name, plain in grads[0].items():
        torch.testing.assert_close(grads[1][name], plain, rtol=1e-5, atol=1e-7)


def test_names_without_peft():
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert base_name(name) == ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj")
    assert base_name("model.norm.weight") == ("model.norm.weight", "model.norm")
    saved = "base_model.model.lm_head.modules_to_save.default.weight"
    assert base_name(saved) == ("lm_head.weight", "lm_head")
    bias = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
    assert base_name(bias) == ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"model\.layers\.7", r"it matches none of this model's \(its blocks are model.layers.0 to model.layers.2\)"),
        (r"layers\.1", "it matches none"),
        (r"model\.layers\.\d", r"it matches 3 \(model.layers.0, model.layers.1, model.layers.2\)"),
        (r".*lora_A", "it matches none"),
    ],
)
def test_a_pattern_must_name_one_module(pattern, said):
    with pytest.raises(ConfigError, match=said):
        find_module(build(), pattern)


def test_only_what_the_scope_names_requires_a_gradient_and_only_inside():
    model = build()
    before = set(trainable_parameters(model))
    assert len(before) == 12
    paper = Scope(r"model\.layers\.1", (r"model\.layers\.(0|1|2)\.mlp\.down_proj\.weight",), only_below=True)
    with confined(model, paper):
        inside = set(trainable_parameters(model))
    assert {base_name(n)[1] for n in inside} == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert set(trainable_parameters(model)) == before
    with pytest.raises(ZeroDivisionError), confined(model, Scope(r"model\.layers\.1", (r".*\.q_proj",))):  # noqa: PT012
        assert {base_name(n)[1] for n in trainable_parameters(model)} == {
            f"model.layers.{i}.self_attn.q_proj" for i in (0, 1, 2)
        }
        raise ZeroDivisionError
    assert set(trainable_parameters(model)) == before


def test_what_a_module_within_a_block_depends_on():
    model = build()
    parameters = trainable_parameters(model)
    found = {base_name(n)[1] for n in reached(model, r"model\.layers\.1\.self_attn", parameters)}
    assert found == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    }


def test_an_adapter_above_the_steered_block_is_refused():
    above, all_of_it = build(layers=[2]), Scope(r"model\.layers\.1", only_below=True)
    with pytest.raises(ConfigError, match=r"no trained weight lies in or below model.layers.1, so nothing could learn"):
        check_scope(above, all_of_it)
    check_scope(above, Scope(r"model\.layers\.1"))  # another loss may reach it
    check_scope(build(layers=[1]), all_of_it)
    check_scope(build(lora=False), all_of_it)
    with pytest.raises(
        ConfigError, match=r"matches none of the 4 weights that are trained \(the modules model.layers.2"
    ):
        check_scope(above, Scope(r"model\.layers\.1", (r".*\.up_proj",)))
