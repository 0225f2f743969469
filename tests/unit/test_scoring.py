"""Scoring: answers to one question share its prompt, and get what they would get alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, BertConfig, BloomConfig, LlamaConfig, Qwen2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from unfed.base.types import IGNORE_INDEX
from unfed.data.chat import EncodedExample
from unfed.data.collate import collate_shared, shared_width
from unfed.data.spec import Template
from unfed.evaluation import scoring
from unfed.evaluation.gradients import gradient_norms
from unfed.evaluation.runner import evaluate
from unfed.evaluation.suites import SuiteConfig
from unfed.metrics.overlap import rouge_score
from unfed.models.generate import Budget

SIZES = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SIZES, "num_key_value_heads": 1, "intermediate_size": 24}


class Tokenizer:
    pad_token_id = 0
    eos_token_id = 2


def answer(prompt, tokens, prompt_len=None):
    n = len(prompt) if prompt_len is None else prompt_len
    ids = (*prompt, *tokens)
    return EncodedExample(ids, (*[IGNORE_INDEX] * n, *ids[n:]), n)


def answers():
    """Four questions with 6, 1, 2 and 2 answers, mixed; one cut to its prompt, one without any prompt."""
    rng = np.random.default_rng(0)

    def draw(n):
        return tuple(int(t) for t in rng.integers(3, 61, n))

    a, b, c = draw(5), draw(3), draw(7)
    found = [answer(a, draw(4)), answer(b, draw(6)), answer(a, draw(1)), answer(c, draw(2)), answer(c, ())]
    found += [answer(a, draw(9)), answer((9, *draw(3)), (), 0), answer((9, *draw(5)), (), 0)]
    begun = found[5].input_ids[len(a) :]  # two that begin as it does, one after the other
    return [*found, answer(a, (*begun[:6], *draw(2))), answer(a, begun[:5]), answer(a, (*begun[:3], *draw(4)))]


def passing(model, **given):
    return scoring.Pass(model.eval(), Tokenizer(), Template(), **given)  # pyright: ignore[reportArgumentType]


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def scored(given, *, details=False):
    with torch.no_grad():
        return scoring.score(given, answers(), [details] * len(answers()))


def test_a_shared_row_by_hand():
    batch = collate_shared([[answer((7, 8), (3, 4, 5)), answer((7, 8), (6, 2))], [answer((9,), (1,))]], 0)
    assert batch.input_ids.tolist() == [[7, 8, 3, 4, 6], [9, 0, 0, 0, 0]]
    assert batch.position_ids.tolist()[0] == [0, 1, 2, 3, 2]
    assert batch.ends.tolist() == [[5, 5, 4, 4, 5], [5, 0, 0, 0, 0]]
    assert batch.predictors.tolist() == [1, 2, 3, 1, 4, 5]
    assert batch.labels.tolist() == [3, 4, 5, 6, 2, 1]
    assert shared_width([answer((7, 8), (3, 4, 5)), answer((7, 8), (6, 2))]) == 5


def test_answers_share_their_beginnings():
    """3 4 5, 3 4 6 and 3 7 after the prompt 8: a tree with the nodes 3 and 4; last tokens predict nothing."""
    group = [answer((8,), (3, 4, 5)), answer((8,), (3, 7)), answer((8,), (3, 4, 6)), answer((8,), (9, 3, 1))]
    batch = collate_shared([group], 0)
    assert batch.input_ids.tolist() == [[8, 3, 4, 9, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 1, 2]]
    assert batch.ends.tolist() == [[5, 3, 3, 5, 5]]
    assert batch.predictors.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 3, 4]
    assert batch.labels.tolist() == [3, 4, 5, 3, 7, 3, 4, 6, 9, 3, 1]
    assert shared_width(group) == 5


def test_a_batch_of_answers_that_were_cut_away_scores_nothing():
    """Batches hold the longest questions first, and of those max_length may have left no answer."""
    given, (long, short) = passing(build(LlamaConfig(**LLAMA)), budget=Budget(batch_size=1)), ((9,) * 12, (4, 5))
    rows = [answer(long, ()), answer(long, ()), answer(short, (6, 7)), answer(short, (8,))]
    with torch.no_grad():
        found = scoring.score(given, rows, [False] * 4)
    assert found.lengths.tolist() == [0, 0, 2, 1] and np.isfinite(found.logp).all()


def test_a_batch_of_shared_rows_ends_rather_than_pads(monkeypatch):
    """Rows of 10 + 8, 10 + 7 and 10 + 1 positions; the prompt's last one predicts, an answer's last one does not."""
    groups = [[answer((n,) * 10, (5,) * size)] for n, size in ((3, 2), (4, 9), (5, 8))]
    assert list(scoring._shared_batches(Budget(), groups)) == [[1, 2, 0]]  # of 512 positions it is far
    monkeypatch.setattr(scoring, "_PADDED", 37)
    assert list(scoring._shared_batches(Budget(), groups)) == [[1, 2, 0]]  # two rows of 18 are 36
    monkeypatch.setattr(scoring, "_PADDED", 18)
    assert list(scoring._shared_batches(Budget(), groups)) == [[1, 2], [0]]  # 17 of 18 is nearly all, 11 is not
    few = scoring._shared_batches(Budget(max_tokens=36), groups)  # the longest row counts 2 * (8 + 1) = 18
    assert list(few) == [[1, 2], [0]]


@pytest.mark.parametrize("details", [True, False])
def test_the_head_runs_once_where_answers_begin_alike(details, monkeypatch):
    """After the prompt (5 6) the answers 7 8 9, 7 8 and 7 4 4: predicted at 6 7 8, at 6 7, and at 6 7 4."""
    model, ran = build(LlamaConfig(**LLAMA)).eval(), []
    model.lm_head.register_forward_hook(lambda _m, _a, out: ran.append(out.shape[1]))
    rows = [answer((5, 6), tokens) for tokens in ((7, 8, 9), (7, 8), (7, 4, 4))]
    monkeypatch.setattr(scoring, "_CHUNK_VALUES", 2 * 61)  # two rows of logits at once
    with torch.no_grad():
        found = scoring.score(passing(model), rows, [details, False, details])
        want = [model(torch.tensor([r.input_ids])).logits[0, 1:-1].log_softmax(dim=1) for r in rows]
    assert ran[2] == 4  # after the trial's two passes: 6, 7, 8 and 4
    logps = torch.cat([w[torch.arange(len(w)), list(r.input_ids[2:])] for w, r in zip(want, rows, strict=True)])
    np.testing.assert_allclose(found.logp, logps, atol=1e-5)
    if details:
        wanted = torch.cat([want[0], want[2]])
        mean = (wanted.exp() * wanted).sum(dim=1)
        var = (wanted.exp() * (wanted - mean[:, None]).square()).sum(dim=1)
        chosen = [0, 1, 2, 5, 6, 7]
        np.testing.assert_allclose(found.mean[chosen], mean, atol=1e-5)
        np.testing.assert_allclose(found.var[chosen], var, atol=1e-5)
        hits = wanted.argmax(dim=1) == torch.tensor([7, 8, 9, 7, 4, 4])
        assert (found.is_argmax[chosen] == hits.numpy()).all()
        assert np.isnan(found.mean[3:5]).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_sharing_changes_nothing_but_the_work(attention, batch_size, monkeypatch):
    base = build(Qwen2Config(**LLAMA, attn_implementation=attention))
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    given = passing(model, budget=Budget(batch_size=batch_size))
    positions = []
    base.register_forward_pre_hook(lambda _m, _a, kw: positions.append(kw["input_ids"].numel()), with_kwargs=True)
    shared = scored(given, details=True)
    used = sum(positions[2:])  # the first two: the trial, alone and shared
    monkeypatch.setattr(scoring, "_shares", lambda *_: False)
    positions.clear()
    alone = scored(given, details=True)
    assert shared.offsets.tolist() == alone.offsets.tolist()
    np.testing.assert_allclose(shared.logp, alone.logp, atol=1e-5)
    np.testing.assert_allclose(shared.mean, alone.mean, atol=1e-5)
    np.testing.assert_allclose(shared.var, alone.var, atol=1e-4)
    assert (shared.is_argmax == alone.is_argmax).all()
    if batch_size == 1:
        assert used < sum(positions)


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=2),  # positions come of the mask
        BertConfig(**SIZES, intermediate_size=24, is_decoder=True),
    ],
    ids=["bloom", "bert"],
)
def test_a_model_that_cannot_share_is_scored_one_by_one(config, monkeypatch):
    given = passing(build(config))
    first = scored(given)
    monkeypatch.setattr(scoring, "_shares", lambda *_: False)
    np.testing.assert_allclose(first.logp, scored(given).logp, atol=1e-5)


def test_a_trial_that_differs_is_believed(monkeypatch):
    model = build(LlamaConfig(**LLAMA))
    given = passing(model)
    want = scored(given).logp
    right = scoring.shared_logits
    monkeypatch.setattr(scoring, "shared_logits", lambda m, b: (right(m, b)[0].roll(1, 0), right(m, b)[1]))
    np.testing.assert_allclose(scored(given).logp, want, atol=1e-5)


def test_gradient_norms_are_those_of_one_answer_after_the_other():
    model = build(LlamaConfig(**LLAMA)).requires_grad_(False)
    rows = [answer((5, 6), (7, 8, 9)), answer((5,), (4,)), answer((3, 4), (10, 11))]
    found = gradient_norms(model.eval(), rows, 0)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert np.isnan(found[1])  # one labelled token, and the last is left out
    model.requires_grad_(True)
    logits = model(torch.tensor([[5, 6, 7, 8, 9]])).logits[0]
    torch.nn.functional.cross_entropy(logits[1:3], torch.tensor([7, 8])).backward()
    want = torch.stack([p.grad.norm() for p in model.parameters()]).mean()
    np.testing.assert_allclose(found[0], float(want), rtol=1e-5)


def test_gradients_of_an_adapter_are_those_of_its_tensors_alone():
    model = get_peft_model(build(LlamaConfig(**LLAMA)), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    rows = [answer((5, 6), (7, 8, 9))]
    found = gradient_norms(model.eval(), rows, 0)
    logits = model(torch.tensor([[5, 6, 7, 8, 9]])).logits[0]
    torch.nn.functional.cross_entropy(logits[1:3], torch.tensor([7, 8])).backward()
    norms = [p.grad.norm() for n, p in model.named_parameters() if "lora_" in n]
    np.testing.assert_allclose(found[0], float(torch.stack(norms).mean()), rtol=1e-5)


def test_the_base_beneath_an_adapter_is_the_reference(small_base):
    tokenizer = AutoTokenizer.from_pretrained(small_base)
    base = build(LlamaConfig(**{**LLAMA, "vocab_size": len(tokenizer)}))
    rows = {s: [{"id": s, "question": "Who?", "answer": text}] for s, text in (("forget", "Ann."), ("holdout", "Bo."))}
    suite = SuiteConfig(metrics=("mia_loss", "mia_reference"))
    alone = evaluate(base, tokenizer, Template(), suite, rows)
    assert "reference_model_path" in (alone.scores["mia_reference"].why or "")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    both = evaluate(model, tokenizer, Template(), suite, rows)

    def value(result, metric):
        return result.scores[metric].extra["forget"]["agg_value"]

    difference = value(both, "mia_loss") - value(alone, "mia_loss")
    assert value(both, "mia_reference") == pytest.approx(difference, abs=1e-5)
    assert abs(difference) > 1e-4


def test_rouge_against_paraphrases_and_lists():
    got = rouge_score([["a b", "c"], ["a", "a"]], ["a b", "a"], ["q", "q"])
    assert got.value == pytest.approx(((1 + 0) / 2 + 1) / 2)
    assert got.per_example[0]["rougeL_recall"] == [1, 0]
