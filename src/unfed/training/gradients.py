"""How the gradient of one optimizer step is made from its micro-batches, where one backward pass is not enough.

A rule leaves the gradient in the parameters' ``grad`` and returns the step's losses. The loop clips what it finds there
and steps. Rules hold what they carry from step to step, so there is a new one for every client and round; beside the
gradients each keeps one further set of tensors of the trained weights' size at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from unfed.base.errors import UnfedError
from unfed.base.types import Batch, LossTerms, Split
from unfed.objectives.base import Objective
from unfed.objectives.gru import GRU
from unfed.objectives.pdu import PDU, with_dual
from unfed.objectives.sam import SAM
from unfed.objectives.wrapper import forget_alone, layers

Micro = Mapping[Split, Batch]


@dataclass(frozen=True)
class Passes:
    """One optimizer step, as a rule sees it.

    ``forward`` gives an objective's losses on a micro-batch, under the loop's precision; ``backward`` adds a loss's
    gradient to the parameters' ``grad``.
    """

    micro: Sequence[Micro]
    forward: Callable[[Objective, Micro], LossTerms]
    backward: Callable[[Tensor], None]
    parameters: Sequence[nn.Parameter]


class GradientRule(Protocol):
    """Makes a step's gradient."""

    def __call__(self, objective: Objective, passes: Passes) -> dict[str, Tensor]:
        """Leave the gradient in ``grad``; return ``loss`` and its parts, added up over the micro-batches."""
        ...


def gradient_rule(objective: Objective, before: int = 0, per_epoch: int = 1) -> GradientRule:
    """The rule that an objective and what is around it ask for.

    ``before``: optimizer steps of the same run over the rows that other calls have taken; ``per_epoch``: of an epoch.
    """
    rule: GradientRule = plain
    for part in layers(objective):
        if isinstance(part, SAM):
            rule = SharpnessAware(part.rho)
        elif isinstance(part, GRU):
            rule = Rectified(part.gamma)
        elif isinstance(part, PDU) and part.held:  # without its constraint there is no multiplier to move
            rule = PrimalDual(rule, part, before, per_epoch)
    return rule


def plain(objective: Objective, passes: Passes) -> dict[str, Tensor]:
    """The gradient of the total."""
    sums: dict[str, Tensor] = {}
    for micro in passes.micro:
        terms = passes.forward(objective, micro)
        passes.backward(terms.total)
        _add(sums, terms)
    return sums


class SharpnessAware:
    """See :class:`unfed.objectives.sam.SAM`.

    Three passes over the micro-batches: the forget term at the weights gives the perturbation, the forget term at the
    perturbed weights and the rest at the weights give the gradient. Losses are those at the weights. As in the authors'
    code each pass draws its own dropout masks.
    """

    def __init__(self, rho: float) -> None:
        self._rho = rho

    def __call__(self, objective: Objective, passes: Passes) -> dict[str, Tensor]:
        """See the protocol."""
        alone = forget_alone(objective)
        sums, terms = _forget_pass(alone, passes)
        kept = [p.detach().clone() for p in passes.parameters]
        _climb(passes.parameters, self._rho)
        try:
            _forget_pass(alone, passes)
        finally:
            with torch.no_grad():
                for parameter, value in zip(passes.parameters, kept, strict=True):
                    parameter.copy_(value)
        if terms == {"forget"} and objective.needs == alone.needs:
            return sums
        return _rest_pass(objective, passes)


def _forget_pass(alone: Objective, passes: Passes) -> tuple[dict[str, Tensor], set[str]]:
    """Add the gradient of the term ``forget``; the losses, and the names of all terms there are."""
    sums: dict[str, Tensor] = {}
    names: set[str] = set()
    for micro in passes.micro:
        terms = passes.forward(alone, micro)
        passes.backward(_term(terms, "forget", alone))
        names |= set(terms.terms)
        _add(sums, terms)
    return sums, names


def _rest_pass(objective: Objective, passes: Passes) -> dict[str, Tensor]:
    """Add the gradient of all terms but ``forget``."""
    sums: dict[str, Tensor] = {}
    for micro in passes.micro:
        terms = passes.forward(objective, micro)
        others = [value for name, value in terms.terms.items() if name != "forget"]
        if others:
            passes.backward(torch.stack(others).sum())
        _add(sums, terms)
    return sums


@torch.no_grad()
def _climb(parameters: Sequence[nn.Parameter], rho: float) -> None:
    """Move the weights by ``rho`` along the gradient, and clear it."""
    with_grad = [p for p in parameters if p.grad is not None]
    norm = torch.stack([_dot(p.grad, p.grad) for p in with_grad if p.grad is not None]).sum().sqrt()
    scale = torch.where(norm > 0, rho / norm, torch.zeros_like(norm))
    for parameter in with_grad:
        assert parameter.grad is not None
        parameter.add_((parameter.grad * scale).to(parameter.dtype))
        parameter.grad = None


class Rectified:
    """See :class:`unfed.objectives.gru.GRU`. All terms but ``retain`` are what is rectified, FedProx's among them."""

    def __init__(self, gamma: float) -> None:
        self._gamma = gamma
        self._retain: list[Tensor | None] = []

    def __call__(self, objective: Objective, passes: Passes) -> dict[str, Tensor]:
        """See the protocol."""
        if not self._retain:
            self._retain = [None] * len(passes.parameters)
        for average in self._retain:
            if average is not None:
                average.mul_(1.0 - self._gamma)
        sums: dict[str, Tensor] = {}
        for micro in passes.micro:
            terms = passes.forward(objective, micro)
            retain = _term(terms, "retain", objective)
            others = [value for name, value in terms.terms.items() if name != "retain"]
            self._to_average(passes, retain)
            passes.backward(torch.stack(others).sum())
            _add(sums, terms)
        self._rectify(passes.parameters)
        return sums

    def _to_average(self, passes: Passes, retain: Tensor) -> None:
        """Let the backward pass add to the average in place: a buffer of its own would be a second set."""
        forget = [p.grad for p in passes.parameters]
        for parameter, average in zip(passes.parameters, self._retain, strict=True):
            parameter.grad = average
        passes.backward(self._gamma * retain)
        self._retain = [p.grad for p in passes.parameters]
        for parameter, grad in zip(passes.parameters, forget, strict=True):
            parameter.grad = grad

    @torch.no_grad()
    def _rectify(self, parameters: Sequence[nn.Parameter]) -> None:
        pairs = [
            (p.grad, r) for p, r in zip(parameters, self._retain, strict=True) if p.grad is not None and r is not None
        ]
        if not pairs:
            return
        product = torch.stack([_dot(g, r) for g, r in pairs]).sum()
        square = torch.stack([_dot(r, r) for _, r in pairs]).sum()
        share = torch.where(square > 0, product.clamp(max=0.0) / square, torch.zeros_like(square))
        for grad, retain in pairs:
            grad.sub_((retain * share).to(grad.dtype))


class PrimalDual:
    """See :class:`unfed.objectives.pdu.PDU`; ``inner`` makes the gradient, with the present multiplier."""

    def __init__(self, inner: GradientRule, method: PDU, before: int, per_epoch: int) -> None:
        self._inner, self._method, self._done, self._per_epoch = inner, method, before, per_epoch
        self._dual = float(method.alpha)
        self._epoch: list[float] = []

    def __call__(self, objective: Objective, passes: Passes) -> dict[str, Tensor]:
        """See the protocol. ``dual`` among the losses is the multiplier that the step was made with."""
        sums = self._inner(with_dual(objective, self._dual), passes)
        sums["dual"] = sums["loss"].new_tensor(self._dual)
        self._observe(float(sums["retain"]))
        return sums

    def _observe(self, retain: float) -> None:
        epoch = self._done // self._per_epoch
        self._done += 1
        if self._method.dual_update_upon == "step":
            if epoch >= self._method.dual_warmup_epochs:
                self._update(retain)
            return
        self._epoch.append(retain)
        if self._done % self._per_epoch == 0:
            if epoch + 1 >= self._method.dual_warmup_epochs:
                self._update(sum(self._epoch) / len(self._epoch))
            self._epoch.clear()

    def _update(self, retain: float) -> None:
        over = retain - self._method.retain_loss_eps
        self._dual = max(0.0, self._dual + self._method.dual_step_size * over)


def _dot(one: Tensor | None, two: Tensor | None) -> Tensor:
    assert one is not None
    assert two is not None
    wide = torch.promote_types(one.dtype, torch.float32)
    return (one.to(wide) * two.to(wide)).sum(dtype=torch.float64)


def _term(terms: LossTerms, name: str, objective: Objective) -> Tensor:
    if name not in terms.terms:
        raise UnfedError(f"{objective.name} does not tell its {name} term from the others; leave wrapper out")
    return terms.terms[name]


def _add(sums: dict[str, Tensor], terms: LossTerms) -> None:
    for name, value in {"loss": terms.total.detach(), **terms.parts}.items():
        sums[name] = sums[name] + value if name in sums else value
