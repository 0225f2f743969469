"""Objectives: the pure functions against formulas written out, their gradients, and the registry."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor

from unfed.base.errors import ConfigError
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, StepContext
from unfed.objectives.grad_diff import GradDiff
from unfed.objectives.npo import NPO, npo_loss
from unfed.objectives.proximal import Proximal
from unfed.objectives.registry import OBJECTIVES, UNLEARNING_METHODS, build_objective, objective_problems
from unfed.objectives.simnpo import SimNPO, simnpo_loss
from unfed.objectives.tokens import kl_divergence


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_npo_by_hand() -> None:
    policy, reference = [-3.0, -40.0, -5.0], [-5.0, -20.0, -5.0]
    expected = [-2 / 0.1 * math.log(sigmoid(-0.1 * (p - r))) for p, r in zip(policy, reference, strict=True)]
    result = npo_loss(torch.tensor(policy).double(), torch.tensor(reference).double(), 0.1)
    assert result.tolist() == pytest.approx(expected, rel=1e-12)
    assert result[2].item() == pytest.approx(2 * math.log(2) / 0.1)
    assert result[1] < result[2] < result[0]  # the more a row is forgotten, the less it costs


def test_npo_tends_to_gradient_ascent_for_a_small_beta() -> None:
    policy = torch.tensor([-3.0, -7.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(npo_loss(policy, torch.tensor([-2.0, -9.0]).double(), 1e-6).sum(), policy)
    torch.testing.assert_close(gradient, torch.ones(2).double(), rtol=1e-5, atol=0)


def test_simnpo_by_hand() -> None:
    expected = [
        -2 / 4.5 * math.log(sigmoid(4.5 * (12.0 / 4 - 0.5))),
        -2 / 4.5 * math.log(sigmoid(4.5 * (0.2 / 2 - 0.5))),
    ]
    result = simnpo_loss(torch.tensor([-12.0, -0.2], dtype=torch.float64), torch.tensor([4, 2]), 4.5, 0.5)
    assert result.tolist() == pytest.approx(expected, rel=1e-12)


def test_simnpo_of_an_example_without_labels_is_finite() -> None:
    logps = torch.zeros(1, requires_grad=True)
    loss = simnpo_loss(logps, torch.tensor([0]), 4.5).sum()
    loss.backward()
    assert math.isfinite(loss.item()) and logps.grad is not None and bool(logps.grad.isfinite().all())


def test_extreme_log_ratios_stay_finite() -> None:
    policy = torch.tensor([-1e4, 0.0], requires_grad=True)
    loss = npo_loss(policy, torch.tensor([0.0, -1e4]), 1.0)
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and policy.grad is not None and policy.grad.tolist() == [0.0, 2.0]


def test_kl_by_hand_and_its_minimum() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
    expected = sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
    shifted = kl_divergence(p.log() + 3.0, q.log() - 1.0)  # logits are free up to a constant
    assert shifted.item() == pytest.approx(expected, rel=1e-12)
    assert kl_divergence(p.log(), p.log()).item() == pytest.approx(0.0, abs=1e-15)
    assert kl_divergence(torch.zeros(2, 3, 5), torch.randn(2, 3, 5)).shape == (2, 3)


def test_sixteen_bit_logits_are_read_in_float32() -> None:
    logits = torch.randn(6, 50).bfloat16()
    assert kl_divergence(logits, logits).dtype == torch.float32


def test_gradients_in_float64() -> None:
    torch.manual_seed(0)
    policy = (-5 * torch.rand(4)).double().requires_grad_()
    reference = (-5 * torch.rand(4)).double()
    lengths = torch.tensor([1, 2, 3, 4])
    logits = torch.randn(3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: npo_loss(x, reference, 0.3), (policy,))
    assert torch.autograd.gradcheck(lambda x: simnpo_loss(x, lengths, 2.5, 0.1), (policy,))
    assert torch.autograd.gradcheck(lambda x: kl_divergence(torch.arange(15.0).double().view(3, 5), x), (logits,))


class GivenContext:
    """A ``StepContext`` of given numbers, one whole step; what an objective may not ask for is not there."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def _given(self, key: str) -> Tensor:
        assert key in self.answers, f"the objective asked for {key}, which its needs do not state"
        return self.answers[key]

    def token_logps(self, split: str) -> Tensor:
        return self._given(f"token_logps {split}")

    def row(self, split: str) -> Tensor:
        return self._given(f"row {split}")

    def logps(self, split: str) -> Tensor:
        return self._given(f"logps {split}")

    def num_tokens(self, split: str) -> Tensor:
        return torch.tensor([2, 4])

    def reference_logps(self, split: str) -> Tensor:
        return self._given(f"reference {split}")

    def token_mean(self, split: str, values: Tensor) -> Tensor:
        return values.sum() / 6

    def example_mean(self, split: str, values: Tensor) -> Tensor:
        return values.sum() / 2

    def nll(self, split: str) -> Tensor:
        return self.token_mean(split, -self.logps(split))

    def kl(self, split: str, positions: str = "answer") -> Tensor:
        return self._given(f"kl {split} {positions}")

    def hidden(self, split: str, module: str) -> Tensor:
        return self._given(f"hidden {split} {module}")

    def adapter_distance_sq(self) -> Tensor:
        return torch.tensor(9.0)

    def tail_norm(self) -> Tensor:
        raise NotImplementedError

    def micro_share(self) -> float:
        return 0.25


FORGET = {"logps forget": torch.tensor([-2.0, -4.0])}
RETAIN = {"logps retain": torch.tensor([-1.0, -2.0])}


def run(objective: Any, **answers: Any) -> LossTerms:
    ctx: StepContext = GivenContext(**answers)
    return objective(ctx)


def test_weights_of_grad_diff() -> None:
    terms = run(GradDiff(gamma=2.0, alpha=3.0), **FORGET, **RETAIN)
    assert terms.total.item() == pytest.approx(2.0 * -1.0 + 3.0 * 0.5)
    assert terms.parts["forget"].item() == pytest.approx(-1.0)
    assert terms.parts["retain"].item() == pytest.approx(0.5)


def test_kl_retain_asks_for_answer_positions_unless_parity() -> None:
    answers = FORGET | {"kl retain answer": torch.tensor(0.1), "kl retain all": torch.tensor(0.7)}
    assert run(GradDiff(retain_loss_type="KL"), **answers).parts["retain"].item() == pytest.approx(0.1)
    parity = GradDiff(retain_loss_type="KL", parity="openunlearning")
    assert run(parity, **answers).parts["retain"].item() == pytest.approx(0.7)


def test_without_retain_weight_no_retain_batch_is_touched() -> None:
    objective = NPO(alpha=0)
    assert objective.needs == Needs(frozenset({"forget"}), reference=True)
    terms = run(objective, **FORGET, **{"reference forget": torch.tensor([-2.0, -4.0])})
    assert terms.total.item() == pytest.approx(2 * math.log(2) / 0.1)
    assert set(terms.parts) == {"forget"}


def test_needs_follow_the_hyperparameters() -> None:
    both = frozenset({"forget", "retain"})
    assert build_objective("NLL", {}).needs == Needs(frozenset({"train"}))
    assert build_objective("GradAscent", {}).needs == Needs(frozenset({"forget"}))
    assert GradDiff().needs == Needs(both)
    assert GradDiff(retain_loss_type="KL").needs == Needs(both, reference_distribution=True)
    assert NPO(retain_loss_type="KL").needs == Needs(both, reference=True, reference_distribution=True)
    assert SimNPO().needs == Needs(both)
    assert Proximal(NPO(), 0.1).needs == Needs(both, reference=True, anchor=True)


def test_proximal_adds_its_share_and_keeps_the_parts() -> None:
    inner = GradDiff()
    plain, wrapped = run(inner, **FORGET, **RETAIN), run(Proximal(inner, mu=0.4), **FORGET, **RETAIN)
    assert wrapped.total.item() == pytest.approx(plain.total.item() + 0.4 / 2 * 9.0 * 0.25)
    assert wrapped.parts["proximal"].item() == pytest.approx(0.45)
    assert wrapped.parts["forget"] == plain.parts["forget"]
    assert Proximal(inner, mu=0.4).name == "GradDiff+proximal"


def test_published_defaults() -> None:
    assert build_objective("NPO", {}) == NPO(beta=0.1, gamma=1.0, alpha=1.0, retain_loss_type="NLL", parity=None)
    assert build_objective("SimNPO", {}) == SimNPO(delta=0.0, beta=4.5, gamma=0.125, alpha=1.0)
    assert {name: build_objective(name, {}).name for name in OBJECTIVES} == {n: n for n in OBJECTIVES}
    assert set(UNLEARNING_METHODS) == set(OBJECTIVES) - {"NLL"}


def test_an_objective_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        NPO().beta = 1.0  # type: ignore[misc]


def test_unknown_method_names_the_nearest() -> None:
    (problem,) = objective_problems("NPOO", {"beta": -1})
    assert "'NPOO'" in problem and "did you mean 'NPO'" in problem


def test_all_problems_at_once_with_key_value_and_nearest() -> None:
    found = objective_problems("NPO", {"betta": 0.1, "gamma": 0, "alpha": "1", "retain_loss_type": "kl"})
    assert len(found) == 4
    assert "method.betta" in found[0] and "did you mean 'beta'" in found[0]
    assert found[1] == "method.gamma: must be a number above 0, not 0"
    assert found[2] == "method.alpha: must be a number at least 0, not '1'"
    assert "'kl'" in found[3] and "did you mean 'KL'" in found[3]
    with pytest.raises(ConfigError) as caught:
        build_objective("NPO", {"betta": 0.1, "gamma": 0})
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("value", [True, None, float("nan"), float("inf"), [0.1], 0, -0.1])
def test_beta_refuses(value: object) -> None:
    (problem,) = objective_problems("NPO", {"beta": value})
    assert problem.startswith("method.beta: must be a number above 0") and repr(value) in problem
    with pytest.raises(ConfigError, match=r"NPO\.beta"):
        NPO(beta=value)  # type: ignore[arg-type]


def test_a_method_without_hyperparameters_says_so() -> None:
    assert objective_problems("GradAscent", {"beta": 1.0}) == [
        "method.beta: GradAscent has no such hyperparameter; it has none"
    ]


def test_parity_may_be_given_as_none() -> None:
    assert objective_problems("GradDiff", {"parity": None}) == []
    assert "openunlearning" in objective_problems("GradDiff", {"parity": "OpenUnlearning"})[0]
