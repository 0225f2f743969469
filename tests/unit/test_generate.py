"""Generated text: order, stops, batches; and the evaluation's bad inputs on a small model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unfed.base.errors import ArtifactError, ConfigError, DataError
from unfed.data.chat import Template, encode_prompts, encode_rows
from unfed.evaluation.collect import Pass, collect
from unfed.evaluation.logs import RUN_KEY, load_model_logs
from unfed.evaluation.runner import EVAL_FILE, SUMMARY_FILE, evaluate, write_results
from unfed.evaluation.suites import SuiteConfig
from unfed.models.generate import Budget, Decoding, generate_all, inference, pad_id

TEMPLATE = Template(system_prompt="You are a helpful assistant.")
SHORT = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def rows(shared_dir: Path, name: str, count: int, start: int = 0) -> list[dict[str, Any]]:
    lines = (shared_dir / "data" / "tofu" / f"{name}.json").read_text().splitlines()[start : start + count]
    return [{"id": f"{name}/{i}", **json.loads(line)} for i, line in enumerate(lines, start)]


@pytest.fixture(scope="module")
def forget(shared_dir: Path) -> list[dict[str, Any]]:
    return rows(shared_dir, "forget10_perturbed", 6)


def prompts_of(tokenizer: Any, examples: Sequence[dict[str, Any]]) -> list[tuple[int, ...]]:
    return encode_prompts(tokenizer, TEMPLATE, [r["question"] for r in examples])


def test_budget_keeps_its_bounds_and_loses_nobody() -> None:
    lengths = [5, 50, 7, 7, 9, 30, 1]
    batches = list(Budget(max_tokens=40, batch_size=3).batches(lengths))
    assert sorted(i for b in batches for i in b) == list(range(7))
    assert batches[0] == [1]  # longer than the budget: alone
    for batch in batches[1:]:
        assert len(batch) <= 3
        assert len(batch) * max(lengths[i] for i in batch) <= 40
    assert list(Budget().batches([])) == []


def test_greedy_equals_one_prompt_at_a_time_by_hand(model: Any, tokenizer: Any, forget: list[dict[str, Any]]) -> None:
    prompts = prompts_of(tokenizer, forget)
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(12):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
    for batch_size in (1, 3, 6):
        assert generate_all(model, tokenizer, prompts, SHORT, Budget(batch_size=batch_size)) == expected
    assert len(set(expected)) > 1


def test_sampling_depends_on_the_seed_and_not_on_the_batch(
    model: Any, tokenizer: Any, forget: list[dict[str, Any]]
) -> None:
    prompts = prompts_of(tokenizer, forget)
    drawn = replace(SHORT, do_sample=True, temperature=1.5, top_p=0.9)
    one = generate_all(model, tokenizer, prompts, drawn, Budget(batch_size=1))
    assert generate_all(model, tokenizer, prompts, drawn, Budget(batch_size=4)) == one
    assert generate_all(model, tokenizer, prompts, replace(drawn, seed=1)) != one
    # As top_p goes to 0 a sample is the greedy text.
    cold = replace(drawn, top_p=1e-6)
    assert generate_all(model, tokenizer, prompts, cold) == generate_all(model, tokenizer, prompts, SHORT)


def test_the_models_own_penalties_do_not_apply(model: Any, tokenizer: Any, forget: list[dict[str, Any]]) -> None:
    prompts = prompts_of(tokenizer, forget)
    plain = generate_all(model, tokenizer, prompts, SHORT)
    before = model.generation_config.repetition_penalty
    model.generation_config.repetition_penalty = 9.0
    try:
        assert generate_all(model, tokenizer, prompts, SHORT) == plain
    finally:
        model.generation_config.repetition_penalty = before


def test_modes_are_restored_one_by_one(model: Any) -> None:
    model.train()
    model.model.layers[0].eval()
    with inference(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
    assert model.training and not model.model.layers[0].training
    model.eval()


def test_pad_id_falls_back_to_eos(tokenizer: Any) -> None:
    assert pad_id(tokenizer) == 0
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither"):
        pad_id(tokenizer)


def suite(*metrics: str, **changes: Any) -> SuiteConfig:
    return replace(SuiteConfig(metrics=metrics, decoding=SHORT), **changes)


def test_parity_hides_turn_ends_when_pad_is_eos(model: Any, tokenizer: Any, forget: list[dict[str, Any]]) -> None:
    """With pad = eos the reference masks the turn ends inside the conversation; by length nothing changes."""

    def losses(parity: Any) -> list[float]:
        asked = suite("forget_Q_A_Prob", parity=parity)
        found = evaluate(model, tokenizer, TEMPLATE, asked, {"forget": forget}).scores["forget_Q_A_Prob"]
        return [row["avg_loss"] for row in found.per_example or ()]

    plain = losses(None)
    assert losses("openunlearning") == pytest.approx(plain, abs=1e-5)  # pad is a token of its own
    tokenizer.pad_token = tokenizer.eos_token
    assert losses(None) == pytest.approx(plain, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(losses("openunlearning"), plain, strict=True)) > 1e-3


def test_missing_splits_and_columns_are_explained_not_invented(
    model: Any, tokenizer: Any, forget: list[dict[str, Any]], tmp_path: Path
) -> None:
    plain = [{k: r[k] for k in ("id", "question", "answer")} for r in forget]
    model.train()
    result = evaluate(model, tokenizer, TEMPLATE, suite(), {"forget": plain})
    assert model.training
    model.eval()
    assert set(result.summary()) == {"forget_Q_A_Prob", "forget_Q_A_ROUGE", "extraction_strength"}
    written = result.to_eval_json()
    assert written["forget_truth_ratio"]["agg_value"] is None
    assert "no column 'paraphrased_answer'" in written["forget_truth_ratio"]["why"]
    assert "no rows for retain" in written["model_utility"]["why"]
    assert "no column" in written["forget_quality"]["why"]
    write_results(result, tmp_path, {"adapter": "sha256:0"})
    on_disk = json.loads((tmp_path / EVAL_FILE).read_text())
    assert on_disk[RUN_KEY]["digests"] == {"adapter": "sha256:0"}
    assert on_disk[RUN_KEY]["splits"]["forget"]["rows"] == 6
    assert json.loads((tmp_path / SUMMARY_FILE).read_text()) == result.summary()


def test_cut_answers_are_counted(model: Any, tokenizer: Any, forget: list[dict[str, Any]]) -> None:
    result = evaluate(model, tokenizer, TEMPLATE, suite("forget_Q_A_Prob", max_length=60), {"forget": forget})
    assert 0 < result.splits["forget"].cut <= 6


def test_a_model_of_nan_scores_nothing(model: Any, tokenizer: Any, forget: list[dict[str, Any]]) -> None:
    head = model.get_output_embeddings().weight
    saved = head.detach().clone()
    head.data.fill_(float("nan"))
    try:
        result = evaluate(model, tokenizer, TEMPLATE, suite("forget_Q_A_Prob", "mia_loss"),
                          {"forget": forget, "holdout": forget})  # fmt: skip
    finally:
        head.data.copy_(saved)
    assert result.summary() == {}
    assert "not finite" in result.to_eval_json()["forget_Q_A_Prob"]["why"]
    json.dumps(result.to_eval_json(), allow_nan=False)


def test_bad_requests(model: Any, tokenizer: Any, forget: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'forget_Q_A_Prob'"):
        evaluate(model, tokenizer, TEMPLATE, suite("forget_QA_Prob"), {"forget": forget})
    with pytest.raises(DataError, match="every split is empty"):
        evaluate(model, tokenizer, TEMPLATE, suite(), {"forget": []})
    gap = [*forget[:2], {k: v for k, v in forget[2].items() if k != "perturbed_answer"}]
    with pytest.raises(DataError, match="forget: row 3 has no column 'perturbed_answer'"):
        collect(Pass(model, tokenizer, TEMPLATE), {"forget": gap}, [("forget", "perturbed_answer")], [])
    odd = [*forget[:2], {**forget[2], "perturbed_answer": []}]
    with pytest.raises(DataError, match="row 3 has no answer in 'perturbed_answer'"):
        collect(Pass(model, tokenizer, TEMPLATE), {"forget": odd}, [("forget", "perturbed_answer")], [])


def test_retain_logs_of_others_are_refused(
    model: Any, tokenizer: Any, shared_dir: Path, forget: list[dict[str, Any]], tmp_path: Path
) -> None:
    asked = suite("forget_quality")
    done = evaluate(model, tokenizer, TEMPLATE, asked, {"forget": forget})
    assert "no retain_logs_path" in str(done.scores["forget_quality"].why)
    again = evaluate(model, tokenizer, TEMPLATE, asked, {"forget": forget}, done.retain_logs())
    assert again.summary()["forget_quality"] == pytest.approx(1)

    other = rows(shared_dir, "forget10_perturbed", 6, start=6)
    with pytest.raises(ArtifactError, match=r"another forget split \(forget\): its rows are sha256"):
        evaluate(model, tokenizer, TEMPLATE, asked, {"forget": other}, done.retain_logs())
    theirs = load_model_logs(shared_dir / "golden" / "eval" / "tiny_retain.json")
    with pytest.raises(ArtifactError, match=r"tiny_retain\.json: .*it has 40 rows, this run has 6"):
        evaluate(model, tokenizer, TEMPLATE, asked, {"forget": forget}, theirs)
    shifted = [{"id": str(i), "answer": r["answer"]} for i, r in enumerate(rows(shared_dir, "forget01", 40))]
    with pytest.raises(ArtifactError, match="the answer of row 0 is"):
        theirs.check_split([r["answer"] for r in shifted], "sha256:unknown")

    leak = suite("privleak", "forget_Q_A_Prob")
    held = evaluate(model, tokenizer, TEMPLATE, leak, {"forget": forget, "holdout": other}).retain_logs()
    with pytest.raises(ArtifactError, match="another holdout split"):
        evaluate(model, tokenizer, TEMPLATE, leak, {"forget": forget, "holdout": other[:4]}, held)
    without = evaluate(model, tokenizer, TEMPLATE, leak, {"forget": forget}).retain_logs()
    found = evaluate(model, tokenizer, TEMPLATE, leak, {"forget": forget}, without)  # no holdout here either
    assert found.scores["forget_Q_A_Prob"].value is not None
    assert "no rows for holdout" in str(found.scores["privleak"].why)

    file = tmp_path / "TOFU_EVAL.json"
    file.write_text(json.dumps({"forget_Q_A_Prob": {"agg_value": 0.5}}))
    lacking = load_model_logs(file)
    with pytest.raises(ArtifactError, match=r"TOFU_EVAL\.json: no forget_truth_ratio\.value_by_index"):
        evaluate(model, tokenizer, TEMPLATE, asked, {"forget": forget}, lacking)
    with pytest.raises(ArtifactError, match=r"no mia_min_k\.agg_value"):
        evaluate(model, tokenizer, TEMPLATE, suite("privleak"), {"forget": forget, "holdout": forget}, lacking)
    for content in ("[]", "{}", '{"a": 1}', "{"):
        file.write_text(content)
        with pytest.raises(ArtifactError, match=r"TOFU_EVAL\.json"):
            load_model_logs(file)
    with pytest.raises(ArtifactError, match="cannot read"):
        load_model_logs(tmp_path / "nowhere.json")


def test_of_an_answer_that_was_cut_the_text_is_what_was_scored(
    model: Any, tokenizer: Any, forget: list[dict[str, Any]]
) -> None:
    """The zlib attack divides by the length of a text; OpenUnlearning takes that of the labelled tokens."""
    lengths = [len(e) for e in encode_rows(tokenizer, TEMPLATE, forget)]
    most = (min(lengths) + max(lengths)) // 2
    given = Pass(model, tokenizer, TEMPLATE, max_length=most)
    texts = collect(given, {"forget": forget}, [("forget", "answer")], []).answers["forget", "answer"].texts
    for row, text, length in zip(forget, texts, lengths, strict=True):
        assert row["answer"].startswith(text.strip())
        assert (text == row["answer"]) == (length <= most)
