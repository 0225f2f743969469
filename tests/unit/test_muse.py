"""The MUSE suite on a small model: every number again, the slow way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rouge_score import rouge_scorer
from transformers import AutoModelForCausalLM, AutoTokenizer

from unfed.app.evaluate import evaluation_rows, suite_of
from unfed.base.errors import DataError
from unfed.base.types import IGNORE_INDEX
from unfed.config.schema import EvalConfig
from unfed.config.schema_eval import GenerationConfig
from unfed.data.benchmarks import muse_splits
from unfed.data.spec import Template
from unfed.data.texts import encode_completions, encode_texts
from unfed.evaluation.runner import evaluate
from unfed.metrics import membership

WORDS = "the river rose over the town and the mayor said that the bridge would hold until the morning".split()
TAGS = Template(
    apply_chat_template=False, user_start_tag="Question: ", user_end_tag="\n", asst_start_tag="Answer: ",
    asst_end_tag="\n\n",
)  # fmt: skip


def text(n: int, length: int = 14) -> str:
    return " ".join(WORDS[(n * 5 + k * (n + 1)) % len(WORDS)] for k in range(length))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("muse")

    def put(name: str, split: str, rows: list) -> None:
        file = root / "muse-news" / name / f"{split}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))

    put("verbmem", "forget", [{"prompt": text(n), "gt": text(n + 3)} for n in range(3)])
    for side, start in (("forget", 0), ("retain", 7)):
        put(
            "knowmem",
            f"{side}_qa",
            [{"question": f"Who said {text(n, 3)}?", "answer": text(n, 2)} for n in range(start, start + 3)],
        )
        put("knowmem", f"{side}_qa_icl", [{"question": f"What {text(n, 2)}?", "answer": text(n, 1)} for n in range(2)])
    put("privleak", "forget", [{"text": text(n)} for n in range(5)])
    put("privleak", "holdout", [{"text": text(n, 11)} for n in range(20, 25)])
    return root


@pytest.fixture(scope="module")
def opened(small_base: Path):
    return AutoModelForCausalLM.from_pretrained(small_base).eval(), AutoTokenizer.from_pretrained(small_base)


GIVEN = EvalConfig(suite="muse", path="muse-bench/MUSE-News", generation=GenerationConfig(max_new_tokens=5))


@pytest.fixture(scope="module")
def result(opened, data):
    model, tokenizer = opened
    return evaluate(model, tokenizer, TAGS, suite_of(GIVEN, str(data)), evaluation_rows(GIVEN, str(data)))


def said(opened, prompt: str, length: int) -> str:
    model, tokenizer = opened
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def f1(truth: str, generation: str) -> float:
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True).score(truth, generation)["rougeL"].fmeasure


def test_files_and_default_metrics(result, tmp_path):
    assert (result.suite.eval_file, result.suite.summary_file) == ("MUSE_EVAL.json", "MUSE_SUMMARY.json")
    assert set(result.suite.default) <= set(result.summary())
    assert {s: i.rows for s, i in result.splits.items()} == {
        "verbmem": 3, "forget_qa": 3, "retain_qa": 3, "forget": 5, "holdout": 5
    }  # fmt: skip
    assert result.splits["verbmem"].name == "verbmem/forget"


def test_verbatim_memorisation_goes_on_from_the_beginning(opened, result):
    """No template; 128 tokens; rougeL F1."""
    want = [f1(text(n + 3), said(opened, text(n), 128).strip()) for n in range(3)]
    assert result.summary()["forget_verbmem_ROUGE"] == pytest.approx(np.mean(want))


def test_knowledge_is_asked_after_examples(opened, result):
    """The template's tags around examples and question; 32 tokens, cut where the next question would begin."""
    shots = "".join(f"Question: What {text(n, 2)}?\nAnswer: {text(n, 1)}\n\n" for n in range(2))
    want = []
    for n in range(7, 10):
        generation = said(opened, f"{shots}Question: Who said {text(n, 3)}?\nAnswer: ", 32)
        for stop in ("\n\n", "\nQuestion", "Question:"):
            generation = generation.split(stop)[0]
        want.append(f1(text(n, 2), generation.strip()))
    assert result.summary()["retain_knowmem_ROUGE"] == pytest.approx(np.mean(want))
    shown = result.scores["retain_knowmem_ROUGE"].per_example[0]["input"]
    assert shown.count("Question:") == 3 and shown.rstrip().endswith("Answer:")


def test_whole_texts_leak_by_their_rarest_tokens(opened, result):
    """Min-K at 40 % over every token but the first (no label) and the last (left out as in the reference)."""
    model, tokenizer = opened

    def attack(rows):
        values = []
        for row in rows:
            ids = tokenizer(row, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].float().log_softmax(-1)
            own = sorted(logps[torch.arange(ids.shape[1] - 1), ids[0, 1:]].tolist()[:-1])
            values.append(-np.mean(own[: max(1, int(0.4 * len(own)))]))
        return np.array(values)

    forget, holdout = attack([text(n) for n in range(5)]), attack([text(n, 11) for n in range(20, 25)])
    auc = membership.auc(forget, holdout)
    assert result.scores["mia_min_k"].value == pytest.approx(auc)
    assert result.summary()["privleak"] == pytest.approx(((1 - auc) - 0.5) / (0.5 + 1e-10) * 100)


def test_continuations_count_length_from_their_start(opened):
    _, tokenizer = opened
    pair = (text(1), text(2))
    (whole,) = encode_completions(tokenizer, [pair], insert_space=True)
    assert tokenizer.decode(whole.input_ids) == f"{pair[0]} {pair[1]}"
    assert whole.labels[: whole.prompt_len] == (IGNORE_INDEX,) * whole.prompt_len
    assert whole.labels[whole.prompt_len :] == whole.input_ids[whole.prompt_len :]
    (cut,) = encode_completions(tokenizer, [pair], 3, insert_space=True)
    assert cut.num_label_tokens == 3 and cut.truncated and cut.prompt_len == whole.prompt_len
    (alone,) = encode_completions(tokenizer, [("", "rain fell")])
    assert alone.labels[0] == IGNORE_INDEX and alone.num_label_tokens == len(alone) - 1
    with pytest.raises(DataError, match="max_length=0 leaves no token"):
        encode_completions(tokenizer, [("a", "b")], 0)


def test_long_texts_become_pieces_of_one_row(opened):
    _, tokenizer = opened
    rows = [{"id": "one", "answer": text(1, 30)}, {"id": "two", "answer": "rain fell"}]
    found = encode_texts(tokenizer, rows, 8)
    head = len(tokenizer("")["input_ids"])
    ids = tokenizer(rows[0]["answer"], add_special_tokens=False)["input_ids"]
    pieces = [e for e in found if e.example_id == "one"]
    assert len(pieces) == -(-len(ids) // (8 - head)) and {e.example_id for e in found} == {"one", "two"}
    assert [t for e in pieces for t in e.input_ids[head:]] == ids
    assert all(len(e) <= 8 and e.labels[0] == IGNORE_INDEX for e in found)


def test_a_missing_file_names_itself_and_who_needs_it(data, tmp_path):
    import shutil

    shutil.copytree(data, tmp_path / "data")
    gone = tmp_path / "data" / "muse-news" / "knowmem" / "retain_qa.json"
    gone.unlink()
    with pytest.raises(DataError) as e:
        evaluation_rows(GIVEN, str(tmp_path / "data"))
    assert str(gone) in str(e.value) and "retain_knowmem_ROUGE" in str(e.value)
    assert "eval.metrics=[forget_verbmem_ROUGE,forget_knowmem_ROUGE,privleak,extraction_strength]" in str(e.value)


def test_missing_examples_are_found_with_the_rows_and_only_where_they_are_shown(data, tmp_path):
    import shutil

    shutil.copytree(data, tmp_path / "data")
    gone = tmp_path / "data" / "muse-news" / "knowmem" / "retain_qa_icl.json"
    gone.unlink()
    with pytest.raises(DataError) as e:
        evaluation_rows(GIVEN, str(tmp_path / "data"))
    assert str(gone) in str(e.value) and "retain_knowmem_ROUGE" in str(e.value)
    without = replace(GIVEN, metrics=("forget_knowmem_ROUGE",))
    assert set(evaluation_rows(without, str(tmp_path / "data"))) == {"forget_qa"}
    assert set(suite_of(without, str(tmp_path / "data")).layouts) == {"forget_qa"}


def test_the_splits_of_the_benchmark():
    splits = muse_splits("muse-bench/MUSE-Books", 4)
    where = {name: (s.data.name, s.data.split, s.data.limit) for name, s in splits.items()}
    assert where["holdout"] == ("privleak", "holdout", 4) and where["verbmem"] == ("verbmem", "forget", 4)
    shots = splits["forget_qa"].shots
    assert shots is not None and (shots.split, shots.limit) == ("forget_qa_icl", None)


def test_a_text_without_a_beginning_cannot_be_continued(opened):
    from unfed.evaluation.collect import encode_questions
    from unfed.evaluation.scoring import Pass

    given = Pass(*opened, TAGS, layouts={"verbmem": muse_splits("x")["verbmem"].layout})
    with pytest.raises(DataError, match="verbmem: row 2 begins with no text"):
        encode_questions(given, ["rain", ""], "verbmem")
