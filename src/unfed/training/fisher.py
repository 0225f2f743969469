"""The diagonal Fisher information of some rows, and a quadratic penalty weighted with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unfed.base.types import AdapterState, Batch
from unfed.models.adapter import WeightSwap, live_tensors
from unfed.models.forward import answer_logps


class Fisher:
    """Weights of an earlier moment and how much each mattered then: two float32 copies on the model's device.

    ``diagonal`` is the mean of ``(d log p(answer) / d w)^2`` over ``rows``, batches of one example each, at the weights
    of ``state`` and in evaluation mode. The parameters' ``grad`` must be empty when it is made, and is left so.
    """

    def __init__(self, model: nn.Module, state: AdapterState, rows: Sequence[Batch]) -> None:
        by_storage = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
        self._parameters: list[nn.Parameter] = []
        self._start: list[Tensor] = []
        for name, tensor in live_tensors(model).items():
            parameter = by_storage.get(tensor.data_ptr())
            if parameter is not None:
                self._parameters.append(parameter)
                self._start.append(state[name].to(parameter.device, torch.float32, copy=True))
        self.diagonal = [torch.zeros_like(t) for t in self._start]
        with WeightSwap(model, state).active(), torch.enable_grad():
            for row in rows:
                answer_logps(model, row).sum().backward()
                for parameter, diagonal in zip(self._parameters, self.diagonal, strict=True):
                    if parameter.grad is not None:
                        diagonal.add_(parameter.grad.float().square(), alpha=1.0 / len(rows))
                        parameter.grad = None

    def distance_sq(self) -> Tensor:
        """``sum_i F_i (w_i - w*_i)^2``, a differentiable scalar, float32."""
        sums = [
            (f * (p.float() - s).square()).sum()
            for p, s, f in zip(self._parameters, self._start, self.diagonal, strict=True)
        ]
        return torch.stack(sums).sum()
