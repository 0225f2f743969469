"""What an objective sees: cached reference log-probabilities, KL against an earlier adapter, the proximal distance."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from unfed.base.errors import UnfedError
from unfed.base.types import AdapterState, Broadcast
from unfed.models.adapter import restore, snapshot, trainable_parameters
from unfed.training.batches import totals_of
from unfed.training.context import Anchor, Companions, ModelContext, Reference


def noise(state: AdapterState, seed: int) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    return AdapterState({n: t + 0.05 * torch.randn(t.shape, generator=g).to(t.dtype) for n, t in state.items()})


def context(local, batches, beside=None, driver="forget") -> ModelContext:
    return ModelContext(local.model, batches, totals_of([batches]), driver, beside or Companions())


def direct_logps(model, batch) -> torch.Tensor:
    """Summed log-probabilities of the answers from full logits, by the textbook."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
    labels = batch.labels[:, 1:]
    picked = logits.log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (picked * (labels != -100)).sum(1)


@pytest.fixture(params=[True, False], ids=["lora", "full"])
def local(request, small_local):
    return small_local(lora=request.param, dropout=0.3 if request.param else 0.0)


def test_cached_reference_logps_are_those_of_the_earlier_weights(local, small_examples):
    old = noise(snapshot(local.model), 1)
    restore(local.model, old)
    local.model.eval()
    batches = [local.collation.batch(small_examples[i : i + 3]) for i in range(0, 9, 3)]
    with torch.no_grad():
        expected = {i: v for b in batches for i, v in zip(b.example_ids, direct_logps(local.model, b), strict=True)}
    restore(local.model, noise(old, 2))
    local.model.train()
    reference = Reference(local.model, old)
    reference.prepare("forget", batches)
    other = local.collation.batch([small_examples[i] for i in (7, 0, 4)])  # other company, other padding
    got = reference.logps("forget", other)
    torch.testing.assert_close(got, torch.stack([expected[i] for i in other.example_ids]), rtol=1e-5, atol=1e-4)
    assert not got.requires_grad and local.model.training


def test_reference_logps_are_computed_once(local, small_examples, monkeypatch):
    reference = Reference(local.model, snapshot(local.model))
    batches = [local.collation.batch(small_examples[:4]), local.collation.batch(small_examples[4:6])]
    reference.prepare("forget", batches)
    monkeypatch.setattr("unfed.training.context.answer_logps", None)  # a second pass would fail
    reference.prepare("forget", batches)
    with pytest.raises(TypeError):
        reference.prepare("alternate", batches)


@pytest.mark.parametrize("positions", ["answer", "all"])
def test_kl_is_that_of_a_deep_copy(local, small_examples, positions):
    old = noise(snapshot(local.model), 1)
    restore(local.model, old)
    copied = copy.deepcopy(local.model).eval()
    restore(local.model, noise(old, 2))
    local.model.eval()
    reference = Reference(local.model, old)
    batch = local.collation.batch(small_examples[:5])
    ctx = context(local, {"retain": batch, "forget": batch}, Companions(reference))
    ctx.logps("forget")  # a graph made before the swap
    got = ctx.kl("retain", positions)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        theirs = copied(**given).logits.log_softmax(-1)
    mine = local.model(**given).logits.log_softmax(-1)
    each = F.kl_div(mine, theirs, reduction="none", log_target=True).sum(-1)
    counted = (
        (batch.labels[:, 1:] != -100) if positions == "answer" else torch.ones_like(batch.input_ids, dtype=torch.bool)
    )
    each = each[:, :-1] if positions == "answer" else each
    expected = each[counted].mean()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    parameters = list(trainable_parameters(local.model).values())
    ours, plain = (torch.autograd.grad(x, parameters, retain_graph=True) for x in (got, expected))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_kl_from_oneself_is_zero_with_a_zero_gradient(small_local, small_examples):
    local = small_local()
    ctx = context(
        local,
        {"retain": local.collation.batch(small_examples[:4])},
        Companions(Reference(local.model, snapshot(local.model))),
        "retain",
    )
    loss = ctx.kl("retain")
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert all(float(p.grad.abs().max()) < 1e-6 for p in trainable_parameters(local.model).values())


def test_each_forward_pass_is_made_once(small_local, small_examples, monkeypatch):
    from unfed.training import context as module

    local, calls = small_local(), []
    original = module.labelled_logits
    monkeypatch.setattr(module, "labelled_logits", lambda *a: (calls.append(1), original(*a))[1])
    ctx = context(local, {"forget": local.collation.batch(small_examples[:4])})
    ctx.logps("forget")
    ctx.nll("forget")
    ctx.token_logps("forget")
    ctx.row("forget")
    assert len(calls) == 1


def test_logps_and_nll_against_full_logits(local, small_examples):
    local.model.eval()
    batch = local.collation.batch(small_examples[:5])
    ctx = context(local, {"forget": batch})
    torch.testing.assert_close(ctx.logps("forget"), direct_logps(local.model, batch), rtol=1e-5, atol=1e-4)
    loss = local.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    torch.testing.assert_close(ctx.nll("forget"), loss, rtol=1e-5, atol=1e-5)


def test_the_distance_from_the_anchor(local):
    start = snapshot(local.model)
    anchor = Anchor(local.model, start)
    assert anchor.distance_sq().item() == 0.0
    moved = noise(start, 4)
    restore(local.model, moved)
    expected = sum(float((moved[n] - start[n]).double().square().sum()) for n in start)
    distance = anchor.distance_sq()
    assert distance.item() == pytest.approx(expected, rel=1e-5)
    distance.backward()
    name, parameter = next(iter(trainable_parameters(local.model).items()))
    own = name.replace(".default", "")
    torch.testing.assert_close(parameter.grad, 2 * (moved[own] - start[own]), rtol=1e-4, atol=1e-6)


def test_what_is_missing_is_said(small_local, small_examples):
    ctx = context(small_local(), {"forget": small_local().collation.batch(small_examples[:2])})
    with pytest.raises(UnfedError, match="reference policy"):
        ctx.reference_logps("forget")
    with pytest.raises(UnfedError, match="proximal"):
        ctx.adapter_distance_sq()


def test_reference_logps_have_the_precision_of_the_policys(small_local, small_examples):
    """Under bfloat16 autocast both are computed in it: at the first step they are the same numbers."""
    from unfed.federated.client import Client, ClientData
    from unfed.federated.schedule import FitTask, Phase, Work
    from unfed.objectives.npo import NPO

    gaps = []

    class Watch(NPO):
        def __call__(self, ctx):
            gaps.append(float((ctx.logps("forget").detach() - ctx.reference_logps("forget")).abs().max()))
            return super().__call__(ctx)

    local = small_local(bf16=True, max_steps=1, per_device_train_batch_size=8)
    start = noise(snapshot(local.model), 1)
    client = Client(local, {"c": ClientData("c", {"forget": small_examples[:8], "retain": small_examples[8:]})}, start)
    client.fit(FitTask(Phase("p", 1, {"c": Work("forget", Watch(), 1.0)}), 0, 0), Broadcast(start), "c")
    restore(local.model, start)
    local.model.eval()
    batch = local.collation.batch(small_examples[:8])
    with torch.no_grad():
        exact = direct_logps(local.model, batch)
        with local.accelerator.autocast():
            rounded = direct_logps(local.model, batch)
    assert gaps[0] < 0.1 * float((exact - rounded).abs().max())


def test_kl_under_autocast_compares_with_the_earlier_weights(small_local, small_examples):
    """Autocast keeps 16-bit copies of the adapter, which must not outlive a swap of its values, in either direction."""
    local = small_local(dropout=0.0, bf16=True)
    old = snapshot(local.model)
    restore(local.model, noise(old, 3))
    local.model.train()
    batches = {s: local.collation.batch(small_examples[i : i + 3]) for s, i in (("forget", 0), ("retain", 6))}
    with local.accelerator.autocast():
        ctx = context(local, batches, Companions(Reference(local.model, old)))
        before = ctx.nll("forget")  # fills the cache with the policy's weights
        kl = ctx.kl("retain")
        after = context(local, batches).nll("forget")
    assert float(kl) > 1e-3
    assert float(after) == pytest.approx(float(before))
    kl.backward()
    assert sum(float(p.grad.abs().sum()) for p in trainable_parameters(local.model).values() if p.grad is not None) > 0


def test_counts_are_those_of_the_whole_step_and_labels_need_no_forward_pass(small_local, small_examples):
    local = small_local()
    mine, others = local.collation.batch(small_examples[:3]), local.collation.batch(small_examples[3:8])
    totals = totals_of([{"forget": mine}, {"forget": others}])
    ctx = ModelContext(None, {"forget": mine}, totals, "forget", Companions())
    lengths = [e.num_label_tokens for e in small_examples[:8]]
    assert ctx.count("forget", "examples") == 8 and ctx.count("forget", "answer") == sum(lengths)
    assert ctx.count("forget", "all") == mine.input_ids.numel() + others.input_ids.numel()
    assert ctx.count_after("forget", 5) == sum(max(0, n - 5) for n in lengths)
    assert ctx.count_after("forget", 1000) == 1, "a mean over nothing divides by one"
    answers = [i for e in small_examples[:3] for i in e.input_ids[e.prompt_len :]]
    assert ctx.labels("forget").tolist() == answers
