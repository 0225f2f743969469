"""Representation misdirection: hidden states of the forget set are steered to a random direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unfed.base.params import choice, number, pattern, patterns
from unfed.base.seeding import torch_generator
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, Parity, RetainLoss, Scope, StepContext
from unfed.objectives.retain import WithRetain


def activation_loss(states: Tensor, target: Tensor, mask: Tensor, parity: Parity | None = None) -> Tensor:
    """Mean squared distance of hidden states from ``target``, of each example: ``(B,)``, at least float32.

    ``states`` ``(B, T, H)``, ``target`` broadcast to it, ``mask`` ``(B, T)``: the tokens that count. The mean is taken
    over the hidden dimension, as in the authors' code (Li et al. 2024 write the squared norm, which is ``H`` times
    that), and over the example's own tokens; an example without any counts 0.

    ``parity="openunlearning"`` returns values whose mean over the batch is what OpenUnlearning computes: there each
    example's sum over tokens is multiplied by the batch's mean of ``1 / tokens`` instead of its own.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    squares = (states.to(wide) - target.to(wide)).square().mean(dim=-1)
    sums = squares.masked_fill(~mask, 0.0).sum(dim=1)
    inverse = 1.0 / mask.sum(dim=1).clamp(min=1).to(wide)
    return sums * (inverse.mean() if parity == "openunlearning" else inverse)


def steering_vector(size: int, coefficient: float, seed: int) -> Tensor:
    """A direction with entries uniform in [0, 1), scaled to length ``coefficient``: ``(size,)``, float32, on the CPU.

    It depends on its arguments alone: every client, round and resumed run steers to the same point.
    """
    direction = torch.rand(size, generator=torch_generator(seed, "steering"))
    return direction / direction.norm() * coefficient


@dataclass(frozen=True)
class RMU(WithRetain):
    """``gamma * forget + alpha * retain`` on one module's output (Li et al. 2024, "The WMDP Benchmark: Measuring and
    Reducing Malicious Use With Unlearning", section 4).

    ``forget``: the mean squared distance of the forget answers' hidden states from the steering vector; ``retain``
    (``EMBED_DIFF``): that of the retain answers' from the reference's. Both are means over an example's labelled
    tokens, then over examples (:func:`activation_loss`, also for the two departures). ``NLL`` and ``KL`` are the other
    methods' retain losses. Names and defaults are OpenUnlearning's; the paper has ``steering_coeff`` 6.5 and ``alpha``
    1200 for a 7B model, and trains the ``mlp.down_proj`` of layers 5 to 7.

    ``seed`` is the run's. ``control_vec`` replaces the vector drawn from it, length included.
    """

    module_regex: str = pattern(r"model\.layers\.7")
    trainable_params_regex: Sequence[str] = patterns((".*",))
    steering_coeff: float = number(2.0, above=0)
    retain_loss_type: RetainLoss = choice("EMBED_DIFF", ("EMBED_DIFF", "NLL", "KL"))
    seed: int = 0
    control_vec: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.trainable_params_regex
        object.__setattr__(self, "trainable_params_regex", (given,) if isinstance(given, str) else tuple(given))

    @property
    def needs(self) -> Needs:
        """Batches of ``forget``, of ``retain`` unless ``alpha`` is 0, and the reference's hidden states for it."""
        close = self.alpha == 0 or self.retain_loss_type == "EMBED_DIFF"
        plain = self._needs(reference=False)
        scope = Scope(self.module_regex, tuple(self.trainable_params_regex), only_below=close)
        return replace(plain, scope=scope, reference_distribution=self.alpha != 0 and self.retain_loss_type != "NLL")

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        states = ctx.hidden("forget", self.module_regex)
        target = self.vector(states.shape[-1]).to(states.device)
        losses = activation_loss(states, target, ctx.label_mask("forget"), self.parity)
        return self._total(ctx, ctx.example_mean("forget", losses))

    def vector(self, size: int) -> Tensor:
        """What the forget answers' hidden states are steered to, ``(size,)``."""
        if self.control_vec is None:
            return steering_vector(size, self.steering_coeff, self.seed)
        return torch.tensor(self.control_vec, dtype=torch.float32)

    def _retain(self, ctx: StepContext) -> Tensor:
        if self.retain_loss_type != "EMBED_DIFF":
            return super()._retain(ctx)
        states = ctx.hidden("retain", self.module_regex)
        target = ctx.reference_hidden("retain", self.module_regex)
        return ctx.example_mean("retain", activation_loss(states, target, ctx.label_mask("retain"), self.parity))
