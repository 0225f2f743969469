"""SCAFFOLD's part in a client's steps: every gradient is corrected, and the gradients before that are averaged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unfed.base.types import AdapterState
from unfed.models.adapter import live_tensors
from unfed.objectives.base import Objective
from unfed.training.gradients import GradientRule, Passes


class Corrected:
    """A gradient rule that adds ``correction`` (SCAFFOLD's ``c - c_k``, by tensor name) to what another rule makes.

    The clip comes afterwards, as for every rule. Tensors that do not train this round are left out. Memory: two more
    sets of the tensors that train, in float32 on the model's device.
    """

    def __init__(self, rule: GradientRule, model: nn.Module, correction: AdapterState) -> None:
        self._rule, self._steps = rule, 0
        by_storage = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
        self._parts: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = {}
        for name, tensor in live_tensors(model).items():
            parameter = by_storage.get(tensor.data_ptr())
            if parameter is not None and name in correction:
                added = correction[name].to(parameter.device, torch.float32)
                self._parts[name] = (parameter, added, torch.zeros_like(added))

    def __call__(self, objective: Objective, passes: Passes) -> dict[str, Tensor]:
        """See :class:`unfed.training.gradients.GradientRule`."""
        losses = self._rule(objective, passes)
        self._steps += 1
        for parameter, added, total in self._parts.values():
            if parameter.grad is not None:
                total.add_(parameter.grad)
                parameter.grad.add_(added)
        return losses

    def mean(self) -> AdapterState:
        """The mean of the gradients before their correction, in float32; zero for a tensor that got none."""
        return AdapterState({n: (total / max(1, self._steps)).cpu() for n, (_, _, total) in self._parts.items()})
