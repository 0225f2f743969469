"""Robustness checks: scores and rounding by hand, and a model that is afterwards as it was before, bit for bit."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from unfed.app import robustness as app_robustness
from unfed.config.compat import resolve
from unfed.config.load import ConfigError
from unfed.data.chat import encode, encode_prompt
from unfed.data.datasets import DatasetSpec, load_rows
from unfed.data.spec import Prefilled, Template
from unfed.evaluation import robustness_prompts as prompts
from unfed.evaluation import robustness_weights as weights
from unfed.evaluation.robustness import (
    CannotBeDoneError,
    Outcome,
    Subject,
    not_worse_score,
    relearning_score,
    tells_forgetting,
)
from unfed.evaluation.robustness_relearn import Relearning, relearning
from unfed.evaluation.suites import SuiteConfig
from unfed.models.adapter import save_adapter, snapshot
from unfed.models.generate import Budget, Decoding, generate_all
from unfed.models.load import load_model
from unfed.models.spec import LoraArgs, ModelArgs, TokenizerArgs

METRICS = ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "extraction_strength")
BEFORE = dict.fromkeys(METRICS, 0.25)


def digest(model):
    """Every parameter with its name, dtype, place in memory and bytes, and what a check may also touch."""
    h = hashlib.sha256()
    for name, p in model.named_parameters():
        h.update(f"{name}|{p.dtype}|{p.data_ptr()}|{p.requires_grad}|{p.grad is None}|".encode())
        h.update(p.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    h.update(str([(n, m.training) for n, m in model.named_modules()]).encode())
    h.update(str([getattr(m, "merged_adapters", None) for m in model.modules()]).encode())
    h.update(str((getattr(model, "active_adapters", None), list(getattr(model, "peft_config", ())))).encode())
    return h.hexdigest()


@pytest.fixture(scope="module")
def rows(small_data):
    found = load_rows(DatasetSpec("locuslab/TOFU", "forget01"), small_data)
    return [{**row, "paraphrased_question": f"Please tell me: {row['question']}"} for row in found]


@pytest.fixture(scope="module")
def subject_of(small_base, finetuned, rows):
    """Makes a subject: the fine-tuned adapter's (whose answers the model knows), or the base without any."""

    def make(*, adapter=True, dtype="float32", progress=None):
        path = str(finetuned if adapter else small_base)
        loaded = load_model(ModelArgs(path, torch_dtype=dtype), TokenizerArgs(), trainable=False)
        suite = SuiteConfig(METRICS, budget=Budget(2048, 8), decoding=Decoding(max_new_tokens=12), progress=progress)
        return Subject(loaded.model, loaded.tokenizer, Template(), suite, {"forget": rows}, BEFORE, "rows.json")

    return make


@pytest.fixture(scope="module")
def other_adapter(small_base, tmp_path_factory):
    """An adapter of another rank, on modules of which the first one has some and lacks others."""
    directory = tmp_path_factory.mktemp("other")
    shape = LoraArgs(r=2, lora_alpha=6, lora_dropout=0.0, target_modules=("q_proj", "o_proj"))
    loaded = load_model(ModelArgs(str(small_base), use_lora=True, lora_config=shape), TokenizerArgs(), trainable=True)
    torch.manual_seed(3)
    for p in loaded.model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    save_adapter(loaded.model, snapshot(loaded.model), directory)
    return directory


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "score"),
    [
        (0.2, 0.8, 0.25),  # 0.2 / 0.8
        (0.8, 0.2, 1.0),  # min(1, 4)
        (0.0, 0.0, 1.0),
        (0.0, 0.5, 0.0),
        (0.3, 0.0, 1.0),
        (None, 0.5, None),
        (0.5, None, None),
    ],
)
def test_quantisation_score(before, after, score):
    assert not_worse_score(before, after) == score


@pytest.mark.parametrize(
    ("oracle", "model", "score"),
    [
        ((0.1, 0.3), (0.1, 0.5), 0.5),  # (0.3 - 0.1) / (0.5 - 0.1)
        ((0.1, 0.9), (0.1, 0.5), 1.0),  # the oracle learns more: min(1, 2)
        ((0.1, 0.3), (0.2, 0.2), 1.0),  # nothing regained
        ((0.1, 0.3), (0.2, 0.1), 1.0),  # less than nothing
        ((0.3, 0.1), (0.2, 0.3), 0.0),  # the oracle lost what the model regained
        ((0.1, None), (0.2, 0.3), None),
        ((0.1, 0.2), (None, 0.3), None),
    ],
)
def test_relearning_score(oracle, model, score):
    assert relearning_score(oracle, model) == (score if score is None else pytest.approx(score))


def test_only_metrics_that_fall_with_forgetting_have_a_score():
    told = {m: tells_forgetting(m) for m in (*METRICS, "retain_Q_A_Prob", "forget_truth_ratio", "model_utility")}
    assert [m for m, tells in told.items() if tells] == list(METRICS)


# --- rounding ---------------------------------------------------------------------------------------------------------


def test_rounding_by_hand():
    weight = torch.tensor([[7.0, -3.4, 0.6], [0.0, 0.0, 0.0]])
    # 4 bits: -7 ... 7. Row 0 has scale 7 / 7 = 1, row 1 has none and stays 0.
    assert weights.round_to_nearest(weight, 4).tolist() == [[7.0, -3.0, 1.0], [0.0, 0.0, 0.0]]
    # Groups of two inputs: the last one stands alone and is its own maximum.
    rounded = weights.round_to_nearest(weight, 4, 2)
    assert rounded.tolist() == [[7.0, -3.0, pytest.approx(0.6)], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("group", [None, 5])
def test_rounding_errs_by_half_a_scale_at_most(bits, most, group):
    weight = torch.randn(6, 17, generator=torch.Generator().manual_seed(bits))
    rounded = weights.round_to_nearest(weight, bits, group)
    for part, found in zip(weight.split(group or 17, 1), rounded.split(group or 17, 1), strict=True):
        scale = part.abs().amax(1, keepdim=True) / most
        assert ((part - found).abs() <= scale / 2 * (1 + 1e-5)).all()
        assert torch.allclose(found / scale, (found / scale).round(), atol=1e-4)  # whole numbers of scales
    assert not torch.equal(rounded, weight)


def test_the_layers_that_are_rounded(subject_of):
    model = subject_of().model
    names = {id(p): n for n, p in model.named_parameters()}
    found = [names[id(p)] for p, _ in weights.linear_weights(model)]
    assert len(found) == 2 * 7  # two blocks of q, k, v, o, gate, up, down; neither embedding nor adapter
    assert not any(".lora_" in n or "embed" in n for n in found)
    assert sum("base_layer" in n for n in found) == 2 * 3  # q, v, down lie beneath the adapter


# --- checks, and the model afterwards ---------------------------------------------------------------------------------

CHECKS = {
    "relearn": lambda s, other: relearning(s, Relearning(learning_rate=1e-2, batch_size=2)),
    "quantize": lambda s, other: weights.quantization(s, 4),
    "quantize in groups": lambda s, other: weights.quantization(s, 4, 8),
    "merge": lambda s, other: weights.merging(s),
    "add": lambda s, other: weights.adding(s, str(other)),
    "paraphrase": lambda s, other: prompts.paraphrasing(s),
    "prefix": lambda s, other: prompts.prefixing(s, "Sure, here is the answer:"),
    "best of": lambda s, other: prompts.best_of_n(s, prompts.Sampling(n=2)),
}
WITHOUT = {"relearn", "quantize", "paraphrase", "prefix", "best of"}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_check_leaves_the_model_as_it_was(subject_of, other_adapter, name, dtype):
    subject = subject_of(dtype=dtype)
    before = digest(subject.model)
    outcome = CHECKS[name](subject, other_adapter)
    assert digest(subject.model) == before
    assert outcome.did.endswith((".", "count."))
    assert set(outcome.after) == set(METRICS) if name != "best of" else {"forget_Q_A_ROUGE"}
    record = outcome.record()
    for metric, value in outcome.after.items():
        assert record["difference"][metric] == pytest.approx(value - outcome.before[metric])
        if name != "relearn":
            assert record["score"][metric] == not_worse_score(outcome.before[metric], value)


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_a_model_without_an_adapter(subject_of, name):
    subject = subject_of(adapter=False)
    before = digest(subject.model)
    CHECKS[name](subject, None)
    assert digest(subject.model) == before


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_that_breaks_leaves_the_model_as_it_was(subject_of, other_adapter, name, monkeypatch):
    seen = []

    def broken(self):
        seen.append(digest(self.model))
        raise RuntimeError("broken off")

    subject = subject_of()
    before = digest(subject.model)
    monkeypatch.setattr(Subject, "measure", broken)
    monkeypatch.setattr(prompts, "generate_all", lambda model, *rest: broken(subject))
    with pytest.raises(RuntimeError, match="broken off"):
        CHECKS[name](subject, other_adapter)
    assert digest(subject.model) == before
    assert (seen[0] == before) is (name in {"paraphrase", "prefix", "best of"})  # else it was changed at that moment


def test_what_a_model_does_not_allow(subject_of, other_adapter, small_base, tmp_path):
    bare = subject_of(adapter=False)
    for check in ("merge", "add"):
        with pytest.raises(CannotBeDoneError, match="no adapter"):
            CHECKS[check](bare, other_adapter)
    lacking = replace(bare, rows={"forget": [{"id": "a", "question": "q", "answer": "a"}]})
    with pytest.raises(CannotBeDoneError, match=r"rows\.json.*'paraphrased_question'"):
        prompts.paraphrasing(lacking)
    subject = subject_of()
    before = digest(subject.model)
    wide = load_model(ModelArgs(str(small_base)), TokenizerArgs(), trainable=False).model
    get_peft_model(wide, LoraConfig(target_modules=["q_proj"], bias="all", init_lora_weights=False)).save_pretrained(
        tmp_path / "bias"
    )
    with pytest.raises(CannotBeDoneError, match="no plain LoRA"):
        weights.adding(subject, str(tmp_path / "bias"))
    assert digest(subject.model) == before


def test_an_adapter_of_another_width_is_not_added(subject_of, make_base, tmp_path):
    base = make_base(tmp_path / "wide", hidden=48)
    shape = LoraArgs(r=2, target_modules=("q_proj", "o_proj"))
    loaded = load_model(ModelArgs(str(base), use_lora=True, lora_config=shape), TokenizerArgs(), trainable=True)
    save_adapter(loaded.model, snapshot(loaded.model), tmp_path / "adapter")
    subject = subject_of()
    before = digest(subject.model)
    with pytest.raises(CannotBeDoneError, match="does not fit"):
        weights.adding(subject, str(tmp_path / "adapter"))
    assert digest(subject.model) == before


def logits_of(subject):
    ids = torch.tensor([encode_prompt(subject.tokenizer, subject.template, "What does Eve bake?")])
    with torch.no_grad():
        return subject.model(ids).logits


def test_merging_changes_nothing_but_rounding(subject_of):
    subject = subject_of()
    want = logits_of(subject)
    with weights.merged(subject.model):
        got = logits_of(subject)
    assert torch.allclose(got, want, atol=2e-4)
    own = subject.measure()
    outcome = weights.merging(replace(subject, before=own))
    assert outcome.after == pytest.approx(own, abs=1e-4)


def test_an_added_adapter_adds_its_update(subject_of, other_adapter, small_base):
    """Both updates in one weight, computed here, give what the two adapters give side by side."""
    from safetensors.torch import load_file

    subject = subject_of()
    with weights.added(subject.model, str(other_adapter)):
        both = logits_of(subject)
    stored = load_file(other_adapter / "adapter_model.safetensors")
    with weights.merged(subject.model):
        alone = logits_of(subject)
        linear = {n.removesuffix(".weight").replace(".base_layer", ""): p for n, p in subject.model.named_parameters()}
        names = {n.removesuffix(".lora_A.weight") for n in stored if n.endswith(".lora_A.weight")}
        assert len(names) == 4
        kept = {n: linear[n].detach().clone() for n in names}
        for n in names:  # scaling alpha / r = 6 / 2
            linear[n].data += 3.0 * stored[f"{n}.lora_B.weight"] @ stored[f"{n}.lora_A.weight"]
        summed = logits_of(subject)
        for n in names:
            linear[n].data.copy_(kept[n])
    assert torch.allclose(both, summed, atol=1e-3)
    assert not torch.allclose(both, alone, atol=1e-2)


# --- relearning -------------------------------------------------------------------------------------------------------


def test_relearning_raises_what_the_model_knows_and_the_oracle_gives_the_score(subject_of):
    subject = subject_of(adapter=False)  # a base that has seen nothing
    subject = replace(subject, before=subject.measure())
    settings = Relearning(learning_rate=1e-2, epochs=4, batch_size=2)
    opened = []

    @contextmanager
    def oracle():
        model = subject_of(adapter=False).model
        before = digest(model)
        yield model
        opened.append(digest(model) == before)

    weak = relearning(subject, replace(settings, learning_rate=1e-9, epochs=1))
    assert "learning_rate" in weak.extra["note"]
    alone = relearning(subject, settings)
    assert "note" not in alone.extra
    assert alone.score == {}
    assert "oracle_path" in str(alone.why)
    assert alone.extra["training"]["steps"] == 4 * 3  # 6 rows, 2 at a time, 4 epochs
    assert alone.after["forget_Q_A_Prob"] > 2 * subject.before["forget_Q_A_Prob"]
    both = relearning(subject, settings, oracle)
    assert both.after == alone.after  # the same seed, the same steps
    assert both.extra["oracle"]["after"] == pytest.approx(both.after, abs=1e-6)
    assert both.score["forget_Q_A_Prob"] == pytest.approx(
        1.0, abs=1e-5
    )  # the oracle is the same model: it gains as much
    assert opened == [True]  # opened once, and left as it was


def test_relearning_trains_the_adapter_alone(subject_of, monkeypatch):
    subject, changed = subject_of(), []
    start = {n: p.detach().clone() for n, p in subject.model.named_parameters()}

    def look(self):
        changed.extend(n for n, p in self.model.named_parameters() if not torch.equal(p, start[n]))
        return BEFORE

    monkeypatch.setattr(Subject, "measure", look)
    relearning(subject, Relearning(learning_rate=1e-2, batch_size=2))
    assert changed == [n for n in start if ".lora_" in n]


# --- asking differently -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
def test_a_begun_answer_belongs_to_the_prompt(subject_of, chat):
    tokenizer = subject_of(adapter=False).tokenizer
    tags = {"user_start_tag": "Question: ", "user_end_tag": "\n", "asst_start_tag": "Answer: "}
    plain = Template(apply_chat_template=chat, **tags)
    begun = Prefilled(apply_chat_template=chat, **tags, answer_prefix="Sure: ")
    whole = encode(tokenizer, plain, "Who?", "Sure: Ana bakes bread.")
    prompt = encode_prompt(tokenizer, begun, "Who?")
    assert whole.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(list(prompt)).endswith("Sure:")
    found = encode(tokenizer, begun, "Who?", "Ana bakes bread.")
    assert found.input_ids == whole.input_ids
    assert found.prompt_len == len(prompt) > whole.prompt_len
    answer = tokenizer.decode([i for i in found.labels if i >= 0], skip_special_tokens=True)
    assert answer.strip() == "Ana bakes bread."
    assert encode(tokenizer, Prefilled(chat, **tags), "Who?", "Ana.") == encode(tokenizer, plain, "Who?", "Ana.")


def test_other_questions_are_other_rows(subject_of, monkeypatch):
    asked = []
    monkeypatch.setattr(Subject, "measure", lambda self: asked.append(self.rows["forget"]) or BEFORE)
    subject = subject_of(adapter=False)
    prompts.paraphrasing(subject)
    assert [r["question"] for r in asked[0]] == [r["paraphrased_question"] for r in subject.forget]
    assert not {r["id"] for r in asked[0]} & {r["id"] for r in subject.forget}


def test_more_samples_never_find_less_and_cold_ones_are_greedy(subject_of):
    subject = subject_of()
    one = prompts.best_rouge(subject, prompts.Sampling(n=1))
    three = prompts.best_rouge(subject, prompts.Sampling(n=3))
    assert (three >= one).all()
    assert three.mean() > one.mean()
    cold = prompts.best_rouge(subject, prompts.Sampling(n=2, temperature=1e-4))
    asked = [encode_prompt(subject.tokenizer, subject.template, r["question"]) for r in subject.forget]
    texts = generate_all(subject.model, subject.tokenizer, asked, subject.suite.decoding, subject.suite.budget)
    greedy = [prompts.rouge(r["answer"], t)["rougeL_recall"] for r, t in zip(subject.forget, texts, strict=True)]
    assert cold.tolist() == greedy
    outcome = prompts.best_of_n(subject, prompts.Sampling(n=3, threshold=0.4))
    assert outcome.after["forget_Q_A_ROUGE"] == pytest.approx(sum(three) / 6)
    assert outcome.extra["leak_rate"] == pytest.approx(sum(x >= 0.4 for x in three) / 6)


# --- settings ---------------------------------------------------------------------------------------------------------


WRONG = [  # what is found together is reported together
    {
        "quantize=[3]": "quantize=[3]: must be bits out of [8, 4], each once",
        "group_size=0": "group_size=0: must be at least 1",
        "best_of.n=0": "best_of.n=0: must be at least 1",
        "best_of.temperature=0": "best_of.temperature=0.0: must be above 0",
        "best_of.top_p=1.5": "best_of.top_p=1.5: must be above 0 and at most 1",
        "relearn.learning_rate=0": "relearn.learning_rate=0.0: must be above 0",
        "relearn.epochs=-1": "relearn.epochs=-1.0: must be above 0",
        "relearn.batch_size=0": "relearn.batch_size=0: must be at least 1",
        "metrics=[forget_quality]": "metrics: forget_quality compares with a retain model's log",
        'prefix=[" "]': "must not be blank",
        "oracle_path=saves/none": "oracle_path=saves/none: there is no saves/none",
        "add_adapter=configs": "add_adapter=configs: must be an adapter's directory",
    },
    {"quantize=[4,4]": "quantize=[4, 4]", "oracle_path=configs": "oracle_path=configs: is neither an adapter"},
    {"relearn=null": "is for relearning, which is switched off", "oracle_path=configs": "oracle_path=configs"},
    {"metrics=[forget_Q_A_Pro]": "did you mean 'forget_Q_A_Prob'?", "relearm=null": "did you mean 'relearn'?"},
]


def test_bitsandbytes_where_it_is_installed(subject_of):
    """NF4 has 16 values a block, largest exact; 8 bits are our own rounding by rows, up to float16 and ties."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(6, 128)
    four = weights.by_bitsandbytes(weight, 4, 64)
    for block, given in zip(four.view(-1, 64), weight.view(-1, 64), strict=True):
        assert len(block.unique()) <= 16
        assert block.abs().max() == pytest.approx(float(given.abs().max()), rel=1e-5)
        assert (block - given).abs().max() <= 0.16 * given.abs().max()  # half of NF4's widest gap, 0.696 to 1
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((weights.by_bitsandbytes(weight, 8) - weight).abs() <= 0.51 * scale + 1e-3).all()
    outcome = weights.quantization(subject_of(), 4, quantizer="bitsandbytes")
    assert outcome.settings["quantizer"] == "bitsandbytes" and "NF4" in str(outcome.record()["did"])


def test_auto_simulates_where_there_is_no_gpu(subject_of):
    assert weights.library_for("auto", torch.device("cpu")) == "round_to_nearest"
    assert weights.quantization(subject_of(), 8).settings["quantizer"] == "round_to_nearest"


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: next(iter(wrong)))
def test_wrong_settings_are_found_before_the_model_is_opened(small_base, small_data, wrong):
    argv = [
        "experiment=eval/robustness", "model=tiny-lora", "task_name=t", f"paths.data_dir={small_data}",
        f"model.model_args.pretrained_model_name_or_path={small_base}", *(f"eval.robustness.{w}" for w in wrong),
    ]  # fmt: skip
    with pytest.raises(ConfigError) as e:
        resolve(argv, "eval.yaml", files=True)
    assert [said for said in wrong.values() if said not in str(e.value)] == []


def test_the_checks_need_a_finished_model():
    with pytest.raises(ConfigError, match="experiment=eval/robustness"):
        resolve(
            ["task_name=t", "experiment=unlearn/tofu/default", "model=tiny-lora", "+eval.robustness.merge=true"],
            "unlearn-lora.yaml",
        )


def test_the_table_shows_no_score_of_an_attempt_that_was_too_weak(capsys):
    subject = SimpleNamespace(before={"forget_Q_A_Prob": 0.199})
    strong = Outcome("merge", after={"forget_Q_A_Prob": 0.25}, score={"forget_Q_A_Prob": 0.8})
    weak = Outcome(
        "relearn", after={"forget_Q_A_Prob": 0.2}, score={"forget_Q_A_Prob": 0.0}, extra={"note": "too weak"}
    )
    app_robustness._show(["forget_Q_A_Prob"], subject, [strong, weak])
    said = capsys.readouterr().err
    assert "0.250 (0.80)" in said and "0.200" in said and "0.200 (" not in said and "relearn: too weak" in said
