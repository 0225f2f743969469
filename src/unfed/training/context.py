"""What an objective sees of one micro-batch: each forward pass is made once and kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unfed.aggregation.lora import lora_pairs
from unfed.base.errors import UnfedError
from unfed.base.types import IGNORE_INDEX, AdapterState, Batch, Split
from unfed.models.adapter import WeightSwap, live_tensors
from unfed.models.forward import (
    LabelledLogits,
    all_logits,
    answer_logps,
    label_logps,
    labelled_logits,
    per_answer,
)
from unfed.models.modules import module_output
from unfed.objectives.base import Counted, Positions
from unfed.objectives.tokens import kl_divergence
from unfed.training.batches import StepTotals
from unfed.training.fisher import Fisher


class Reference:
    """The frozen policy that an objective compares with: cached log-probabilities, weights where needed.

    ``logps`` are computed once for each (split, example) and kept for the life of this object, so a second epoch or
    round costs nothing. The weights are those of an earlier adapter on the same base (:class:`WeightSwap`).
    """

    def __init__(self, model: nn.Module, state: AdapterState, residual: AdapterState | None = None) -> None:
        self._model = model
        self._swap = WeightSwap(model, state, residual)
        self._logps: dict[tuple[Split, str], Tensor] = {}

    @torch.no_grad()
    def prepare(self, split: Split, batches: list[Batch]) -> None:
        """Compute the log-probabilities of every example of ``batches`` that has none yet."""
        new = [b for b in batches if any((split, i) not in self._logps for i in b.example_ids)]
        if not new:
            return
        with self._swap.active():
            for batch in new:
                values = answer_logps(self._model, batch).float().cpu()
                self._logps |= {(split, i): v for i, v in zip(batch.example_ids, values, strict=True)}

    def logps(self, split: Split, batch: Batch) -> Tensor:
        """Cached summed log-likelihoods of the batch's answers, shape ``(B,)``."""
        return torch.stack([self._logps[split, i] for i in batch.example_ids]).to(batch.input_ids.device)

    @torch.no_grad()
    def logits(self, batch: Batch, positions: Positions) -> Tensor:
        """The reference's logits at the labelled positions ``(N, V)``, or at all ``(B, T, V)``."""
        with self._swap.active():
            return (
                labelled_logits(self._model, batch).logits if positions == "answer" else all_logits(self._model, batch)
            )

    @torch.no_grad()
    def hidden(self, batch: Batch, module: str) -> Tensor:
        """The reference's output of ``module``, ``(B, T, H)``."""
        with self._swap.active():
            return module_output(self._model, batch, module)


class Anchor:
    """The round's global weights on the model's device, for a proximal term."""

    def __init__(self, model: nn.Module, state: AdapterState) -> None:
        by_storage = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        for name, tensor in live_tensors(model).items():
            parameter = by_storage.get(tensor.data_ptr())
            if parameter is not None:
                self._pairs.append((parameter, state[name].to(parameter.device, torch.float32, copy=True)))

    def distance_sq(self) -> Tensor:
        """Squared distance of the trainable parameters from the anchor: a differentiable scalar, float32."""
        return torch.stack([(p.float() - a).square().sum() for p, a in self._pairs]).sum()


class Tail:
    """The last rank components of a client's LoRA modules, from ``keep`` to its rank: HetLoRA's candidates for pruning.

    ``keep`` is the share of the rank that stays, rounded down, and 1 at least.
    """

    def __init__(self, model: nn.Module, rank: int, share: float) -> None:
        self.keep = max(1, int(share * rank))
        by_storage = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
        live = live_tensors(model)
        places = [(live[a].data_ptr(), live[b].data_ptr()) for a, b in lora_pairs(live).values()]
        self._pairs = [(by_storage[a], by_storage[b]) for a, b in places if a in by_storage and b in by_storage]
        self._rank = rank
        with torch.no_grad():
            self._before = float(self.norm())

    def norm(self) -> Tensor:
        """See :meth:`unfed.objectives.base.StepContext.tail_norm`; float32."""
        part = slice(self.keep, self._rank)
        norms = [_length(b[:, part]) * _length(a[part]) for a, b in self._pairs]
        return torch.stack(norms).sum()

    def shrank(self) -> bool:
        """Whether it is smaller now than when this object was made, so that the client gives the components up."""
        with torch.no_grad():
            return self.keep < self._rank and float(self.norm()) < self._before


def _length(part: Tensor) -> Tensor:
    return torch.linalg.vector_norm(part.float())


@dataclass(frozen=True)
class Companions:
    """What goes beside the policy in a phase."""

    reference: Reference | None = None
    anchor: Anchor | None = None
    fisher: Fisher | None = None
    tail: Tail | None = None


class ModelContext:
    """:class:`unfed.objectives.base.StepContext` over a transformers or PEFT model."""

    def __init__(
        self, model: nn.Module, batches: Mapping[Split, Batch], totals: StepTotals, driver: Split, beside: Companions
    ) -> None:
        self._model, self._batches, self._totals = model, batches, totals
        self._driver: Split = driver
        self._beside = beside
        self._logits: dict[Split, LabelledLogits] = {}
        self._token_logps: dict[Split, Tensor] = {}

    def _labelled(self, split: Split) -> LabelledLogits:
        if split not in self._logits:
            self._logits[split] = labelled_logits(self._model, self._batches[split])
        return self._logits[split]

    def token_logps(self, split: Split) -> Tensor:
        """See :class:`unfed.objectives.base.StepContext`."""
        if split not in self._token_logps:
            found = self._labelled(split)
            self._token_logps[split] = label_logps(found.logits, found.labels)
        return self._token_logps[split]

    def row(self, split: Split) -> Tensor:
        """See the protocol."""
        return self._labelled(split).rows

    def logps(self, split: Split) -> Tensor:
        """See the protocol."""
        return per_answer(self.token_logps(split), self._batches[split])

    def num_tokens(self, split: Split) -> Tensor:
        """See the protocol."""
        return self._batches[split].num_label_tokens

    def reference_logps(self, split: Split) -> Tensor:
        """See the protocol."""
        return self._reference().logps(split, self._batches[split])

    def token_mean(self, split: Split, values: Tensor) -> Tensor:
        """See the protocol."""
        return values.sum() / max(1, self._totals.tokens[split])

    def example_mean(self, split: Split, values: Tensor) -> Tensor:
        """See the protocol."""
        return values.sum() / max(1, self._totals.examples[split])

    def nll(self, split: Split) -> Tensor:
        """See the protocol."""
        return self.token_mean(split, -self.token_logps(split))

    def kl(self, split: Split, positions: Positions = "answer") -> Tensor:
        """See the protocol."""
        theirs = self.reference_logits(split, positions)
        return kl_divergence(theirs, self.logits(split, positions)).sum() / self.count(split, positions)

    def logits(self, split: Split, positions: Positions = "answer") -> Tensor:
        """See the protocol."""
        if positions == "answer":
            return self._labelled(split).logits
        return all_logits(self._model, self._batches[split])

    def labels(self, split: Split) -> Tensor:
        """See the protocol."""
        if split in self._logits:
            return self._logits[split].labels
        labels = self._batches[split].labels[:, 1:]
        return labels[labels != IGNORE_INDEX]

    def reference_logits(self, split: Split, positions: Positions = "answer") -> Tensor:
        """See the protocol."""
        return self._reference().logits(self._batches[split], positions)

    def count(self, split: Split, counted: Counted) -> int:
        """See the protocol."""
        totals = self._totals
        counts = {"answer": totals.tokens, "all": totals.positions, "examples": totals.examples}[counted]
        return max(1, counts[split])

    def count_after(self, split: Split, skipped: int) -> int:
        """See the protocol."""
        return max(1, sum(max(0, n - skipped) for n in self._totals.lengths[split]))

    def hidden(self, split: Split, module: str) -> Tensor:
        """See the protocol. ``UnfedError`` when no gradient could go back from there."""
        output = module_output(self._model, self._batches[split], module)
        if torch.is_grad_enabled() and not output.requires_grad:
            raise UnfedError(
                f"no gradient reaches the output of {module}: nothing below it is trained, or gradient checkpointing "
                "cuts it off (trainer.args.gradient_checkpointing_kwargs.use_reentrant=false)"
            )
        return output

    def reference_hidden(self, split: Split, module: str) -> Tensor:
        """See the protocol."""
        return self._reference().hidden(self._batches[split], module)

    def label_mask(self, split: Split) -> Tensor:
        """See the protocol."""
        return self._batches[split].labels != IGNORE_INDEX

    def adapter_distance_sq(self) -> Tensor:
        """See the protocol."""
        if self._beside.anchor is None:
            raise UnfedError("a proximal objective was run without the round's global adapter")
        return self._beside.anchor.distance_sq()

    def fisher_distance_sq(self) -> Tensor:
        """See the protocol."""
        if self._beside.fisher is None:
            raise UnfedError("an objective that weighs with the Fisher information was run without one")
        return self._beside.fisher.distance_sq()

    def tail_norm(self) -> Tensor:
        """See the protocol."""
        if self._beside.tail is None:
            raise UnfedError("a pruning objective was run without the client's rank")
        return self._beside.tail.norm()

    def micro_share(self) -> float:
        """See the protocol: by examples of the split that drives the epoch."""
        return len(self._batches[self._driver]) / max(1, self._totals.examples[self._driver])

    def _reference(self) -> Reference:
        if self._beside.reference is None:
            raise UnfedError("an objective that compares with a reference policy was run without one")
        return self._beside.reference
