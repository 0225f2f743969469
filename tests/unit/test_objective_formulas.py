"""Each further objective: its loss by hand, its gradient, and its sum over a step of two examples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unfed.base.errors import ConfigError
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs
from unfed.objectives.ceu import ceu_loss
from unfed.objectives.dpo import dpo_loss
from unfed.objectives.flat import flat_loss
from unfed.objectives.ihl import ihl_loss
from unfed.objectives.registry import build_objective, objective_problems
from unfed.objectives.sat_imp import satimp_loss
from unfed.objectives.tokens import sum_by_example, token_index
from unfed.objectives.uce import uce_loss
from unfed.objectives.undial import undial_loss
from unfed.objectives.wga import wga_loss

# Three tokens of a vocabulary of three: a first answer of one token, a second of two. The label is always token 0.
PROBS = torch.tensor([[0.5, 0.3, 0.2], [0.8, 0.1, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64)
BEFORE = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 0])
ROW = torch.tensor([0, 1, 1])
P = (0.5, 0.8, 0.2)


class TwoAnswers:
    """The step of the tables above: split ``alternate`` is the forget split with ``BEFORE`` for probabilities."""

    def __init__(self, retain: float = 0.7) -> None:
        self.retain = torch.tensor(retain, dtype=torch.float64)
        self.probs = {"forget": PROBS, "alternate": BEFORE}

    def logits(self, split: str, positions: str = "answer") -> Tensor:
        return self.probs[split].log() + 3.0  # free up to a constant

    def labels(self, split: str) -> Tensor:
        return LABELS

    def row(self, split: str) -> Tensor:
        return ROW

    def label_mask(self, split: str) -> Tensor:
        return torch.tensor([[False, True, False], [False, True, True]])

    def num_tokens(self, split: str) -> Tensor:
        return torch.tensor([1, 2])

    def token_logps(self, split: str) -> Tensor:
        return self.probs[split][:, 0].log()

    def logps(self, split: str) -> Tensor:
        return sum_by_example(self.token_logps(split), self.label_mask(split))

    def reference_logps(self, split: str) -> Tensor:
        return torch.tensor([-1.0, -2.0], dtype=torch.float64)

    def reference_logits(self, split: str, positions: str = "answer") -> Tensor:
        return BEFORE.log() - 1.0

    def token_mean(self, split: str, values: Tensor) -> Tensor:
        return values.sum() / 3

    def example_mean(self, split: str, values: Tensor) -> Tensor:
        return values.sum() / 2

    def count_after(self, split: str, skipped: int) -> int:
        return {0: 3, 1: 1}[skipped]

    def nll(self, split: str) -> Tensor:
        return self.retain if split == "retain" else -self.token_logps(split).sum() / 3

    def kl(self, split: str, positions: str = "answer") -> Tensor:
        return torch.tensor({"answer": 0.25, "all": 0.75}[positions])


def run(name: str, **params: Any) -> LossTerms:
    ctx: Any = TwoAnswers()
    return build_objective(name, params)(ctx)


def forget(name: str, **params: Any) -> float:
    return run(name, **params).parts["forget"].item()


def entropy_to(target: tuple[float, ...], probs: Tensor) -> float:
    return -sum(t * math.log(p) for t, p in zip(target, probs.tolist(), strict=True) if t > 0)


def test_dpo() -> None:
    """Chosen log-ratios log 0.6 + 1 and log 0.125 + 2, rejected ones log 0.5 + 1 and log 0.16 + 2."""
    margins = (math.log(0.6 / 0.5), math.log(0.125 / 0.16))
    expected = sum(2 / 0.5 * math.log1p(math.exp(-0.5 * m)) for m in margins) / 2
    for name in ("DPO", "AltPO"):
        assert forget(name, beta=0.5) == pytest.approx(expected, rel=1e-12)
        assert run(name, beta=0.5, gamma=2.0, alpha=3.0).total.item() == pytest.approx(2 * expected + 3 * 0.7)


def test_dpo_without_a_margin_and_its_slope() -> None:
    chosen = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss = dpo_loss(chosen, torch.zeros(2).double(), 0.1)
    assert loss.tolist() == pytest.approx([2 * math.log(2) / 0.1] * 2)
    (slope,) = torch.autograd.grad(loss.sum(), chosen)
    assert slope.tolist() == pytest.approx([-1.0, -1.0])  # the factor 2/beta takes beta out of it


def test_idk_nll() -> None:
    expected = -(math.log(0.6) + math.log(0.5) + math.log(0.25)) / 3
    terms = run("IdkNLL", gamma=2.0)
    assert terms.parts["forget"].item() == pytest.approx(expected)
    assert terms.total.item() == pytest.approx(2 * expected + 0.7)


def test_kl_min() -> None:
    ascent = (math.log(0.5) + math.log(0.8) + math.log(0.2)) / 3
    assert run("KLMin", alpha=2.0).total.item() == pytest.approx(ascent + 2 * 0.25)
    assert run("KLMin", parity="openunlearning").parts["retain"].item() == pytest.approx(0.75)
    (problem,) = objective_problems("KLMin", {"retain_loss_type": "NLL"})
    assert problem.startswith("method.retain_loss_type: unknown value 'NLL'") and "KL" in problem


def test_undial() -> None:
    """beta = log 4 divides the label's probability by four before it is normalised: (0.6, 0.3, 0.1) -> 0.15/0.55."""
    targets = ((0.15 / 0.55, 0.3 / 0.55, 0.1 / 0.55), (0.2, 0.4, 0.4), (0.0625 / 0.8125, 0.5 / 0.8125, 0.25 / 0.8125))
    expected = sum(entropy_to(t, p) for t, p in zip(targets, PROBS, strict=True)) / 3
    terms = run("UNDIAL", beta=math.log(4))
    assert terms.total.item() == pytest.approx(expected, rel=1e-6)
    assert set(terms.parts) == {"forget"}, "alpha is 0 unless given"


def test_wga() -> None:
    assert forget("WGA", beta=2.0) == pytest.approx(sum(p**2 * math.log(p) for p in P) / 3)
    assert forget("WGA", beta=0.0) == pytest.approx(forget("GradAscent"))


def test_satimp() -> None:
    expected = sum(p**3 * (1 - p) ** 2 * math.log(p) for p in P) / 3
    assert forget("SatImp", beta1=3.0, beta2=2.0) == pytest.approx(expected)
    assert forget("SatImp", beta1=1.0, beta2=0.0) == pytest.approx(forget("WGA"))
    assert run("SatImp").total.item() == pytest.approx(forget("SatImp") + 0.1 * 0.7)


def test_satimp_of_a_certain_token_is_finite() -> None:
    logps = torch.zeros(1, requires_grad=True)
    loss = satimp_loss(logps, 5.0, 0.5).sum()
    loss.backward()
    assert loss.item() == 0.0 and logps.grad is not None and logps.grad.item() == 0.0


def test_ceu() -> None:
    """Targets without the label: (0.6, 0.4), (0.5, 0.5) and (0.25, 0.75) on the other two tokens."""
    each = [entropy_to((0.0, *t), p) for t, p in zip(((0.6, 0.4), (0.5, 0.5), (0.25, 0.75)), PROBS, strict=True)]
    assert forget("CEU", ignore_first_n_answer_tokens=0) == pytest.approx(sum(each) / 3)
    assert forget("CEU") == pytest.approx(each[2]), "the first token of each answer does not count"


def test_ceu_counts_whole_tokens() -> None:
    for value in (1.5, -1, True, "1"):
        (problem,) = objective_problems("CEU", {"ignore_first_n_answer_tokens": value})
        assert problem == f"method.ignore_first_n_answer_tokens: must be a whole number at least 0, not {value!r}"


def test_uce() -> None:
    assert forget("UCE") == pytest.approx(-sum(math.log(1 - p / 2) for p in P) / 3)
    ends = uce_loss(torch.tensor([0.0, -1e4]))
    assert ends.tolist() == pytest.approx([math.log(2), 0.0])


def test_ihl() -> None:
    """The likeliest other tokens have 0.3, 0.1 and 0.6."""
    assert forget("IHL") == pytest.approx((1.2 + 1.7 + 0.6) / 3)
    ends = ihl_loss(torch.tensor([[100.0, 0.0, 0.0], [0.0, 100.0, 0.0]]), torch.tensor([0, 0]))
    assert ends.tolist() == pytest.approx([2.0, 0.0])


FLAT_PAIRS = ((0.6, 0.5), (0.375, 0.5))
"""Mean probability of the template's and of the forget answer's tokens, for both examples."""


@pytest.mark.parametrize(
    ("divergence", "g", "f_of_g"),
    [
        ("TV", lambda v: math.tanh(v) / 2, lambda v: math.tanh(v) / 2),
        ("KL", lambda v: v, lambda v: math.exp(v - 1)),
        ("Pearson", lambda v: v, lambda v: v + v * v / 4),
        (
            "JS",
            lambda v: math.log(2) - math.log(1 + math.exp(-v)),
            lambda v: -math.log(2 - math.exp(math.log(2) - math.log(1 + math.exp(-v)))),
        ),
    ],
)
def test_flat(divergence: str, g: Any, f_of_g: Any) -> None:
    """The Jensen-Shannon conjugate is written as its definition, -log(2 - exp(g)), here."""
    expected = sum(f_of_g(forgotten) - g(template) for template, forgotten in FLAT_PAIRS) / 2
    assert forget("FLAT", divergence=divergence) == pytest.approx(expected, rel=1e-12)


def test_flat_rewards_the_template_and_punishes_the_answer() -> None:
    half, more = torch.tensor([0.5]), torch.tensor([0.6])
    for divergence in ("TV", "KL", "JS", "Pearson"):
        middle = flat_loss(half, half, divergence)
        assert flat_loss(more, half, divergence) < middle < flat_loss(half, more, divergence)


def test_gradients_in_float64() -> None:
    torch.manual_seed(0)
    logps = (-3 * torch.rand(5)).double().requires_grad_()
    other = (-3 * torch.rand(5)).double()
    logits, before = torch.randn(4, 6).double().requires_grad_(), torch.randn(4, 6).double()
    labels = torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(lambda x: dpo_loss(x, other, 0.3), (logps,))
    assert torch.autograd.gradcheck(lambda x: dpo_loss(other, x, 0.3), (logps,))
    assert torch.autograd.gradcheck(uce_loss, (logps,))
    assert torch.autograd.gradcheck(lambda x: ihl_loss(x, labels), (logits,))
    assert torch.autograd.gradcheck(lambda x: undial_loss(x, before, labels, 3.0), (logits,))
    for divergence in ("TV", "KL", "JS", "Pearson"):
        probs = torch.rand(3).double().requires_grad_(), torch.rand(3).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda a, b, d=divergence: flat_loss(a, b, d), probs)


def test_gradients_of_losses_with_constant_weights() -> None:
    """Finite differences see the weights move, so these are compared with the weights kept by hand."""
    torch.manual_seed(1)
    logps = (-3 * torch.rand(5)).double().requires_grad_()
    p = logps.detach().exp()
    (gradient,) = torch.autograd.grad(wga_loss(logps, 1.5).sum(), logps)
    torch.testing.assert_close(gradient, p**1.5)
    (gradient,) = torch.autograd.grad(satimp_loss(logps, 2.0, 3.0).sum(), logps)
    torch.testing.assert_close(gradient, p**2 * (1 - p) ** 3)
    logits = torch.randn(4, 6).double().requires_grad_()
    labels = torch.tensor([0, 5, 2, 2])
    (gradient,) = torch.autograd.grad(ceu_loss(logits, labels).sum(), logits)
    probs = logits.detach().softmax(-1)
    without = probs.scatter(1, labels.unsqueeze(1), 0.0)
    torch.testing.assert_close(gradient, probs - without / without.sum(1, keepdim=True))  # of any cross-entropy


def test_sixteen_bit_logits_are_read_in_float32() -> None:
    logits, labels = torch.randn(6, 50).bfloat16(), torch.zeros(6, dtype=torch.int64)
    for loss in (ceu_loss(logits, labels), ihl_loss(logits, labels), undial_loss(logits, logits, labels, 1.0)):
        assert loss.dtype == torch.float32


def test_needs() -> None:
    pair, all_three = frozenset({"forget", "alternate"}), frozenset({"forget", "alternate", "retain"})
    both = frozenset({"forget", "retain"})
    assert build_objective("DPO", {}).needs == build_objective("AltPO", {}).needs == Needs(all_three, reference=True)
    assert build_objective("DPO", {"alpha": 0.0}).needs == Needs(pair, reference=True)
    assert build_objective("IdkNLL", {}).needs == Needs(frozenset({"alternate", "retain"}))
    assert build_objective("FLAT", {}).needs == Needs(pair)
    assert build_objective("KLMin", {}).needs == Needs(both, reference_distribution=True)
    assert build_objective("UNDIAL", {}).needs == Needs(frozenset({"forget"}), reference_distribution=True)
    assert build_objective("UNDIAL", {"alpha": 1.0}).needs == Needs(both, reference_distribution=True)
    for name in ("CEU", "UCE"):
        assert build_objective(name, {}).needs == Needs(frozenset({"forget"}))
    for name in ("WGA", "SatImp", "IHL"):
        assert build_objective(name, {}).needs == Needs(both)


@pytest.mark.parametrize("name", ["DPO", "AltPO", "IdkNLL", "KLMin", "UNDIAL", "WGA", "SatImp", "CEU", "UCE", "IHL"])
def test_the_terms_are_the_weighted_summands(name: str) -> None:
    terms = run(name, gamma=0.5, alpha=2.0)
    assert set(terms.terms) == {"forget", "retain"}
    assert terms.total.item() == pytest.approx(sum(t.item() for t in terms.terms.values()))
    assert terms.terms["forget"].item() == pytest.approx(0.5 * terms.parts["forget"].item())


@given(st.integers(0, 2**31), st.floats(0.1, 30.0))
def test_bounds_hold_for_any_logits(seed: int, scale: float) -> None:
    """UCE in [0, log 2], IHL in [0, 2]; a cross-entropy to a fixed target is at least that target's entropy."""
    g = torch.Generator().manual_seed(seed)
    logits, before = (scale * torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 7, (5,), generator=g)
    logps = logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    assert bool(((uce_loss(logps) >= 0) & (uce_loss(logps) <= math.log(2) + 1e-12)).all())
    hinge = ihl_loss(logits, labels)
    assert bool(((hinge >= 0) & (hinge <= 2)).all())
    lowered = before - 3.0 * torch.nn.functional.one_hot(labels, 7)
    distilled = undial_loss(logits, before, labels, 3.0)
    entropy = torch.distributions.Categorical(logits=lowered).entropy()
    assert bool((distilled >= entropy - 1e-9).all())
    torch.testing.assert_close(undial_loss(lowered, before, labels, 3.0), entropy)
    others = logits.scatter(1, labels.unsqueeze(1), float("-inf"))
    without = torch.distributions.Categorical(logits=others.clamp(min=-1e9)).entropy()
    share = others.logsumexp(1) - logits.logsumexp(1)  # log(1 - p): CE-U is lowest where nothing is left on the label
    torch.testing.assert_close(ceu_loss(logits, labels), without - share)


def test_limits_are_told_by_name() -> None:
    with pytest.raises(ConfigError, match=r"method\.divergence.*'tv'.*did you mean 'TV'"):
        build_objective("FLAT", {"divergence": "tv"})
    assert objective_problems("UNDIAL", {"beta": 0}) == ["method.beta: must be a number above 0, not 0"]


def test_token_index_and_sums_by_example() -> None:
    assert token_index(torch.tensor([0, 0, 0, 2, 2, 3])).tolist() == [0, 1, 2, 0, 1, 0]
    assert token_index(torch.tensor([], dtype=torch.int64)).tolist() == []
    mask = torch.tensor([[True, True, False], [False, False, False], [False, True, True]])
    assert sum_by_example(torch.tensor([1.0, 2.0, 4.0]), mask).tolist() == [1.0, 0.0, 6.0]
