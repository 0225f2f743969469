"""Linear layers by oneDNN, where torch's own choice leaves half of a CPU unused.

On the CPU torch multiplies float32 matrices with MKL, which does not do its best on processors of other makers than
Intel: on one thread of an AMD EPYC with AVX-512 it reaches 100 GFLOP/s, and oneDNN, which comes with torch too, 180 to
240 from 54 rows on (weights of 110 thousand to 2 million values).
The precision is float32 as before; sums are added up in another order, as they are between batch sizes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 8
"""Fewer rows than these gain little or nothing."""

VALUES = 1 << 16
"""Nor do weights of fewer values, whose product takes less time than choosing a kernel."""

_Linear = Callable[..., Tensor]


def _pointwise() -> _Linear | None:
    """The linear layer of oneDNN that torch's compiler calls, too: on dense tensors, so that nothing is copied."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc) and the layers run in oneDNN.

    oneDNN keeps small blocks for every new number of rows; they come to lie between the large ones that held logits,
    and without this a long pass over rows of many lengths grows by hundreds of MiB. Takes milliseconds.
    """
    trim = _trim()
    if trim is not None and _pointwise() is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no such handle on this system
        return None


def _by_onednn(layer: nn.Linear, usual: _Linear, kernel: _Linear) -> _Linear:
    def forward(x: Tensor) -> Tensor:
        weight, bias = layer.weight, layer.bias
        if x.numel() < ROWS * weight.shape[1] or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
            return usual(x)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            # The kernel above knows no backward pass, and the layout that has one is reached by copies.
            return F.linear(x.to_mkldnn(), weight, bias).to_dense()
        return kernel(x, weight, bias, "none", [], "")

    return forward


def _gains(layer: nn.Linear) -> bool:
    weight = layer.weight
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.is_contiguous()
    return plain and weight.numel() >= VALUES and "forward" not in vars(layer)


@contextmanager
def fast_linears(model: nn.Module) -> Iterator[None]:
    """Within the block the float32 linear layers of ``model`` on the CPU run in oneDNN where that is faster.

    Nothing changes for other types, devices and kinds of layers (a class derived from ``nn.Linear`` does more than
    multiply), for fewer than :data:`ROWS` rows, and on processors without AVX-512. Gradients flow as before. Blocks may
    be nested; weights may change within one.
    """
    kernel = _pointwise()
    if kernel is None:
        yield
        return
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and _gains(layer)]
    try:
        for layer in layers:
            layer.forward = _by_onednn(layer, layer.forward, kernel)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
