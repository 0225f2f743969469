"""Unlearning in an adapter of its own, which can be taken off again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from unfed.base.params import choice
from unfed.federated.schedule import Phase, Schedule, Work
from unfed.unlearning.base import Demands, Ingredients, Plan, Promise, Situation
from unfed.unlearning.local_then_recover import recovery
from unfed.unlearning.on_top import OnTop


@dataclass(frozen=True)
class UnlearningAdapter(OnTop):
    """The learned adapter stays frozen; a second one on top of it unlearns.

    After FUSED (Zhong et al., CVPR 2025, arXiv 2502.20709): the model ``W + s1 B1 A1`` is frozen, and FedAvg trains
    ``s2 B2 A2`` beside it on the rows that remain, so that their knowledge overwrites the other. Without the second
    adapter the old model is back, bit for bit. With ``forget=method`` the targets first unlearn in the second adapter
    with the run's method for ``unlearn_epochs`` (adopted as in ``local_then_recover``); ``forget=none`` is overwriting
    alone.

    Departures: FUSED picks layers by how far the clients' weights moved from the server's during training, averaged
    over clients; ``layers`` as a share ranks them by ``||s1 B1 A1||`` of the learned adapter, which is at hand.
    ``forget=method`` is not in the paper. FUSED's adapters are sparse; these are LoRA.
    """

    forget: Literal["method", "none"] = choice("method", ("method", "none"))
    title: ClassVar[str] = "unlearning_adapter"
    demands: ClassVar[Demands] = Demands(method=True, lora=True, second_adapter=True, factors=True)
    promise: ClassVar[Promise] = Promise(
        "approximate",
        "the second adapter lowers what the model says of the forget rows; the learned one lies unchanged beneath it "
        "and is to be deleted before the result may count as forgetting",
    )

    @property
    def rounds_before(self) -> int:
        """See :class:`Recipe`."""
        return int(self.forget == "method")

    def problems(self, situation: Situation) -> list[str]:
        """Overwriting needs somebody who trains."""
        if self.forget == "none" and not situation.retainers:
            return ["recipe.forget=none: no client has rows to keep, so nobody would train; use recipe.forget=method"]
        return []

    def plan(self, given: Ingredients) -> Plan:
        """See :meth:`Recipe.plan`."""
        if self.forget == "none":
            return Plan(Schedule((Phase("overwrite", given.global_rounds, given.retain_work()),)))
        work = {c: Work("forget", given.forget, given.unlearn_epochs) for c in given.targets}
        unlearn = Phase("unlearn", 1, work, rule="adopt", always=given.targets)
        return Plan(Schedule((unlearn, *recovery(given))))
