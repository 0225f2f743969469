"""Learn what is to be forgotten, and subtract it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from unfed.aggregation.adapters.fedit import FedIT
from unfed.aggregation.fedavg import FedAvg
from unfed.base.params import number
from unfed.base.types import AdapterState, ClientUpdate, Combined, ServerState
from unfed.federated.schedule import FitTask, Phase, Schedule, Work
from unfed.objectives.nll import NLL
from unfed.unlearning.base import Demands, Ingredients, Plan, Promise
from unfed.unlearning.local_then_recover import recovery
from unfed.unlearning.negation import multiplied
from unfed.unlearning.on_top import OnTop


@dataclass(frozen=True)
class Negate:
    """The server takes the mean of the targets' adapters with ``-scale`` times its update."""

    scale: float
    scaling: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """See :class:`unfed.federated.schedule.PhaseRule`."""
        return "negate"

    def advance(
        self, task: FitTask, state: ServerState, updates: Iterator[ClientUpdate]
    ) -> tuple[Combined, AdapterState]:
        """See :class:`unfed.federated.schedule.PhaseRule`."""
        del state
        combined = FedAvg(adapters=FedIT(scaling=self.scaling or 1.0)).combine(updates, len(task.phase.work))
        return combined, multiplied(combined.adapter, -self.scale)


@dataclass(frozen=True)
class TaskArithmetic(OnTop):
    """The targets learn their forget rows in a second adapter, and the server turns its sign.

    Forgetting via negation (Ilharco et al., ICLR 2023, arXiv 2212.04089): ``W - scale * tau_f``, where the task vector
    ``tau_f`` is what fine-tuning on the forget rows changes. Here ``tau_f = s2 B2 A2`` of a fresh adapter on the frozen
    learned one, trained with the plain loss for ``unlearn_epochs``; ``B2 <- -scale B2`` gives ``W - scale * tau_f``,
    nothing is truncated. Then ``global_rounds`` of recovery, which train the second adapter further.

    Of LoRA one factor turns, as in Zhang et al. 2023 (arXiv 2306.14870).

    ``scale``: the paper takes the largest value up to 1 that held-out rows of a control task allow; 1 is the negated
    task vector itself, the end of that range, and the recovery rounds answer for what it costs. Departures: a low-rank
    task vector; recovery is not in the paper; several targets: ``tau_f`` is the update of their averaged factors (the
    round's aggregation error says how far that is from the mean of their updates).
    """

    scale: float = number(1.0, above=0)
    title: ClassVar[str] = "task_arithmetic"
    demands: ClassVar[Demands] = Demands(lora=True, second_adapter=True, factors=True)
    promise: ClassVar[Promise] = Promise(
        "approximate",
        "what learning the forget rows once more would change is subtracted; the learned adapter lies unchanged "
        "beneath and is to be deleted before the result may count as forgetting",
    )

    @property
    def rounds_before(self) -> int:
        """See :class:`Recipe`."""
        return 1

    def plan(self, given: Ingredients) -> Plan:
        """See :meth:`Recipe.plan`."""
        work = {c: Work("forget", NLL("forget"), given.unlearn_epochs) for c in given.targets}
        learn = Phase("learn and negate", 1, work, rule=Negate(self.scale, given.scaling), always=given.targets)
        return Plan(Schedule((learn, *recovery(given))))
