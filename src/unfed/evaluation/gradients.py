"""Gradient norms of single answers, for the membership attack that looks at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from unfed.data.chat import EncodedExample
from unfed.data.collate import collate
from unfed.metrics.stats import Array
from unfed.models.adapter import live_tensors
from unfed.models.forward import token_logps


def gradient_norms(
    model: nn.Module, encoded: Sequence[EncodedExample], pad: int, told: Callable[[int], None] | None = None
) -> Array:
    """For each answer the 2-norm of its loss's gradient, averaged over the parameter tensors; shape ``(n,)``.

    The loss is the mean over all labelled tokens but the last; an answer with fewer than two has NaN. The tensors are
    the adapter's, or all of a model without one; the model stays in the mode it is in. One answer at a time: a mean
    over a batch would mix them.
    """
    places = {t.data_ptr() for t in live_tensors(model).values()}
    tensors = [p for p in model.parameters() if p.data_ptr() in places]
    asked = [t.requires_grad for t in tensors]
    device = next(model.parameters()).device
    norms = np.full(len(encoded), np.nan)
    kept = [t.grad for t in tensors]
    found: list[torch.Tensor] = []

    def take(tensor: torch.Tensor) -> None:
        assert tensor.grad is not None
        found.append(tensor.grad.float().norm())
        tensor.grad = None  # at once, so that the gradients of a whole model never lie side by side

    handles = []
    try:
        for t in tensors:
            t.grad = None
            t.requires_grad_(True)
            handles.append(t.register_post_accumulate_grad_hook(take))
        for i, example in enumerate(encoded):
            with torch.enable_grad():
                logps, _ = token_logps(model, collate([example], pad).to(device))
                if len(logps) > 1:
                    found.clear()
                    torch.autograd.backward(-logps[:-1].mean(), inputs=tensors)
                    norms[i] = float(torch.stack(found).mean())
            if told is not None:
                told(i + 1)
    finally:
        for handle in handles:
            handle.remove()
        for t, given, grad in zip(tensors, asked, kept, strict=True):
            t.requires_grad_(given)
            t.grad = grad
    return norms
