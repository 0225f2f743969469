"""Forward passes that run the language-model head only where a token carries a label.

With a vocabulary of 50k to 128k the logits of a whole batch are the largest tensor of a training or scoring
step, and prompts carry no loss. The head's *input* is therefore cut to the labelled positions by a pre-hook
that lives for one forward pass. What an architecture does after its head (soft-capping, scaling) acts on the
cut logits as it would on all of them, and a head that is itself a LoRA layer is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unfed.base.types import IGNORE_INDEX, Batch, SharedBatch

_CHUNK_VALUES = 1 << 23
"""Logits handled at once in float32 while a log-probability is computed: 32 MiB."""


@dataclass(frozen=True)
class LabelledLogits:
    """Logits at the labelled positions of a batch, in the batch's order.

    ``logits`` has shape ``(N, V)`` in the model's dtype; ``labels`` and ``rows`` have shape ``(N,)``:
    the token to be predicted and the index of its answer within the batch. ``N`` counts the labels of
    ``labels[:, 1:]`` that are not ``IGNORE_INDEX``; the prediction stands one position earlier.
    """

    logits: Tensor
    labels: Tensor
    rows: Tensor


def label_mask(batch: Batch) -> Tensor:
    """Positions that predict a label, shape ``(B, T)``, bool: ``t`` is set when ``labels[:, t + 1]`` counts."""
    mask = torch.zeros_like(batch.labels, dtype=torch.bool)
    mask[:, :-1] = batch.labels[:, 1:] != IGNORE_INDEX
    return mask


def causal_lm(model: nn.Module) -> Any:
    """The transformers model under DistributedDataParallel, torch.compile and PEFT."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod  # noqa: SLF001  torch.compile has no public way back
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner


@contextmanager
def head_input(model: nn.Module, cut: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the output embedding see ``cut(hidden)`` instead of ``hidden`` ``(B, T, D)``; always undone."""
    head = causal_lm(model).get_output_embeddings()
    if head is None:
        raise TypeError(f"{type(causal_lm(model)).__name__} has no output embedding")
    calls = 0

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        nonlocal calls
        calls += 1
        return (cut(args[0]), *args[1:]), kwargs

    handle = head.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise RuntimeError(f"the head of {type(causal_lm(model)).__name__} ran {calls} times in one forward pass")


def _run(model: nn.Module, batch: Batch, **options: Any) -> Any:
    mask = batch.attention_mask
    if not bool(mask[:, 0].all()):
        # Left padding: positions count from the first real token. Right-padded batches keep the model's
        # own positions, also where a parity mask hides tokens inside the conversation.
        first = mask.to(torch.int64).argmax(dim=1, keepdim=True)
        steps = torch.arange(mask.shape[1], device=mask.device)
        options["position_ids"] = (steps - first).clamp(min=0)
    return model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False, **options)


def run_labelled(model: nn.Module, batch: Batch) -> Any:
    """As :func:`_run`, where only real tokens' outputs matter.

    Under causal attention no token sees the padding on its right, so a right-padded batch needs no mask:
    attention then runs its causal kernel instead of reading a mask of ``T x T`` for each row.
    """
    mask = batch.attention_mask
    if bool(mask[:, 0].all()) and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return model(input_ids=batch.input_ids, attention_mask=None, use_cache=False)
    return _run(model, batch)


def _rows_at(index: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda hidden: hidden.flatten(0, 1).index_select(0, index.to(hidden.device)).unsqueeze(0)


def labelled_logits(model: nn.Module, batch: Batch) -> LabelledLogits:
    """One forward pass whose head runs on the labelled positions only.

    ``model`` is a transformers causal language model or a ``PeftModel`` over one, on the batch's device, in
    either mode and with or without gradient. A ``(B, T, V)`` tensor is never made.
    """
    mask = label_mask(batch)
    index = mask.flatten().nonzero().squeeze(1)
    with head_input(model, _rows_at(index)):
        logits = run_labelled(model, batch).logits.squeeze(0)
    labels = batch.labels[:, 1:][mask[:, :-1]].to(logits.device)
    return LabelledLogits(logits, labels, (index // mask.shape[1]).to(logits.device))


def shared_logits(model: nn.Module, batch: SharedBatch) -> tuple[Tensor, Tensor]:
    """Logits ``(P, V)`` where answers to one prompt share its positions and their beginnings, and each label's row.

    The head runs once at each of the ``P`` distinct positions of ``batch.predictors``; the second tensor, ``(N,)``, is
    the row that predicts each label. The mask is handed to the model as it is, which attention kernels other than
    ``sdpa`` and ``eager``, sliding windows and recurrent layers do not honour: compare with :func:`labelled_logits`
    before relying on it.
    """
    places, which = batch.predictors.unique(return_inverse=True)
    width = batch.ends.shape[1]
    causal = torch.ones((width, width), dtype=torch.bool, device=batch.ends.device).tril()
    queries = torch.arange(width, device=batch.ends.device)[None, None, :, None]
    allowed = causal & (queries < batch.ends[:, None, None, :])
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    mask.masked_fill_(~allowed, torch.finfo(dtype).min)
    with head_input(model, _rows_at(places)):
        out = model(input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False)
    return out.logits.squeeze(0), which


class _LabelLogps(torch.autograd.Function):
    """Log-softmax at the labels in float32, a chunk of rows at a time.

    ``cross_entropy`` on ``logits.float()`` keeps a float32 copy and its log-softmax for the backward pass; this
    keeps the logits as they came and one number for each row.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        picked = labels.unsqueeze(1)
        logps = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
        for part in _chunks(logits):
            # torch's log_softmax is twice as fast as its logsumexp.
            logps[part] = logits[part].float().log_softmax(dim=1).gather(1, picked[part]).squeeze(1)
        norm = logits.gather(1, picked).squeeze(1).float() - logps
        ctx.save_for_backward(logits, labels, norm)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, labels, norm = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for part in _chunks(logits):
            weight = grads[0][part].unsqueeze(1)
            soft = logits[part].float() - norm[part].unsqueeze(1)  # not in place: float() may be the logits
            soft = soft.exp_().mul_(-weight)
            soft.scatter_add_(1, labels[part].unsqueeze(1), weight.to(soft.dtype))
            grad[part] = soft
        return grad, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    size = max(1, _CHUNK_VALUES // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], size):
        yield slice(start, min(start + size, logits.shape[0]))


def label_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, ``(N,)`` float32, from logits ``(N, V)`` of any floating dtype.

    Equal to ``-cross_entropy(logits.float(), labels, reduction="none")`` at a third of its memory;
    differentiable once.
    """
    out = _LabelLogps.apply(logits, labels)
    assert isinstance(out, Tensor)
    return out


def token_logps(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``(N,)`` float32 (nats) of the labelled tokens, and the answer ``(N,)`` of each."""
    found = labelled_logits(model, batch)
    return label_logps(found.logits, found.labels), found.rows


def per_answer(values: Tensor, batch: Batch) -> Tensor:
    """Sum values ``(N,)`` of the labelled tokens by answer: shape ``(B,)``, in a fixed order of addition."""
    mask = label_mask(batch).to(values.device)
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values).sum(dim=1)


def answer_logps(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probability of each answer, ``(B,)`` float32: the sum over its labelled tokens (0 without any)."""
    logps, _ = token_logps(model, batch)
    return per_answer(logps, batch)


def all_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits at every position, ``(B, T, V)``, padding included. Only for comparisons that need all of them."""
    return _run(model, batch).logits


def last_logits(model: nn.Module, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Logits ``(R, V)`` after the last of the tokens ``ids`` ``(R, T)``, whose keys and values go into ``cache``.

    ``mask`` ``(R, S)`` covers the cached columns and the new ones; positions count the tokens that it shows.
    """
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with head_input(model, lambda hidden: hidden[:, -1:]):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return out.logits[:, -1]
