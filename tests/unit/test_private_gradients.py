"""DP-SGD: every example's gradient against a loop over single examples, clipping and noise by hand, what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from unfed.aggregation.privacy import ExamplePrivacy
from unfed.base.errors import AdapterError, UnfedError
from unfed.models.adapter import snapshot, trainable_parameters
from unfed.objectives.nll import NLL
from unfed.objectives.registry import build_objective
from unfed.training.batches import BatchPlan, TrainRows, poisson_epoch, steps_per_epoch, totals_of
from unfed.training.context import Companions, Reference
from unfed.training.gradients import Passes
from unfed.training.loop import LocalTask
from unfed.training.private import ExampleContext, PrivateGradients, by_example, factors

METHODS = {
    "NLL": NLL(),
    "GradAscent": build_objective("GradAscent", {}),
    "GradDiff": build_objective("GradDiff", {"alpha": 0.0}),
    "NPO": build_objective("NPO", {"alpha": 0.0}),
    # Weights that a random model's unlikely tokens do not take to 0.
    "SimNPO": build_objective("SimNPO", {"alpha": 0.0, "beta": 0.1}),
    "WGA": build_objective("WGA", {"alpha": 0.0, "beta": 0.1}),
    "SatImp": build_objective("SatImp", {"alpha": 0.0, "beta1": 0.1}),
}


def shaken(local):
    """B is zero at the start, and then A has no gradient."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainable_parameters(local.model).values():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    local.model.train()
    return local


def context(local, split, examples, beside=None):
    batch = local.collation.batch(examples)
    return ExampleContext(local.model, {split: batch}, totals_of([{split: batch}]), split, beside or Companions())


def one_by_one(local, objective, split, examples, beside=None):
    """Gradients ``(B, ...)`` by weight name, from a backward pass for each example alone."""
    found = {}
    for example in examples:
        local.model.zero_grad(set_to_none=True)
        objective(context(local, split, [example], beside)).total.backward()
        for name, p in trainable_parameters(local.model).items():
            found.setdefault(name, []).append(p.grad.clone())
    local.model.zero_grad(set_to_none=True)
    return {name: torch.stack(grads) for name, grads in found.items()}


def together(local, objective, split, examples, beside=None):
    names = {p: n for n, p in trainable_parameters(local.model).items()}
    with by_example(factors(local.model), len(examples)) as found:
        objective(context(local, split, examples, beside)).total.backward()
    local.model.zero_grad(set_to_none=True)
    return {names[p]: g for p, g in found.by_weight.items()}


@pytest.mark.parametrize("name", METHODS)
def test_the_gradients_of_a_batch_are_those_of_its_examples(small_local, small_examples, name):
    objective = METHODS[name]
    (split,) = objective.needs.splits
    local, examples = shaken(small_local()), small_examples[:5]
    reference = Reference(local.model, snapshot(local.model))
    reference.prepare(split, [local.collation.batch(examples)])
    with torch.no_grad():
        for p in trainable_parameters(local.model).values():
            p.mul_(1.1)  # away from the reference
    beside = Companions(reference)
    single, batch = (f(local, objective, split, examples, beside) for f in (one_by_one, together))
    assert single.keys() == batch.keys() and len(single) == len(trainable_parameters(local.model))
    assert len({len(e) for e in examples}) > 1, "padding is part of the test"
    for n in single:
        assert float(single[n].abs().max()) > 1e-6
        torch.testing.assert_close(batch[n], single[n], rtol=1e-5, atol=1e-5 * float(single[n].abs().max()), msg=n)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_gives_the_same(small_local, small_examples, kwargs):
    examples = small_examples[:4]
    plain = together(shaken(small_local()), NLL(), "train", examples)
    local = shaken(small_local(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs))
    found = together(local, NLL(), "train", examples)
    assert found.keys() == plain.keys()
    for n in plain:
        torch.testing.assert_close(found[n], plain[n], rtol=1e-5, atol=1e-7)


def rule_for(local, settings, expected):
    return PrivateGradients(settings, factors(local.model), expected, 3, ("fit", 0, "c"))


def step(local, rule, cuts):
    passes = Passes(
        [{"train": local.collation.batch(c)} for c in cuts],
        lambda o, micro: o(ExampleContext(local.model, micro, totals_of([micro]), "train", Companions())),
        lambda loss: loss.backward(),
        list(trainable_parameters(local.model).values()),
    )
    return rule(NLL(), passes)


@pytest.mark.parametrize("cuts", [(6,), (4, 2), (1, 1, 1, 1, 1, 1)])
def test_a_step_is_the_clipped_sum_however_it_is_cut(small_local, small_examples, cuts):
    local, examples = shaken(small_local()), small_examples[:6]
    single = one_by_one(local, NLL(), "train", examples)
    lengths = torch.stack([g.flatten(1).square().sum(1) for g in single.values()]).sum(0).sqrt()
    clip = float(lengths.median())
    scale = (clip / lengths).clamp(max=1.0)
    assert 0 < int((scale < 1).sum()) < len(examples)
    parts = torch.tensor([0, *cuts]).cumsum(0).tolist()
    sums = step(
        local,
        rule_for(local, ExamplePrivacy(clip=clip, noise_multiplier=0.0), 8.0),
        [examples[a:b] for a, b in pairwise(parts)],
    )
    for name, p in trainable_parameters(local.model).items():
        wanted = torch.einsum("b,b...->...", scale, single[name]) / 8.0
        torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-6)
    mean = sum(float(NLL()(context(local, "train", [e])).total.detach()) for e in examples) / 6
    assert float(sums["loss"]) == pytest.approx(mean, rel=1e-5)


def test_the_noise_has_the_stated_size_and_depends_on_the_step(small_local, small_examples):
    local = shaken(small_local())
    settings = ExamplePrivacy(clip=0.5, noise_multiplier=2.0)

    def noise(rule):
        assert step(local, rule, []) == {}, "an empty sample has no loss"
        grads = [p.grad.flatten() for p in trainable_parameters(local.model).values()]
        return torch.cat(grads)

    rule = rule_for(local, settings, 4.0)
    first, second = noise(rule), noise(rule)
    assert float(first.std()) == pytest.approx(2.0 * 0.5 / 4.0, rel=0.05)
    assert not torch.equal(first, second)
    later = PrivateGradients(settings, factors(local.model), 4.0, 3, ("fit", 0, "c"), done=1)
    assert torch.equal(noise(later), second), "a resumed run draws what the undisturbed one drew"
    secure = ExamplePrivacy(clip=0.5, noise_multiplier=2.0, secure_noise=True)
    a, b = noise(rule_for(local, secure, 4.0)), noise(rule_for(local, secure, 4.0))
    assert float(a.std()) == pytest.approx(0.25, rel=0.05) and not torch.equal(a, b)


def test_a_poisson_epoch_draws_every_row_on_its_own(small_examples):
    rows = TrainRows({"train": small_examples})
    sizes, hits = [], torch.zeros(len(small_examples))
    for seed in range(300):
        steps = poisson_epoch(rows, "train", 6, torch.Generator().manual_seed(seed))
        assert len(steps) == steps_per_epoch(rows, "train", 6) == 3
        for chosen in steps:
            sizes.append(float(len(chosen["train"])))
            hits[list(chosen["train"])] += 1
    mean, variance = torch.tensor(sizes).mean(), torch.tensor(sizes).var()
    assert float(mean) == pytest.approx(6, abs=0.25) and float(variance) == pytest.approx(
        18 * (1 / 3) * (2 / 3), rel=0.15
    )
    assert torch.all((hits / 900 - 1 / 3).abs() < 0.07)
    everyone = poisson_epoch(TrainRows({"train": small_examples[:3]}), "train", 8, torch.Generator())
    assert [sorted(s["train"]) for s in everyone] == [[0, 1, 2]]


def fit(local, examples, settings, **plan):
    rows = TrainRows({"train": examples})
    made = BatchPlan(rows, "train", frozenset({"train"}), 4, 2, ("fit", 0, "c"), sample="poisson", **plan)
    return local.train(LocalTask(made, NLL(), 3.0, privacy=settings), Companions())


def test_the_loop_learns_without_noise_and_repeats_itself_with_it(small_local, small_examples):
    quiet, settings = ExamplePrivacy(clip=10.0, noise_multiplier=0.0), ExamplePrivacy(clip=1.0, noise_multiplier=0.5)
    result = fit(small_local(gradient_accumulation_steps=2), small_examples, quiet)
    assert result.steps == 9 and result.curve[-1] < result.curve[0]
    ends = []
    for seed in (0, 0, 1):
        local = small_local(gradient_accumulation_steps=2, seed=seed)
        fit(local, small_examples, settings)
        ends.append(snapshot(local.model).digest())
    assert ends[0] == ends[1] != ends[2]


def test_what_has_no_gradient_by_example_is_refused(small_local, small_examples):
    with pytest.raises(AdapterError, match="trainable parameters are something else"):
        factors(small_local(lora=False).model)
    local = shaken(small_local())
    with pytest.raises(UnfedError, match="a divergence from the reference is not a sum over examples"):
        build_objective("GradDiff", {"retain_loss_type": "KL"})(
            ExampleContext(
                local.model, {s: local.collation.batch(small_examples[:2]) for s in ("forget", "retain")},
                totals_of([]), "forget", Companions(),
            )
        )  # fmt: skip
    with pytest.raises(UnfedError, match="not one row for each of 3 examples"), by_example(factors(local.model), 3):
        NLL()(context(local, "train", small_examples[:2]))


def test_a_weight_that_is_used_behind_the_hooks_back_is_found(small_local, small_examples):
    local = shaken(small_local())
    weight = factors(local.model)[0].weight

    class Twice(NLL):
        def __call__(self, ctx):
            terms = super().__call__(ctx)
            return type(terms)(terms.total + 50 * weight.square().sum())

    rule = rule_for(local, ExamplePrivacy(), 4.0)
    passes = Passes(
        [{"train": local.collation.batch(small_examples[:2])}],
        lambda o, micro: o(ExampleContext(local.model, micro, totals_of([micro]), "train", Companions())),
        lambda loss: loss.backward(),
        list(trainable_parameters(local.model).values()),
    )
    with pytest.raises(UnfedError, match="do not add up"):
        rule(Twice(), passes)
