"""What a training objective is, and what it may ask of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from unfed.base.types import LossTerms, Split

RetainLoss = Literal["NLL", "KL", "EMBED_DIFF"]
Parity = Literal["openunlearning"]
Positions = Literal["answer", "all"]
Counted = Literal["answer", "all", "examples"]


@dataclass(frozen=True)
class Scope:
    """Which weights an objective trains, where it does not train all: regular expressions that match whole names.

    ``module`` names the one module whose output the loss is about; ``only_below``: nothing else enters the loss, so
    what comes after that module cannot learn. A weight is trained when one of ``trainable`` matches its own name or
    that of its module (``model.layers.5.mlp.down_proj.weight``, or without ``.weight``); a LoRA factor counts as the
    weight of the module that it adapts.
    """

    module: str
    trainable: tuple[str, ...] = (".*",)
    only_below: bool = False


@dataclass(frozen=True)
class Needs:
    """What has to be at hand before a step: the batches by split, the reference policy's
    log-probabilities of the labelled tokens (``reference``; these can be cached), its whole distribution
    or hidden states at each position (``reference_distribution``; a second forward pass each time), and the weights
    that the round began with (``anchor``). ``fisher_rows``: the Fisher information of so many retain rows where
    unlearning starts (0: none). ``scope``: the weights that the objective is confined to. ``tail``: the share of a
    client's LoRA rank above which components are measured, and given up where they shrink (``None``: none)."""

    splits: frozenset[Split]
    reference: bool = False
    reference_distribution: bool = False
    anchor: bool = False
    scope: Scope | None = None
    fisher_rows: int = 0
    tail: float | None = None


class StepContext(Protocol):
    """One micro-batch of one optimizer step, as an objective sees it.

    ``B`` is the number of examples of the micro-batch's split and ``N`` the number of its labelled tokens
    that have a prediction. A forward pass is made at the first question about a split and kept. Every mean
    divides by the count of the WHOLE optimizer step (all its micro-batches and processes), so that the
    micro-batches' losses add up to the loss of the step however it is cut.
    """

    def token_logps(self, split: Split) -> Tensor:
        """Log-probability of each labelled token, shape ``(N,)``, at least float32, differentiable."""
        ...

    def row(self, split: Split) -> Tensor:
        """The example in ``0..B-1`` that each entry of ``token_logps`` belongs to, ``(N,)``, int64."""
        ...

    def logps(self, split: Split) -> Tensor:
        """Summed log-likelihood of each example's labelled tokens, in nats, shape ``(B,)``."""
        ...

    def num_tokens(self, split: Split) -> Tensor:
        """Labelled tokens of each example, shape ``(B,)``."""
        ...

    def reference_logps(self, split: Split) -> Tensor:
        """As ``logps``, under the frozen reference policy, without gradient. Needs ``Needs.reference``."""
        ...

    def token_mean(self, split: Split, values: Tensor) -> Tensor:
        """``values``, ``(N,)`` or ``(B,)``, summed and divided by the labelled tokens of the whole step's ``split``:
        a scalar."""
        ...

    def example_mean(self, split: Split, values: Tensor) -> Tensor:
        """``values`` ``(B,)`` summed, divided by the examples of the whole step's ``split``: a scalar."""
        ...

    def nll(self, split: Split) -> Tensor:
        """``token_mean(split, -logps(split))``: the cross-entropy as transformers reports it, a scalar."""
        ...

    def kl(self, split: Split, positions: Positions = "answer") -> Tensor:
        """Mean of KL(reference || policy) in nats, a scalar. Needs ``Needs.reference_distribution``.

        ``answer``: over the positions that predict a labelled token, divided by their number in the whole
        step. ``all``: over every position of the padded batch (prompt, padding and the last one too),
        divided by the number of positions of the whole step.
        """
        ...

    def logits(self, split: Split, positions: Positions = "answer") -> Tensor:
        """Logits of the positions that predict a labelled token ``(N, V)``, or of all ``(B, T, V)``, in the model's
        dtype, differentiable."""
        ...

    def labels(self, split: Split) -> Tensor:
        """The labelled tokens that ``logits(split)`` and ``token_logps(split)`` are about, ``(N,)``, int64."""
        ...

    def reference_logits(self, split: Split, positions: Positions = "answer") -> Tensor:
        """As ``logits``, under the frozen reference policy, without gradient. Needs
        ``Needs.reference_distribution``."""
        ...

    def count(self, split: Split, counted: Counted) -> int:
        """How many such positions, or examples, the whole step has (1 at least): what a mean over them divides by."""
        ...

    def count_after(self, split: Split, skipped: int) -> int:
        """Labelled tokens of the whole step without the first ``skipped`` of each example (1 at least)."""
        ...

    def hidden(self, split: Split, module: str) -> Tensor:
        """Output of the one module whose name the regular expression ``module`` matches, shape ``(B, T, H)``.

        Names are the base model's own (``model.layers.7``). Padding's entries have no meaning. Nothing that comes
        after the module's block is computed.
        """
        ...

    def reference_hidden(self, split: Split, module: str) -> Tensor:
        """As ``hidden``, under the frozen reference policy, without gradient. Needs
        ``Needs.reference_distribution``."""
        ...

    def label_mask(self, split: Split) -> Tensor:
        """Positions whose own token is labelled, ``(B, T)``, bool (no shift: ``labels != IGNORE_INDEX``)."""
        ...

    def adapter_distance_sq(self) -> Tensor:
        """Squared Euclidean distance of the trainable parameters from the round's global ones: a scalar."""
        ...

    def fisher_distance_sq(self) -> Tensor:
        """As ``adapter_distance_sq`` from the weights that unlearning starts from, each entry weighted with its Fisher
        information there. Needs ``Needs.fisher_rows``."""
        ...

    def tail_norm(self) -> Tensor:
        """``sum ||B[:, k:]||_F ||A[k:]||_F`` over the LoRA modules, ``k`` the share ``Needs.tail`` of the client's
        rank: a scalar, differentiable. Needs ``Needs.tail``."""
        ...

    def micro_share(self) -> float:
        """The fraction of the optimizer step that this micro-batch is; over a step these add up to 1."""
        ...


class Objective(Protocol):
    """A loss for one micro-batch; implementations are frozen dataclasses of hyperparameters."""

    @property
    def name(self) -> str:
        """The method's published name."""
        ...

    @property
    def needs(self) -> Needs:
        """What the step must have at hand, given these hyperparameters."""
        ...

    def __call__(self, ctx: StepContext) -> LossTerms:
        """The micro-batch's share of the step's loss."""
        ...
