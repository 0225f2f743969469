"""DP-SGD on LoRA factors: every example's gradient of its own loss, clipped; noise on their sum.

Why not Opacus or ``torch.func``: a LoRA factor is a linear layer without bias, whose gradient for one example is one
product of two matrices that the backward pass has at hand, so that what is needed is shorter than what would wrap it.
Opacus replaces the model, the optimizer and the loader, and adds its hooks to layers that it knows how to copy;
``torch.func.vmap`` runs neither gradient checkpointing nor the fused attention kernels over an axis of examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unfed.aggregation.gaussian import normal
from unfed.aggregation.privacy import ExamplePrivacy
from unfed.base.errors import AdapterError, UnfedError
from unfed.base.types import LossTerms, Split
from unfed.models.adapter import trainable_parameters
from unfed.objectives.base import Counted, Objective, Positions
from unfed.training.context import ModelContext
from unfed.training.gradients import Passes

_FACTORS = ("lora_A", "lora_B")
_AGREEMENT = 0.05
"""Relative distance between the sum of the examples' gradients and the batch's own at which a run stops: far above
what 16-bit rounding does, far below what a use of the weights that no hook sees would do."""


class ExampleContext(ModelContext):
    """A context whose means are sums over examples of each example's own loss.

    A mean over the tokens of a whole step would divide an example's loss by the others' lengths, and no bound on its
    gradient would bound what it changes. Here a mean over tokens is over the example's own, and neither it nor a mean
    over examples is divided by their number: that is the step's business. What an objective can ask for besides
    and is no sum over examples is refused (``UnfedError``).
    """

    def token_mean(self, split: Split, values: Tensor) -> Tensor:
        """The sum over examples of the mean of ``values`` ``(N,)`` over the example's own labelled tokens."""
        rows = self.row(split)
        if values.shape != rows.shape:
            self._refuse("mean over tokens of one value an example")
        counts = self.num_tokens(split).to(values.device).clamp(min=1)
        return (values / counts[rows]).sum()

    def example_mean(self, split: Split, values: Tensor) -> Tensor:
        """The sum of ``values`` ``(B,)``."""
        return values.sum()

    def kl(self, split: Split, positions: Positions = "answer") -> Tensor:
        """Refused."""
        self._refuse("divergence from the reference")

    def count(self, split: Split, counted: Counted) -> int:
        """Refused."""
        self._refuse("division by a count of the whole step")

    def count_after(self, split: Split, skipped: int) -> int:
        """Refused."""
        self._refuse("division by a count of the whole step")

    def hidden(self, split: Split, module: str) -> Tensor:
        """Refused."""
        self._refuse("loss on hidden states")

    def adapter_distance_sq(self) -> Tensor:
        """Refused."""
        self._refuse("penalty on the weights")

    def fisher_distance_sq(self) -> Tensor:
        """Refused."""
        self._refuse("penalty on the weights")

    def micro_share(self) -> float:
        """Refused."""
        self._refuse("share of the step")

    def _refuse(self, what: str) -> NoReturn:
        raise UnfedError(
            f"privacy=example: a {what} is not a sum over examples; take another method, or privacy=central"
        )


class _Tap(torch.autograd.Function):
    """The identity on a factor's output, which on the way back sees the gradient that comes to it.

    The input is saved as autograd saves tensors, so gradient checkpointing drops and recomputes it like any other.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, given: Tensor, weight: nn.Parameter, found: _Found) -> Tensor:
        ctx.save_for_backward(given)
        ctx.weight, ctx.found = weight, found
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (given,) = ctx.saved_tensors
        ctx.found.add(ctx.weight, grads[0], given)
        return grads[0], None, None, None


class _Found:
    """The gradients of one micro-batch, by example: ``(B, out, in)`` in float32 (or wider) for each weight."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.by_weight: dict[nn.Parameter, Tensor] = {}

    def add(self, weight: nn.Parameter, grad: Tensor, given: Tensor) -> None:
        """``sum_t grad[b, t] given[b, t]^T`` of each example ``b``; a factor that is used twice adds up."""
        wide = torch.promote_types(given.dtype, torch.float32)
        one, two = (t.detach().to(wide).flatten(1, -2) for t in (grad, given))
        product = torch.einsum("bto,bti->boi", one, two)
        self.by_weight[weight] = self.by_weight[weight] + product if weight in self.by_weight else product


def factors(model: nn.Module) -> list[nn.Linear]:
    """The LoRA factors that train. ``AdapterError`` for a trainable parameter that is anything else."""
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(f".{part}." in name for part in _FACTORS)
        and module.weight.requires_grad
    ]
    known = {id(layer.weight) for layer in layers}
    others = [n for n, p in trainable_parameters(model).items() if id(p) not in known]
    if others:
        raise AdapterError(
            f"privacy=example: takes the gradient of every example on LoRA factors of linear layers, and {len(others)} "
            f"trainable parameters are something else (the first: {others[0]}); train LoRA without DoRA, biases, "
            "embeddings and modules_to_save, or take privacy=central"
        )
    return layers


def _trains(name: str, layer: nn.Linear) -> bool:
    return layer.weight.requires_grad and any(f".{part}." in name for part in _FACTORS)


@contextmanager
def by_example(layers: Sequence[nn.Linear], size: int) -> Iterator[_Found]:
    """Inside, forward and backward passes over ``size`` examples leave every example's gradient; hooks always go.

    ``UnfedError`` from the forward pass where a factor sees something else than one row an example.
    """
    found = _Found(size)

    def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # the first pass of reentrant checkpointing
            return output
        given = args[0]
        if given.dim() < 3 or given.shape[0] != size:
            raise UnfedError(
                f"privacy=example: a LoRA factor sees an input of shape {tuple(given.shape)} and not one row for each "
                f"of {size} examples, as in the output embedding or in experts; leave it out of "
                "lora_config.target_modules"
            )
        tapped = _Tap.apply(output, given, layer.weight, found)
        assert isinstance(tapped, Tensor)
        return tapped

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(hook).remove)
        yield found


@dataclass
class PrivateGradients:
    """The gradient of a step of DP-SGD (Abadi et al. 2016, Algorithm 1): a :class:`GradientRule`.

    ``(sum_i g_i min(1, clip / ||g_i||) + N(0, (noise_multiplier clip)^2)) / expected``, the length over all factors
    together, ``expected`` the mean number of examples in a Poisson sample, whatever the step's own is. ``done``: steps
    that other calls took; the noise of a step depends on (seed, path, step) alone, unless it is secure. Holds the
    gradients of one micro-batch by example, in float32: as many adapters as it has rows.
    """

    settings: ExamplePrivacy
    layers: Sequence[nn.Linear]
    expected: float
    seed: int
    path: tuple[str | int, ...]
    done: int = 0
    _checked: bool = False

    def __call__(self, objective: Objective, passes: Passes) -> dict[str, Tensor]:
        """See the protocol. The losses are means over the step's examples; an empty sample has none."""
        total = {p: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in passes.parameters}
        sums: dict[str, Tensor] = {}
        count = 0
        for micro in passes.micro:
            (batch,) = micro.values()
            count += len(batch)
            with by_example(self.layers, len(batch)) as found:
                terms = passes.forward(objective, micro)
                passes.backward(terms.total)
            self._take(found, total)
            for name, value in _losses(terms).items():
                sums[name] = sums[name] + value if name in sums else value
        self._noise(total)
        return {name: value / count for name, value in sums.items()}

    @torch.no_grad()
    def _take(self, found: _Found, total: dict[nn.Parameter, Tensor]) -> None:
        """Clip every example's gradient and add it."""
        self._check(found, len(total))
        squares = [g.flatten(1).square().sum(dim=1, dtype=torch.float64) for g in found.by_weight.values()]
        lengths = torch.stack(squares).sum(dim=0).sqrt()
        scale = self.settings.clip / lengths.clamp(min=self.settings.clip)
        for weight, grads in found.by_weight.items():
            total[weight].add_(torch.einsum("b,boi->oi", scale.to(grads.dtype), grads))
        for weight in total:
            weight.grad = None

    def _check(self, found: _Found, wanted: int) -> None:
        """Every factor was used; in the first micro-batch also against autograd: nowhere that no hook sees it."""
        if len(found.by_weight) < wanted:
            raise AdapterError(
                f"{wanted - len(found.by_weight)} of {wanted} LoRA factors received no gradient; the model does not "
                "use them, or gradient checkpointing cuts them off"
            )
        if self._checked:
            return
        self._checked = True
        for weight, grads in found.by_weight.items():
            assert weight.grad is not None
            whole = weight.grad.to(grads.dtype)
            missed, length = float((grads.sum(dim=0) - whole).norm()), float(whole.norm())
            if not missed <= _AGREEMENT * max(length, float(grads.norm())):
                raise UnfedError(
                    "privacy=example: the examples' gradients do not add up to the batch's, so the model uses a "
                    "factor's weights in another way than as a linear layer; take privacy=central"
                )

    @torch.no_grad()
    def _noise(self, total: dict[nn.Parameter, Tensor]) -> None:
        """Noise, the fixed divisor, and the result where an optimizer looks for it."""
        std = self.settings.noise_multiplier * self.settings.clip
        source = self.settings.generator(self.seed, *self.path, "step", self.done)
        self.done += 1
        for weight, value in total.items():
            if std > 0.0:
                value.add_((normal(value.shape, source) * std).to(value.device, value.dtype))
            weight.grad = value.div_(self.expected).to(weight.dtype)


def _losses(terms: LossTerms) -> dict[str, Tensor]:
    return {"loss": terms.total.detach(), **terms.parts}
