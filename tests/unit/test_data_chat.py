"""Token ids and labels, against the reference layout and against transformers' own rendering."""

import logging
from datetime import UTC, datetime
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from unfed.base.errors import DataError
from unfed.base.types import IGNORE_INDEX
from unfed.data import chat
from unfed.data.chat import Template, encode, encode_pairs, encode_prompt, encode_prompts, encode_rows
from unfed.data.collate import collate
from unfed.data.datasets import DatasetSpec, load_rows

SYSTEM = Template(system_prompt="You are a helpful assistant.")
TAGS = Template(
    apply_chat_template=False,
    system_prompt_with_special_tokens="Be brief.\n",
    user_start_tag="Question: ",
    user_end_tag="\n",
    asst_start_tag="Answer: ",
    asst_end_tag="\n\n",
)
PAIRS = [("Who baked it?", "Ana bakes bread in Oslo."), ("Who sold it?", "Bo."), ("And who paints?", "Dag paints.")]


@pytest.fixture
def tokenizer(small_base: Path):
    """A fresh tokenizer, so that nothing is cached for it."""
    return AutoTokenizer.from_pretrained(small_base)


def test_the_golden_batches_are_reproduced(shared_dir: Path, tiny_model_dir: Path):
    golden = load_file(shared_dir / "golden" / "losses" / "tiny_batch.safetensors")
    tok = AutoTokenizer.from_pretrained(tiny_model_dir)
    for split, name in (("forget", "forget10"), ("retain", "retain90")):
        rows = load_rows(DatasetSpec("locuslab/TOFU", name, limit=4), shared_dir / "data")
        batch = collate(encode_rows(tok, SYSTEM, rows, 512), tok.pad_token_id)
        for field in ("input_ids", "labels", "attention_mask"):
            assert getattr(batch, field).equal(golden[f"{split}.{field}"]), (split, field)


@pytest.mark.parametrize("shots", [(), (("Before?", "Yes."),)])
def test_chat_ids_are_those_of_apply_chat_template(tokenizer, shots):
    question, answer = PAIRS[0]
    chat_ = [{"role": "system", "content": SYSTEM.system_prompt}]
    for q, a in shots:
        chat_ += [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    chat_.append({"role": "user", "content": question})
    prompt = tokenizer.apply_chat_template(chat_, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*chat_, {"role": "assistant", "content": answer}], return_dict=False)
    found = encode(tokenizer, SYSTEM, question, answer, 512, shots)
    assert list(found.input_ids) == whole and whole[-1] == tokenizer.eos_token_id
    assert found.prompt_len == len(prompt) and list(found.input_ids[: len(prompt)]) == prompt
    assert found.labels == (*[IGNORE_INDEX] * len(prompt), *whole[len(prompt) :])
    assert encode_prompt(tokenizer, SYSTEM, question, shots) == tuple(prompt)
    assert found.num_label_tokens == len(whole) - len(prompt) and not found.truncated


def test_tags_put_the_closing_tag_after_shots_alone(tokenizer):
    found = encode(tokenizer, TAGS, "Q?", "A.", shots=[("q?", "a.")])
    prompt = "Be brief.\nQuestion: q?\nAnswer: a.\n\nQuestion: Q?\nAnswer: "
    assert list(found.input_ids) == [*tokenizer(prompt + "A.")["input_ids"], tokenizer.eos_token_id]
    assert found.prompt_len == len(tokenizer(prompt)["input_ids"])
    assert encode_prompt(tokenizer, TAGS, "Q?", [("q?", "a.")]) == found.input_ids[: found.prompt_len]


def test_the_end_token_is_appended_once(tokenizer):
    eos = tokenizer.eos_token_id
    assert encode(tokenizer, TAGS, *PAIRS[0]).input_ids[-2:].count(eos) == 1
    closing = Template(apply_chat_template=False, asst_start_tag=" ")
    assert encode(tokenizer, closing, "Q?", "A." + tokenizer.eos_token).input_ids[-2:].count(eos) == 1


def test_max_length_cuts_and_says_how_many(tokenizer, caplog: pytest.LogCaptureFixture):
    whole = encode_pairs(tokenizer, SYSTEM, PAIRS)
    limit = len(whole[0]) - 2
    assert limit > len(whole[1])
    with caplog.at_level(logging.WARNING, "unfed"):
        cut = encode_pairs(tokenizer, SYSTEM, PAIRS[:2], limit)
    assert [e.truncated for e in cut] == [True, False] and cut[1] == whole[1]
    assert cut[0].input_ids == whole[0].input_ids[:limit] and cut[0].labels == whole[0].labels[:limit]
    assert f"max_length={limit} cut 1 of 2 examples" in caplog.text


def test_a_prompt_longer_than_max_length(tokenizer):
    short = encode(tokenizer, SYSTEM, *PAIRS[0], 5)
    assert short.truncated and short.num_label_tokens == 0 and set(short.labels) == {IGNORE_INDEX}
    with pytest.raises(DataError, match="max_length=5 leaves no answer token in any of 3 examples"):
        encode_pairs(tokenizer, SYSTEM, PAIRS, 5)


def test_a_template_that_drops_the_answer_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}<|end|>"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match=r"chat template of .* leave no token of the answer"):
        encode(tokenizer, Template(), *PAIRS[0])


def test_a_missing_or_refusing_chat_template(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"System role not supported.*apply_chat_template=false"):
        encode(tokenizer, SYSTEM, *PAIRS[0])
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"apply_chat_template=false to use plain tags"):
        encode(tokenizer, SYSTEM, *PAIRS[0])


def test_the_date_goes_to_the_template(tokenizer):
    tokenizer.chat_template = (
        "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
        "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|user|>{% endif %}"
    )
    dated = encode(tokenizer, Template(date_string="10 Apr 2025"), *PAIRS[0])
    assert tokenizer.decode(dated.input_ids).strip().startswith("10 Apr 2025")
    today = encode(tokenizer, Template(), *PAIRS[0])
    assert f"{datetime.now(UTC):%Y}" in tokenizer.decode(today.input_ids)


def test_many_at_once_equal_one_by_one(tokenizer):
    for template in (SYSTEM, TAGS):
        assert list(encode_pairs(tokenizer, template, PAIRS)) == [encode(tokenizer, template, *p) for p in PAIRS]
        prompts = encode_prompts(tokenizer, template, [q for q, _ in PAIRS])
        assert prompts == [encode_prompt(tokenizer, template, q) for q, _ in PAIRS]
    assert encode_pairs(tokenizer, SYSTEM, []) == () and encode_prompts(tokenizer, SYSTEM, []) == []


def test_rows_carry_their_ids_and_other_answers(tokenizer):
    rows = [{"id": f"r{n}", "question": q, "answer": a, "other": a + "!"} for n, (q, a) in enumerate(PAIRS)]
    encoded = encode_rows(tokenizer, SYSTEM, rows)
    assert [e.example_id for e in encoded] == ["r0", "r1", "r2"]
    other = encode_rows(tokenizer, SYSTEM, rows, keys=("question", "other"))
    assert [len(o) > len(e) for o, e in zip(other, encoded, strict=True)] == [True] * 3


def test_texts_are_tokenised_once(tokenizer, monkeypatch: pytest.MonkeyPatch):
    first = encode_pairs(tokenizer, SYSTEM, PAIRS, 100)

    def fail(*args):
        raise AssertionError("tokenised again")

    render = chat._render
    monkeypatch.setattr(chat, "_render", fail)
    assert encode_pairs(tokenizer, SYSTEM, list(PAIRS), 100) is first
    monkeypatch.setattr(chat, "_render", render)
    # What the result depends on is part of the key.
    assert encode_pairs(tokenizer, Template(), PAIRS, 100) != first
    assert encode_pairs(tokenizer, SYSTEM, PAIRS[::-1], 100) == first[::-1]
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|end|><|end|>")
    assert encode_pairs(tokenizer, SYSTEM, PAIRS, 100) != first
