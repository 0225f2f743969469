"""A second adapter on a learned one: the stack is their sum, and cutting it gives the learned one back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from unfed.aggregation.lora import lora_pairs
from unfed.base.errors import AdapterError
from unfed.base.types import AdapterState
from unfed.models.adapter import (
    base_alone,
    lora_scaling,
    restore,
    save_adapter,
    snapshot,
    trainable_parameters,
)
from unfed.models.load import load_model
from unfed.models.second import (
    LEARNED,
    SecondAdapter,
    add_second,
    as_one,
    not_plain_lora,
    ranks_of,
    stack,
    stacked_config,
    unstack,
)
from unfed.models.spec import LoraArgs, ModelArgs, TokenizerArgs


def factors(ranks: dict[str, int], seed: int, m: int = 5, n: int = 7) -> AdapterState:
    draw = torch.Generator().manual_seed(seed)
    tensors = {f"{k}.lora_A.weight": torch.randn(r, n, generator=draw) for k, r in ranks.items()}
    return AdapterState(tensors | {f"{k}.lora_B.weight": torch.randn(m, r, generator=draw) for k, r in ranks.items()})


def dense(adapter: AdapterState, scaling) -> dict[str, torch.Tensor]:
    return {k: scaling[k] * adapter[b].double() @ adapter[a].double() for k, (a, b) in lora_pairs(adapter).items()}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.05, 20), st.floats(0.05, 20), st.integers(0, 10**6))
def test_the_stack_is_the_sum_and_is_cut_back_bit_for_bit(r1, r2, s1, s2, seed):
    """W = s1 B1 A1 + s2 B2 A2 in module p, s1 B1 A1 in module q, which the second adapter has not."""
    learned, second = factors({"p": r1, "q": 2}, seed), factors({"p": r2}, seed + 1)
    one, two = {"p": s1, "q": 3.0}, {"p": s2}
    both = stack(learned, second, one, two)
    wanted, found = dense(learned, one), dense(both, one)
    wanted["p"] = wanted["p"] + dense(second, two)["p"]
    for module, matrix in wanted.items():
        torch.testing.assert_close(found[module], matrix, atol=1e-6 * max(1.0, float(matrix.abs().max())), rtol=0)
    assert ranks_of(both) == {"p": r1 + r2, "q": 2}
    assert unstack(both, ranks_of(learned)).digest() == learned.digest()


def test_a_module_that_the_learned_one_lacks_is_refused():
    with pytest.raises(AdapterError, match="has q, which the learned one beneath it lacks"):
        stack(factors({"p": 2}, 0), factors({"q": 2}, 1), {"p": 1.0}, {"q": 1.0})


def test_what_most_modules_have_is_the_rule():
    """Scaling 10/4 of rank 7 is alpha 17.5; the last of three modules keeps rank 4, alpha 10."""
    ranks = {f"base_model.model.l.{i}.q": r for i, r in enumerate((7, 7, 4))}
    config = stacked_config(LoraConfig(r=4, lora_alpha=10, use_rslora=True), ranks, dict.fromkeys(ranks, 2.5))
    assert (config.r, config.lora_alpha, config.use_rslora) == (7, 17.5, False)
    assert (config.rank_pattern, config.alpha_pattern) == ({"l.2.q": 4}, {"l.2.q": 10})


SHAPES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "embedding": {"target_modules": ("embed_tokens", "q_proj")},
}


@pytest.fixture(params=SHAPES)
def learned(request, small_base, tmp_path):
    """An adapter directory whose factors are all different from zero, and the logits of it in evaluation."""
    shape = {"r": 4, "lora_alpha": 10, "target_modules": ("q_proj", "down_proj"), "lora_dropout": 0.1}
    args = ModelArgs(str(small_base), use_lora=True, lora_config=LoraArgs(**(shape | SHAPES[request.param])))
    model = load_model(args, TokenizerArgs(), trainable=True).model
    save_adapter(model, filled(snapshot(model)), tmp_path / "learned")
    return tmp_path / "learned", logits(model)


def filled(state: AdapterState) -> AdapterState:
    draw = torch.Generator().manual_seed(3)
    return AdapterState({n: 0.2 * torch.randn(t.shape, generator=draw) for n, t in state.items()})


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(5, 45).reshape(2, 20)).logits


def on_top(directory, *, only: str = "", seed: int = 0) -> PeftModel:
    args = ModelArgs(str(directory), use_lora=True)
    model = load_model(args, TokenizerArgs(), trainable=False, adapter_name=LEARNED).model
    assert isinstance(model, PeftModel)
    modules = tuple(m for m in lora_pairs(snapshot(model, LEARNED)) if only in m)
    add_second(model, SecondAdapter(3, 5, modules), seed)
    return model


def test_a_fresh_one_changes_nothing_and_trains_alone(learned):
    directory, old = learned
    model = on_top(directory)
    assert torch.equal(logits(model), old)
    own = snapshot(model)
    assert all(not (own[b] @ own[a]).any() for a, b in lora_pairs(own).values())
    assert set(ranks_of(own).values()) == {3}
    with base_alone(model):
        bare = logits(model)
    assert not torch.equal(bare, old) and torch.equal(logits(model), old)
    names = set(trainable_parameters(model))
    assert len(names) == len(own) and not any(LEARNED in n for n in names)
    assert snapshot(on_top(directory, seed=0)).digest() == own.digest() != snapshot(on_top(directory, seed=1)).digest()


def test_the_frozen_one_acts_without_dropout(learned):
    model = on_top(learned[0])
    model.train()
    ids = torch.arange(5, 45).reshape(2, 20)
    with torch.no_grad():  # B = 0: what the second one's dropout does is multiplied away
        assert torch.equal(model(input_ids=ids).logits, learned[1])


@pytest.mark.parametrize("only", ["", "layers.1."])
def test_both_as_one_adapter_in_the_model_and_in_stock_peft(learned, small_base, tmp_path, only):
    directory, old = learned
    model = on_top(directory, only=only)
    second = filled(snapshot(model))
    restore(model, second)
    new, below = logits(model), snapshot(model, LEARNED)
    with torch.no_grad():
        assert (new - old).abs().max() > 1e-2
    wide = logits(copy.deepcopy(model).double())  # float32 sums in another order, by more or less on each processor
    one, both = as_one(model, second)
    torch.testing.assert_close(logits(copy.deepcopy(one).double()), wide, atol=2e-6, rtol=0)
    assert unstack(both, ranks_of(below)).digest() == below.digest()
    assert len(trainable_parameters(one)) == len(both) and set(one.peft_config) == {"default"}
    save_adapter(one, both, tmp_path / "stack")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_base), tmp_path / "stack")
    torch.testing.assert_close(logits(stock.double()), wide, atol=2e-6, rtol=0)
    again = load_model(ModelArgs(str(tmp_path / "stack"), use_lora=True), TokenizerArgs(), trainable=True).model
    assert snapshot(again).digest() == both.digest() and lora_scaling(again).keys() == ranks_of(both).keys()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"init_lora_weights": "gaussian"}, None),
        ({"peft_type": "IA3"}, "its peft_type is IA3"),
        ({"modules_to_save": ["lm_head"], "use_dora": True}, "it sets modules_to_save, use_dora"),
        ({"bias": "all"}, "bias=all"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"alpha_pattern": {"q_proj": 0}}, "lora_alpha is not above 0"),
    ],
)
def test_what_is_more_than_lora(tmp_path, change, reason):
    LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    found = not_plain_lora(tmp_path)
    assert found is None if reason is None else reason in found
