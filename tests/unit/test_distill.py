"""Distillation: the formula by hand, its limits, and what it asks for."""

from __future__ import annotations

import math

import pytest
import torch

from unfed.objectives.base import Needs
from unfed.objectives.distill import Distill, distillation_loss


def test_one_position_by_hand():
    """Teacher logits 2 ln 3 and 0, student's 0 and 0, at tau = 2: 3/4 and 1/4 against halves, times 4."""
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64), torch.zeros(1, 2).double()
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert distillation_loss(teacher, student, 2.0).tolist() == pytest.approx([expected], rel=1e-12)
    assert distillation_loss(student, student, 2.0).tolist() == [0.0]


def test_the_gradient_keeps_its_size_as_the_temperature_grows():
    """For a high temperature it tends to (student - teacher) / V of centred logits (Hinton et al., equation 4)."""
    g = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(1, 5, generator=g, dtype=torch.float64) for _ in range(2))
    teacher, student = teacher - teacher.mean(), (student - student.mean()).requires_grad_()
    distillation_loss(teacher, student, 1e4).sum().backward()
    assert torch.allclose(student.grad, (student.detach() - teacher) / 5, atol=1e-4)
    assert torch.autograd.gradcheck(lambda s: distillation_loss(teacher, s, 2.0), (student,))


class Given:
    """Two of the whole step's five positions."""

    def logits(self, split: str, positions: str = "answer") -> torch.Tensor:
        return {"proxy": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}[split]

    def reference_logits(self, split: str, positions: str = "answer") -> torch.Tensor:
        return {"proxy": torch.tensor([[0.0, 1.0], [0.0, 2.0]])}[split]

    def count(self, split: str, positions: str) -> int:
        return {("proxy", "answer"): 5}[split, positions]


def test_the_mean_is_over_the_whole_step():
    assert Distill().needs == Needs(frozenset({"proxy"}), reference_distribution=True)
    given = Given()
    values = distillation_loss(given.reference_logits("proxy"), given.logits("proxy"), 3.0)
    found = Distill(temperature=3.0)(given)
    assert found.total.item() == pytest.approx(values.sum().item() / 5) and "distill" in found.parts
