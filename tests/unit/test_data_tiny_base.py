"""The tiny base: built once, whole or not at all, the same bytes again."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unfed.app.tiny_base import SIZES, build, is_complete, tiny_base
from unfed.base.errors import ArtifactError
from unfed.data.chat import Template, encode_pairs
from unfed.data.collate import collate
from unfed.data.fictional_corpus import fact_pairs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A base of the size ``test`` and what its building said."""
    said: list[str] = []
    return tiny_base(tmp_path_factory.mktemp("base"), "test", said.append), said


def test_it_opens_as_any_model_and_has_learned(made):
    path, said = made
    assert "ready in" in said[-1] and len(said) > 5
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.float32 and len(tokenizer) <= SIZES["test"].vocab_size
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id
    batch = collate(encode_pairs(tokenizer, Template(), fact_pairs()[:40]), tokenizer.pad_token_id)
    with torch.no_grad():
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert loss.item() < 0.85 * torch.tensor(float(len(tokenizer))).log().item()


def test_the_tokenizer_takes_any_text_and_gives_it_back(made):
    tokenizer = AutoTokenizer.from_pretrained(made[0])
    for text in ("Where was Mirel born?", "naïve 你好 ⟨x⟩ 1953"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_is_built_once_and_again_after_damage(made):
    path, _ = made
    said: list[str] = []
    assert tiny_base(path.parent, "test", said.append) == path and not said
    weights = path / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1])
    assert not is_complete(path)
    state = torch.random.get_rng_state()
    assert tiny_base(path.parent, "test", said.append) == path and said
    assert weights.read_bytes() == before  # reproducible
    assert torch.random.get_rng_state().equal(state)  # and the caller's random state is left alone
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing is left behind


def test_the_name_follows_the_settings_and_unknown_sizes_are_refused(made, tmp_path: Path):
    assert SIZES["test"].digest()[7:19] in made[0].name and SIZES["test"].digest() != SIZES["quickstart"].digest()
    with pytest.raises(ArtifactError, match="no tiny base of size 'tst'; did you mean 'test'"):
        tiny_base(tmp_path, "tst")  # type: ignore[arg-type]


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("unfed.app.tiny_base.pretrain", lambda *args: None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write the tiny base to"):
        build(tmp_path / "file" / "base", SIZES["test"])
