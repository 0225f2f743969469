"""Snapshots are copies, a restore is all or nothing, a swap leaves no trace, and what is saved opens elsewhere."""

from __future__ import annotations

import copy
import errno
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from unfed.base.artifacts import digest_file
from unfed.base.errors import AdapterError, ArtifactError
from unfed.base.types import AdapterState
from unfed.models.adapter import (
    WeightSwap,
    live_tensors,
    lora_scaling,
    restore,
    save_adapter,
    snapshot,
    trainable_parameters,
)
from unfed.models.load import load_model
from unfed.models.spec import LoraArgs, ModelArgs, TokenizerArgs

IDS = torch.tensor([[1, 9, 12, 40, 7, 2], [1, 30, 31, 32, 33, 34]])


def opened(base: Path, *, use_lora: bool = True, **lora):
    shape = LoraArgs(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **lora})
    args = ModelArgs(str(base), use_lora=use_lora, lora_config=shape)
    return load_model(args, TokenizerArgs(), trainable=True).model


def noise(state: AdapterState, seed: int = 3) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    return AdapterState({n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in state.items()})


@pytest.fixture(scope="module")
def lora(small_base):
    return opened(small_base)


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_snapshot_does_not_follow_the_model(small_base, use_lora):
    model = opened(small_base, use_lora=use_lora)
    taken = snapshot(model)
    before = taken.digest(), {n: t.clone() for n, t in taken.items()}
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(1.0)
    assert all(torch.equal(taken[n], t) for n, t in before[1].items())
    assert snapshot(model).digest() != before[0]
    live = {t.untyped_storage().data_ptr() for t in live_tensors(model).values()}
    assert live.isdisjoint(t.untyped_storage().data_ptr() for t in taken.values())


@pytest.mark.parametrize("use_lora", [True, False])
def test_restore_brings_back_every_bit_and_the_same_parameters(small_base, use_lora):
    model = opened(small_base, use_lora=use_lora)
    wanted, parameters = noise(snapshot(model)), dict(model.named_parameters())
    restore(model, wanted)
    assert snapshot(model).digest() == wanted.digest()
    assert all(p is parameters[n] for n, p in model.named_parameters())


def test_names_are_those_of_peft_without_the_adapters_own(lora):
    names = list(snapshot(lora))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert names == sorted(names) and not any(".default" in n for n in names)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_written(lora, change):
    before = snapshot(lora)
    tensors = dict(noise(before))
    first, last = min(tensors), max(tensors)
    if change == "missing":
        del tensors[last]
    elif change == "unknown":
        tensors["elsewhere"] = torch.zeros(2)
    else:
        tensors[last] = torch.zeros(1, 1)
    with pytest.raises(AdapterError, match=r"elsewhere" if change == "unknown" else last.replace(".", r"\.")):
        restore(lora, AdapterState(tensors))
    assert torch.equal(snapshot(lora)[first], before[first])


def test_tied_embeddings_are_one_tensor_without_lora(small_base):
    model = opened(small_base, use_lora=False)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    state = snapshot(model)
    assert [n for n in state if "embed" in n or "lm_head" in n] == ["model.embed_tokens.weight"]
    assert state.numel == sum(p.numel() for p in model.parameters())


def test_integer_buffers_travel_without_lora(small_base):
    model = opened(small_base, use_lora=False)
    model.register_buffer("steps_seen", torch.tensor([3, 4]))
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    state = snapshot(model)
    assert state["steps_seen"].dtype == torch.int64 and "scratch" not in state
    restore(model, AdapterState({**state, "steps_seen": torch.tensor([5, 6])}))
    assert model.get_buffer("steps_seen").tolist() == [5, 6]


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_swap_shows_the_other_weights_and_leaves_no_trace(small_base, use_lora):
    model = opened(small_base, use_lora=use_lora)
    mine, other = noise(snapshot(model), 1), noise(snapshot(model), 2)
    restore(model, other)
    model.eval()
    with torch.no_grad():
        theirs = model(IDS).logits
        restore(model, mine)
        before = model(IDS).logits
    model.train()
    swap = WeightSwap(model, other)
    with torch.no_grad(), swap.active():
        assert not model.training and torch.equal(model(IDS).logits, theirs)
    assert model.training and snapshot(model).digest() == mine.digest()
    with pytest.raises(ZeroDivisionError), swap.active():
        raise ZeroDivisionError
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_swap_between_forward_and_backward_does_not_disturb_the_gradient(small_base, use_lora):
    model = opened(small_base, use_lora=use_lora)
    restore(model, noise(snapshot(model)))
    swap = WeightSwap(model, noise(snapshot(model), 9))

    def gradients(*, swapped: bool) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        loss = model(IDS, labels=IDS).loss
        if swapped:
            with torch.no_grad(), swap.active():
                model(IDS)
        loss.backward()
        return {n: p.grad.clone() for n, p in trainable_parameters(model).items()}

    plain, disturbed = gradients(swapped=False), gradients(swapped=True)
    assert plain and all(torch.equal(plain[n], disturbed[n]) for n in plain)


def test_a_swap_holds_one_copy_of_what_is_trained(lora):
    swap = WeightSwap(lora, snapshot(lora))
    held = sum(other.numel() for _, other in swap._pairs)
    assert held == snapshot(lora).numel


def test_scaling_by_module(small_base):
    model = opened(small_base, target_modules=("q_proj", "v_proj"))
    scaling = lora_scaling(model)
    assert set(scaling.values()) == {2.0}
    modules = {n.rsplit(".lora_", 1)[0] for n in snapshot(model)}
    assert set(scaling) == modules
    assert set(lora_scaling(opened(small_base, use_rslora=True)).values()) == {8 / 4**0.5}
    assert lora_scaling(opened(small_base, use_lora=False)) == {}


def test_what_is_saved_opens_in_stock_peft_with_equal_logits(small_base, tmp_path):
    model = opened(small_base)
    restore(model, noise(snapshot(model)))
    model.eval()
    save_adapter(model, snapshot(model), tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert {f.stat().st_mode & 0o777 for f in tmp_path.iterdir()} == {0o644}
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_base), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(stock(IDS).logits, model(IDS).logits)


def test_a_full_model_opens_in_stock_transformers_and_may_use_its_cache(small_base, tmp_path):
    model = opened(small_base, use_lora=False)
    restore(model, noise(snapshot(model)))
    save_adapter(model, snapshot(model), tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert stock.config.use_cache
    with torch.no_grad():
        assert torch.equal(stock(IDS).logits, model.eval()(IDS).logits)


def test_the_same_adapter_is_saved_as_the_same_bytes(small_base, tmp_path):
    state = noise(snapshot(opened(small_base)))
    for name in ("one", "two"):
        save_adapter(opened(small_base), state, tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert digest_file(tmp_path / "one" / file) == digest_file(tmp_path / "two" / file)


@pytest.mark.parametrize("broken", ["os.replace", "unfed.models.adapter.save_file"])
def test_a_full_disk_while_saving_leaves_the_previous_adapter_whole(small_base, tmp_path, monkeypatch, broken):
    model = opened(small_base)
    save_adapter(model, snapshot(model), tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(broken, full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        save_adapter(model, noise(snapshot(model)), tmp_path)
    monkeypatch.undo()
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    save_adapter(model, noise(snapshot(model)), tmp_path)
    assert not (tmp_path / ".export").exists()


def test_a_model_is_never_copied_whole(lora, monkeypatch):
    def forbidden(*_args, **_kwargs):
        raise AssertionError("deepcopy of a model")

    monkeypatch.setattr(copy, "deepcopy", forbidden)
    state = snapshot(lora)
    restore(lora, state)
    with WeightSwap(lora, state).active():
        pass
