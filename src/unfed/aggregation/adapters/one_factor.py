"""Rules that train one of the two factors at a time, so that averaging it is exact: FFA-LoRA and RoLoRA.

With A the same at every client, ``sum p_k B_k A = (sum p_k B_k) A``; with B the same, likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from unfed.aggregation.adapters.fedit import FedIT
from unfed.aggregation.lora import lora_pairs
from unfed.base.types import AdapterState, Broadcast, ServerState


def factor_names(adapter: AdapterState, factor: int) -> frozenset[str]:
    """Names of every module's A (``factor`` 0) or B (1)."""
    return frozenset(pair[factor] for pair in lora_pairs(adapter).values())


@dataclass(frozen=True)
class _OneFactor(FedIT):
    exact: ClassVar[bool] = True
    unequal_ranks: ClassVar[bool] = False
    equal_because: ClassVar[str] = "it is exact because the factor that is held is the same, whole, at every client"

    def held(self, round_: int) -> int:
        """The factor that is held in a round: 0 for A, 1 for B."""
        raise NotImplementedError

    def broadcast(self, state: ServerState, client_ids: Sequence[str]) -> Broadcast:
        """Both factors travel down, the one that is trained travels back."""
        del client_ids
        return Broadcast(state.adapter, state.base_residual, factor_names(state.adapter, self.held(state.round)))


@dataclass(frozen=True)
class FFALoRA(_OneFactor):
    """A stays as it was initialised, B trains (Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated
    Learning", arXiv 2403.12313). An adapter that is gone on with keeps the A that it came with.

    Departure: A travels down in every round (a client needs it once).
    """

    title: ClassVar[str] = "ffa"

    def held(self, round_: int) -> int:
        """Always A."""
        del round_
        return 0


@dataclass(frozen=True)
class RoLoRA(_OneFactor):
    """Rounds take turns: B trains with A held in even rounds (from 0), A with B held in odd ones (Chen et al. 2025,
    "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", arXiv 2502.01755).

    Departure: the paper alternates on a fresh adapter, whose B is zero, so B comes first here as well.
    """

    title: ClassVar[str] = "rolora"

    def held(self, round_: int) -> int:
        """A in even rounds, B in odd ones."""
        return round_ % 2
