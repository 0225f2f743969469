"""A client in this process: write the adapter into the one model, train, read it back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from unfed.aggregation.adapters.ranks import padded, truncated
from unfed.aggregation.gaussian import clipped, plus_noise
from unfed.aggregation.lora import lora_pairs
from unfed.aggregation.privacy import ExamplePrivacy, LocalPrivacy, Privacy
from unfed.base.errors import UnfedError
from unfed.base.seeding import torch_generator
from unfed.base.types import AdapterState, Broadcast, ClientUpdate, Split
from unfed.data.chat import EncodedExample
from unfed.federated.control import Variate
from unfed.federated.schedule import FitTask, Work
from unfed.federated.store import ClientStore
from unfed.models.adapter import held, restore, snapshot
from unfed.models.residual import put_residual
from unfed.objectives.base import Objective
from unfed.training.batches import BatchPlan, TrainRows
from unfed.training.context import Anchor, Companions, Reference, Tail
from unfed.training.extent import Share
from unfed.training.fisher import Fisher
from unfed.training.loop import Local, LocalTask, StepEvent, TrainResult

OWN = "own"
"""Kind of what a client keeps for itself: tensors of its adapter that never travel."""


@dataclass(frozen=True)
class ClientData:
    """A client's encoded rows by split."""

    client_id: str
    splits: Mapping[Split, Sequence[EncodedExample]]


@dataclass
class Client:
    """Runs the tasks of every client on one model, one after the other.

    ``reference`` is the adapter that the run opened: the frozen policy of NPO and of the KL retain loss, and a recipe's
    teacher, held once for all clients (``None``: the first adapter that a task needs one for).
    ``lr_per_phase``: the learning-rate schedule spans a phase's rounds; else it starts anew in each. ``curves`` keeps
    the loss of every step by phase, one tuple for each fit. ``store``: what clients keep for themselves between rounds.
    ``privacy``: what a client does for it, DP-SGD or noise on what it sends; the rest is the server's.
    """

    local: Local
    data: Mapping[str, ClientData]
    reference: AdapterState | None = None
    lr_per_phase: bool = True
    on_step: Callable[[FitTask, str, StepEvent], None] | None = None
    curves: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)
    store: ClientStore = field(default_factory=ClientStore)
    privacy: Privacy | None = None
    _reference: Reference | None = None
    _fisher: tuple[str, Fisher] | None = None
    _locals: dict[str, Local] = field(default_factory=dict)

    def fit(self, task: FitTask, broadcast: Broadcast, client_id: str) -> ClientUpdate:
        """Train ``client_id`` from what was sent; the update is a copy of what travels back."""
        began = time.perf_counter()
        begin = self._begin(task, broadcast, client_id)
        variate = None
        if broadcast.control is not None:
            variate = Variate.begin(self.store, client_id, task.round, broadcast.control)
        restore(self.local.model, begin)
        put_residual(self.local.model, broadcast.residual)
        with held(self.local.model, broadcast.frozen):
            tail = self._tail(task, broadcast, client_id)
            result = self._train(task, broadcast, begin, client_id, (tail, variate))
        after = snapshot(self.local.model)
        if broadcast.local:
            self.store.put(client_id, OWN, task.round, AdapterState({n: after[n] for n in broadcast.local}))
        sent = broadcast.returned(client_id)
        if any(sent[n].shape != after[n].shape for n in sent):
            after = AdapterState({n: t[tuple(slice(k) for k in sent[n].shape)] for n, t in after.items() if n in sent})
        elif len(sent) < len(after):
            after = AdapterState({n: after[n] for n in sent})
        if isinstance(self.privacy, LocalPrivacy):
            after = self._noised(self.privacy, sent, after, ("local", task.round, client_id))
        change = variate.end(self.store, result.gradient) if variate and result.gradient else None
        metrics = {"loss": result.loss, "steps": float(result.steps), **result.parts}
        metrics["seconds"] = time.perf_counter() - began
        nbytes = None
        if tail is not None and tail.shrank():
            left = truncated(after, tail.keep)
            after, nbytes = padded(left, after), left.nbytes
            metrics["rank"] = float(tail.keep)
        return ClientUpdate(client_id, after, result.num_examples, _finite(metrics), nbytes, change)

    def _tail(self, task: FitTask, broadcast: Broadcast, client_id: str) -> Tail | None:
        """The rank components that the client may give up, as they are before it trains."""
        share = task.phase.work[client_id].objective.needs.tail
        start = broadcast.start(client_id)
        ranks = [start[a].shape[0] for a, _ in lora_pairs(start).values()]
        return None if share is None or not ranks else Tail(self.local.model, max(ranks), share)

    def _noised(
        self, settings: LocalPrivacy, sent: AdapterState, after: AdapterState, purpose: tuple[str | int, ...]
    ) -> AdapterState:
        """What leaves the client: its change clipped, and noise on every value of it."""
        short, _ = clipped(sent, after, settings.clip)
        return plus_noise(
            short, settings.noise_multiplier * settings.clip, settings.generator(self.local.seed, *purpose)
        )

    def _begin(self, task: FitTask, broadcast: Broadcast, client_id: str) -> AdapterState:
        """What the client starts from, in the model's shapes."""
        begin = padded(broadcast.start(client_id), broadcast.adapter)
        own = self.store.get(client_id, OWN, task.round) if broadcast.local else None
        return begin if own is None else own.filled(begin)

    def _train(
        self,
        task: FitTask,
        broadcast: Broadcast,
        begin: AdapterState,
        client_id: str,
        beside: tuple[Tail | None, Variate | None],
    ) -> TrainResult:
        work, (tail, variate) = task.phase.work[client_id], beside
        rows = TrainRows(self.data[client_id].splits)
        needs = work.objective.needs
        rows.require(work.rows, needs.splits, client_id)
        local = self._local(work)
        private = self.privacy if isinstance(self.privacy, ExamplePrivacy) else None
        plan = BatchPlan(
            rows=rows,
            driver=work.rows,
            needs=needs.splits,
            batch_size=local.args.per_device_train_batch_size,
            accumulation=local.args.gradient_accumulation_steps,
            seed_path=("fit", task.phase.name if work.spread else task.round, client_id),
            workers=local.args.dataloader_num_workers,
            sample=None if private is None else "secret" if private.secure_noise else "poisson",
        )
        on_step, whole = self.on_step, Share(task.phase_round, task.phase.rounds)
        constraint = None if work.constraint is None else work.constraint.bind(self.local.model)
        local_task = LocalTask(
            plan,
            work.objective,
            work.epochs,
            whole if self.lr_per_phase else Share(),
            None if on_step is None else lambda event: on_step(task, client_id, event),
            whole if work.spread else Share(),
            constraint,
            private,
            work.steps,
            variate.correction if variate else None,
        )
        companions = self._beside(work.objective, plan, begin, broadcast.residual)
        result = local.train(local_task, replace(companions, tail=tail))
        self.curves.setdefault(task.phase.name, []).append(result.curve)
        return result

    def _local(self, work: Work) -> Local:
        """The loop with the work's own settings."""
        if not work.args:
            return self.local
        key = repr(sorted(work.args.items()))
        if key not in self._locals:
            args = replace(self.local.args, **work.args)
            self._locals[key] = Local(self.local.model, args, self.local.collation, self.local.seed)
        return self._locals[key]

    def _beside(
        self, objective: Objective, plan: BatchPlan, adapter: AdapterState, residual: AdapterState | None
    ) -> Companions:
        anchor = Anchor(self.local.model, adapter) if objective.needs.anchor else None
        fisher = self._measured(objective.needs.fisher_rows, plan, adapter)
        if not (objective.needs.reference or objective.needs.reference_distribution):
            return Companions(None, anchor, fisher)
        if self._reference is None:
            first = self.reference is None  # else what the run opened, beneath which nothing lay
            self._reference = Reference(self.local.model, self.reference or adapter, residual if first else None)
        if objective.needs.reference:
            for split in sorted(objective.needs.splits & {"forget", "alternate"}):
                self._prepare(self._reference, split, plan)
        return Companions(self._reference, anchor, fisher)

    def _measured(self, count: int, plan: BatchPlan, adapter: AdapterState) -> Fisher | None:
        """The Fisher information of ``count`` of the client's retain rows, kept while the same client asks."""
        if count == 0:
            return None
        client_id, rows = str(plan.seed_path[-1]), plan.rows.splits.get("retain", ())
        if not rows:
            raise UnfedError(f"{client_id} has no retain rows, whose Fisher information wrapper=EWC needs")
        if self._fisher is None or self._fisher[0] != client_id:
            drawn = torch.randperm(len(rows), generator=torch_generator(self.local.seed, "fisher", client_id))
            batches = [self.local.collation.batch([rows[int(i)]]) for i in sorted(drawn[:count].tolist())]
            on_device = [b.to(self.local.device) for b in batches]
            with self.local.accelerator.autocast():
                self._fisher = (client_id, Fisher(self.local.model, self.reference or adapter, on_device))
        return self._fisher[1]

    def _prepare(self, reference: Reference, split: Split, plan: BatchPlan) -> None:
        examples, size = sorted(plan.rows.splits[split], key=len), plan.batch_size
        batches = [self.local.collation.batch(examples[i : i + size]) for i in range(0, len(examples), size)]
        with self.local.accelerator.autocast():  # the precision that the policy's own log-probabilities have
            reference.prepare(split, [b.to(self.local.device) for b in batches])


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """JSON has no NaN: what is not finite is told by its absence and by ``finite`` = 0."""
    kept = {k: v for k, v in metrics.items() if math.isfinite(v)}
    return {**kept, "finite": float(len(kept) == len(metrics))}
