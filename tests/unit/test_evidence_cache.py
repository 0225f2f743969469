"""What a model said is read again, and never for another model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from unfed.data.chat import encode_rows
from unfed.data.spec import Template
from unfed.evaluation import cache, collect, gradients
from unfed.evaluation.cache import EvidenceCache
from unfed.evaluation.runner import evaluate
from unfed.evaluation.suites import SuiteConfig
from unfed.models.digest import model_digest
from unfed.models.generate import Budget, Decoding

ROWS = {
    "forget": [
        {"id": str(n), "question": f"Who is {n}?", "answer": f"Ann {n} of the town",
         "perturbed_answer": ["Bob", f"Cy {n}"], "paraphrased_answer": f"It is Ann {n}"}
        for n in range(4)
    ],
    "holdout": [{"id": f"h{n}", "question": f"Where is {n}?", "answer": f"in town {n * 7}"} for n in range(4)],
}  # fmt: skip
METRICS = (
    "forget_Q_A_Prob",
    "forget_Q_A_ROUGE",
    "extraction_strength",
    "mia_reference",
    "mia_gradnorm",
    "forget_fluency",
)


@pytest.fixture
def opened(small_base: Path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(small_base)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(base, config).eval(), AutoTokenizer.from_pretrained(small_base)


class Counter:
    """Counts what is asked of a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scored = self.generated = self.norms = 0
        score, generate, norms = collect.score, collect.generate, gradients.gradient_norms

        def scoring(given: Any, encoded: Any, details: Any) -> Any:
            self.scored += len(encoded)
            return score(given, encoded, details)

        def generating(model: Any, tokenizer: Any, prompts: Any, *rest: Any, **more: Any) -> Any:
            self.generated += len(prompts)
            return generate(model, tokenizer, prompts, *rest, **more)

        def taking(model: Any, encoded: Any, *rest: Any) -> Any:
            self.norms += len(encoded)
            return norms(model, encoded, *rest)

        monkeypatch.setattr(collect, "score", scoring)
        monkeypatch.setattr(collect, "generate", generating)
        monkeypatch.setattr(collect, "gradient_norms", taking)

    def taken(self) -> tuple[int, int, int]:
        found = (self.scored, self.generated, self.norms)
        self.scored = self.generated = self.norms = 0
        return found


def run(opened: Any, place: Path, *metrics: str, **changes: Any) -> Any:
    model, tokenizer = opened
    digest = model_digest(model, tokenizer)
    kept = EvidenceCache(place, digest.model, digest.base)
    asked = replace(SuiteConfig(metrics=metrics or METRICS, decoding=Decoding(max_new_tokens=4), cache=kept), **changes)
    return evaluate(model, tokenizer, Template(), asked, ROWS).to_eval_json()


def test_a_second_run_asks_nothing_and_says_the_same(opened, tmp_path, monkeypatch):
    seen = Counter(monkeypatch)
    first = run(opened, tmp_path)
    # Answers of forget and holdout under the model and under the base, and four generations under the base.
    assert seen.taken() == (8 + 8 + 4, 4, 8)
    assert run(opened, tmp_path) == first and seen.taken() == (0, 0, 0)
    assert run(opened, tmp_path, budget=Budget(64, 1)) == first, "batches are no part of the key"
    # Another metric of the same columns reads them; new columns are scored alone.
    run(opened, tmp_path, "exact_memorization", "mia_min_k")
    assert seen.taken() == (0, 0, 0)
    run(opened, tmp_path, "forget_truth_ratio")
    assert seen.taken() == (4 + 8, 0, 0)
    # The moments that only some metrics need are not there yet for the holdout.
    run(opened, tmp_path, "mia_min_k_plus_plus")
    assert seen.taken() == (4, 0, 0)
    assert {p.stat().st_mode & 0o077 for p in tmp_path.rglob("*") if p.is_dir()} == {0}


def test_what_was_read_and_made_is_counted(opened, tmp_path):
    """Statistics of the answers of two splits, and the texts of one: three entries."""
    model, tokenizer = opened
    digest = model_digest(model, tokenizer)
    for expected in ({"made": 3}, {"read": 3}):
        cache = EvidenceCache(tmp_path, digest.model, digest.base)
        metrics = ("mia_loss", "forget_Q_A_ROUGE")
        asked = SuiteConfig(metrics=metrics, decoding=Decoding(max_new_tokens=4), cache=cache)
        evaluate(model, tokenizer, Template(), asked, ROWS)
        assert dict(cache.tally) == expected


def test_nothing_is_read_of_another_model_or_other_data(opened, tmp_path, monkeypatch):
    seen = Counter(monkeypatch)
    model, tokenizer = opened
    first = run(opened, tmp_path, "forget_Q_A_Prob")
    seen.taken()
    changes = [
        next(p for n, p in model.named_parameters() if "lora_B" in n),
        next(p for n, p in model.named_parameters() if "norm" in n),
    ]
    for weight in changes:
        with torch.no_grad():
            weight.view(-1)[0] += 1e-3
        assert run(opened, tmp_path, "forget_Q_A_Prob") != first and seen.taken()[0] == 4
    model.peft_config["default"].lora_alpha = 5
    run(opened, tmp_path, "forget_Q_A_Prob")
    assert seen.taken()[0] == 4, "settings count as well"
    longest = max(len(e) for e in encode_rows(tokenizer, Template(), ROWS["forget"]))
    run(opened, tmp_path, "forget_Q_A_Prob", max_length=longest - 1)
    assert seen.taken()[0] == 4
    run(opened, tmp_path, "forget_Q_A_Prob", parity="openunlearning")
    assert seen.taken()[0] == 4
    run(opened, tmp_path, "forget_Q_A_ROUGE")
    run(opened, tmp_path, "forget_Q_A_ROUGE", decoding=Decoding(max_new_tokens=5))
    assert seen.taken()[1] == 8
    for _ in range(2):
        run(opened, tmp_path, "forget_Q_A_ROUGE", decoding=Decoding(max_new_tokens=5, do_sample=True))
    assert seen.taken()[1] == 8, "sampled text is not kept"


def test_broken_entries_are_made_anew(opened, tmp_path):
    first = run(opened, tmp_path)
    for file in [p for p in tmp_path.rglob("*") if p.is_file()]:
        file.write_bytes(file.read_bytes()[:20])
    assert run(opened, tmp_path) == first


def test_digests_tell_models_apart(opened):
    model, tokenizer = opened
    one = model_digest(model, tokenizer)
    assert model_digest(model, tokenizer) == one and one.base is not None
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).mul_(1.01)
    two = model_digest(model, tokenizer)
    assert two.model != one.model and two.base == one.base
    half = model.get_base_model().half()
    assert model_digest(half, tokenizer).base is None


def test_the_digest_is_the_same_in_the_next_process(opened):
    """A set has another order there. Eight falls into zero's place, so these two sets are in different orders."""
    model, tokenizer = opened
    found = []
    for order in ([0, 8], [8, 0]):
        model.peft_config["default"].target_modules = set(order)
        found.append((str(set(order)), model_digest(model, tokenizer)))
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1]
    model.peft_config["default"].inference_mode = True  # as an adapter is opened that has been trained before
    assert model_digest(model, tokenizer) == found[0][1]
    model.peft_config["default"].target_modules = {0, 1}
    assert model_digest(model, tokenizer) != found[0][1]


def test_a_tokenizer_that_reads_tokens_otherwise_is_another_one(opened):
    model, tokenizer = opened
    one = model_digest(model, tokenizer)
    tokenizer.clean_up_tokenization_spaces = not tokenizer.clean_up_tokenization_spaces
    two = model_digest(model, tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["town"]})  # left out of decoded text from now on
    assert len({one.model, two.model, model_digest(model, tokenizer).model}) == 3


def test_biases_that_train_with_an_adapter_are_part_of_the_base(opened):
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=9, num_attention_heads=2, attention_bias=True, **sizes))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], bias="all"))
    one = model_digest(model, opened[1])
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("bias")).add_(1)
    assert model_digest(model, opened[1]).base != one.base  # PEFT does not take them back in disable_adapter


def test_libraries_are_part_of_the_key(opened, tmp_path, monkeypatch):
    seen = Counter(monkeypatch)
    run(opened, tmp_path, "forget_Q_A_Prob")
    monkeypatch.setattr(cache, "LIBRARIES", ("2.0", "5.0", "0.1"))
    run(opened, tmp_path, "forget_Q_A_Prob")
    assert seen.taken()[0] == 8


def test_an_evaluation_outlives_its_cache(opened, tmp_path, caplog):
    (tmp_path / "file").write_text("where a directory should be")
    assert run(opened, tmp_path / "file") == run(opened, tmp_path / "good")
    assert "goes on without its cache (eval.cache_dir)" in caplog.text and str(tmp_path / "file") in caplog.text


def test_fluency_by_hand(opened, tmp_path):
    """exp of the mean log-probability, under the base, of what the adapter says after the prompt."""
    model, tokenizer = opened
    found = run(opened, tmp_path, "forget_fluency", "forget_Q_A_ROUGE")
    want = []
    for row in found["forget_Q_A_ROUGE"]["value_by_index"].values():
        question = next(r["question"] for r in ROWS["forget"] if r["question"] in row["input"])
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        own = tokenizer(row["generation"], add_special_tokens=False)["input_ids"]
        if not own:
            want.append(0.0)
            continue
        with torch.no_grad(), model.disable_adapter():
            logps = model(torch.tensor([[*ids, *own]])).logits[0].float().log_softmax(-1)
        want.append(float(np.exp(np.mean([float(logps[len(ids) + k - 1, t]) for k, t in enumerate(own)]))))
    assert found["forget_fluency"]["agg_value"] == pytest.approx(np.mean(want), rel=1e-4)
