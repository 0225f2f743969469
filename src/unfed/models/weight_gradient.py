"""The gradient of all weights of the adapted modules, as low-rank factors: what a full fine-tuning would do first.

For a linear layer ``y = W x`` it is ``G = sum over positions of dy x^T`` ``(m, n)``. It is never formed: two passes
over the rows gather products of it with thin matrices, which add up (the randomised SVD of Halko, Martinsson and Tropp
2011, algorithms 4.1 and 5.1): ``Y = G Omega``, ``Q = orth(Y)``, then ``Z = Q^T G``, and ``Q Z`` is close to G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from unfed.aggregation.adapters.fed_sb import Factors
from unfed.base.seeding import torch_generator
from unfed.base.types import Batch
from unfed.models.core import lora_layers
from unfed.models.forward import token_logps

_Take = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True)
class Sketch:
    """``rank`` directions come back; ``oversampling`` more are looked at. ``seed``: of the random directions."""

    rank: Mapping[str, int]
    oversampling: int
    seed: int


def gradient_factors(
    model: PeftModel, batches: Sequence[Batch], sketch: Sketch, autocast: Any = nullcontext
) -> Factors:
    """The top of each module's gradient of the mean loss (nats a token) over all ``batches``: ``left`` ``(m, r)`` and
    ``right`` ``(r, n)``, float32, on the CPU. In evaluation mode, at the weights that the model has.

    Memory: ``(r + oversampling) (m + n)`` float32 values a module beside what a backward pass takes.
    """
    layers = lora_layers(model)
    width = {m: _width(layer, sketch.rank[m] + sketch.oversampling) for m, layer in layers.items()}
    random = {m: _directions(layer, width[m], sketch.seed, m) for m, layer in layers.items()}
    seen = _pass(model, layers, batches, autocast, lambda m, x, dy: dy.T @ (x @ random[m]))
    basis = {m: torch.linalg.qr(y)[0] for m, y in seen.items()}
    rows = _pass(model, layers, batches, autocast, lambda m, x, dy: (dy @ basis[m]).T @ x)
    found = {}
    for module, z in rows.items():
        u, s, vh = torch.linalg.svd(z, full_matrices=False)
        r = sketch.rank[module]
        found[module] = ((basis[module] @ (u[:, :r] * s[:r])).cpu(), vh[:r].contiguous().cpu())
    return found


def _width(layer: nn.Module, wanted: int) -> int:
    shape: Any = layer
    return min(wanted, shape.in_features, shape.out_features)


def _directions(layer: nn.Module, width: int, seed: int, module: str) -> Tensor:
    there: Any = layer
    drawn = torch.randn(there.in_features, width, generator=torch_generator(seed, "weight-gradient", module))
    return drawn.to(next(layer.parameters()).device)


def _pass(
    model: PeftModel,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    autocast: Any,
    product: Callable[[str, Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """``product`` of inputs ``(N, n)`` and output gradients ``(N, m)`` of every module, added up over the batches."""
    sums: dict[str, Tensor] = {}

    def take(module: str, x: Tensor, dy: Tensor) -> None:
        part = product(module, x.flatten(0, -2).float(), dy.flatten(0, -2).float())
        sums[module] = sums[module] + part if module in sums else part

    tokens = sum(int(b.num_label_tokens.sum()) for b in batches)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with _tapped(layers, take), torch.enable_grad():
            for batch in batches:
                with autocast():
                    loss = -token_logps(model, batch)[0].sum() / tokens
                loss.backward()
    finally:
        for module, training in modes:
            module.training = training
        model.zero_grad(set_to_none=True)
    return sums


@contextmanager
def _tapped(layers: Mapping[str, nn.Module], take: _Take) -> Iterator[None]:
    """Inside, every backward pass brings ``take`` each layer's input and the gradient of its output."""

    def tap(module: str) -> Any:
        def hook(_layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                x: Tensor = args[0].detach()
                output.register_hook(lambda dy: take(module, x, dy.detach()))

        return hook

    handles = [layer.register_forward_hook(tap(module)) for module, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
