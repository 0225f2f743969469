"""The types that every floor speaks: adapters, batches, updates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from unfed.base.state import AdapterState

IGNORE_INDEX = -100
"""Label of a position that carries no loss (the convention of torch and transformers)."""

SERVER = "server"
"""The client id of the server itself, where it trains on rows of its own (FLTrust)."""

Split = Literal["train", "forget", "retain", "alternate", "proxy"]
"""What a batch is for. ``train`` is plain (or recovery) training; ``alternate`` pairs each forget
question with another answer (a refusal, say); ``proxy`` are rows away from the forget topic, to distil on."""


@dataclass(frozen=True)
class Batch:
    """One padded batch of token ids.

    ``input_ids``, ``attention_mask`` and ``labels`` have shape ``(B, T)`` (int64); a label of
    ``IGNORE_INDEX`` carries no loss. ``labels[b, t]`` is the token *at* ``t`` (the shift happens in the
    forward pass, as in transformers). ``example_ids`` has length ``B``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    example_ids: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), self.example_ids
        )

    @property
    def num_label_tokens(self) -> Tensor:
        """Labelled tokens that have a prediction, shape ``(B,)``: the first position has none."""
        return (self.labels[:, 1:] != IGNORE_INDEX).sum(dim=1)


@dataclass(frozen=True)
class SharedBatch:
    """Rows of one prompt each, followed by several answers to it as a tree: equal beginnings stand there once.

    ``input_ids``, ``position_ids`` (an answer counts on from its prompt) and ``ends`` have shape ``(B, T)``, int64.
    The tree's nodes stand in depth-first order, so what goes on from the token at ``j`` are the positions below
    ``ends[j]``: a position ``i >= j`` sees ``j`` where ``i < ends[j]``. ``predictors`` and ``labels`` ``(N,)``: the
    flat position that predicts each labelled token, and the token; by row, then answer, then position.
    """

    input_ids: Tensor
    position_ids: Tensor
    ends: Tensor
    predictors: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> SharedBatch:
        """The same batch on another device."""
        moved = (self.input_ids, self.position_ids, self.ends, self.predictors, self.labels)
        return SharedBatch(*(t.to(device) for t in moved))


@dataclass(frozen=True)
class LossTerms:
    """A micro-batch's contribution to the loss of one optimizer step.

    ``total`` is differentiable; over the micro-batches of a step the totals *add up* to the step's loss
    (each is already divided by the step's own token or example counts). ``parts`` are detached scalars
    for the log (``forget``, ``retain``, ``proximal``), and add up in the same way. ``terms`` are the summands of
    ``total`` with their weights, differentiable, where an objective can tell them apart: a wrapper that treats the
    gradients of ``forget`` and ``retain`` differently asks for them.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    terms: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Broadcast:
    """What the server sends to the clients of one round.

    ``adapter`` is what a client starts from, unless ``own`` holds another for it (one of its own rank). ``residual``
    are LoRA factors of scaling 1 that act beneath the adapter and do not train. ``frozen`` names tensors that are held
    fixed this round and do not travel back; ``local`` names tensors that train and stay at their client from round to
    round, never travelling (where ``adapter`` has them, it says their shape, and what a client begins with). ``known``
    names tensors that the clients have from before the first round, and that are not sent again.
    ``control``: the server's control variate of the tensors that train (SCAFFOLD's c); it travels as well.
    """

    adapter: AdapterState
    residual: AdapterState | None = None
    frozen: frozenset[str] = frozenset()
    local: frozenset[str] = frozenset()
    own: Mapping[str, AdapterState] = field(default_factory=dict)
    known: frozenset[str] = frozenset()
    control: AdapterState | None = None

    @property
    def stay(self) -> frozenset[str]:
        """Tensors that do not come back: held fixed, or kept by the client."""
        return self.frozen | self.local

    def start(self, client_id: str) -> AdapterState:
        """The adapter that a client begins with."""
        return self.own.get(client_id, self.adapter)

    def returned(self, client_id: str) -> AdapterState:
        """The tensors of :meth:`start` that come back: names, shapes and dtypes of a proper update."""
        return self.start(client_id).without(self.stay)

    def nbytes(self, client_ids: Iterable[str]) -> int:
        """Bytes that reach the clients, uncompressed."""
        fixed = sum(s.nbytes for s in (self.residual, self.control) if s is not None)
        return sum(self.start(c).without(self.local | self.known).nbytes + fixed for c in client_ids)


@dataclass(frozen=True)
class ClientUpdate:
    """What a client returns for one round: its adapter (not a difference), and how much it trained on.

    ``nbytes``: what travelled of it, where that is not the tensors as they are (``None``); ``nbytes_down``: likewise,
    of all that the client was sent. ``control``: by how much the client's control variate changed (SCAFFOLD), which
    travels beside the adapter, as it is.
    """

    client_id: str
    adapter: AdapterState
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    nbytes: int | None = None
    control: AdapterState | None = None
    nbytes_down: int | None = None

    @property
    def sent(self) -> int:
        """Bytes that travelled."""
        own = self.adapter.nbytes if self.nbytes is None else self.nbytes
        return own + (self.control.nbytes if self.control is not None else 0)


@dataclass(frozen=True)
class ClientFailure:
    """A client that returned nothing usable this round, and why, in words."""

    client_id: str
    reason: str


@dataclass(frozen=True)
class Combined:
    """The clients' updates of one round, averaged.

    ``aggregation_error`` is the relative Frobenius distance between the averaged effective update and the
    product of the averaged factors (``None`` without LoRA factors); ``error_is_estimate`` says that it was
    sketched rather than computed. ``base_residual``: what rules that also change the base model put beneath the adapter
    from now on (``None``: nothing new). ``slots``: what a filter or the noise will want to know next round. ``notes``:
    what each filter did, by its name: a number for each client, or for a quantity of the round.
    ``control``: the mean change of the clients' control variates. ``population``: how many clients the phase has.
    """

    adapter: AdapterState
    num_examples: int
    client_ids: tuple[str, ...]
    aggregation_error: float | None = None
    error_is_estimate: bool = False
    base_residual: AdapterState | None = None
    slots: Mapping[str, AdapterState] = field(default_factory=dict)
    notes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    control: AdapterState | None = None
    population: int | None = None


OptState = Mapping[str, AdapterState]
"""A server's memory by name: the optimizer's slots (``m``, ``v``), and those of filters, whose names have a dot
(``clip.bound``); empty for plain averaging."""


@dataclass(frozen=True)
class ServerState:
    """All that a resumed run needs after ``round`` finished rounds (counted over the whole schedule)."""

    round: int
    adapter: AdapterState
    opt_state: OptState = field(default_factory=dict)
    base_residual: AdapterState | None = None

    def digest(self) -> str:
        """Of what the clients get: the adapter's, with the residual's beneath it where there is one."""
        if self.base_residual is None:
            return self.adapter.digest()
        both = f"{self.adapter.digest()}+{self.base_residual.digest()}"
        return "sha256:" + hashlib.sha256(both.encode()).hexdigest()


Example = Mapping[str, Any]
"""One data row: ``id``, ``question``, ``answer``, and what else its file holds."""
