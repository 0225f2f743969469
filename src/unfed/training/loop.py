"""One client's local training: batches, objective, backward, clip, optimizer, scheduler.

Ours, on top of Accelerate: ``transformers.Trainer`` spends 0.4 s on set-up in every ``train()`` call, and a federated
run makes one call for each client and round.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainingArguments, get_scheduler
from transformers.trainer import Trainer

from unfed.aggregation.privacy import ExamplePrivacy
from unfed.base.errors import AdapterError, ConfigError
from unfed.base.seeding import derive_seed
from unfed.base.types import AdapterState, Batch, LossTerms, Split
from unfed.data.chat import EncodedExample
from unfed.models.adapter import trainable_parameters
from unfed.models.forward import token_logps
from unfed.models.generate import inference
from unfed.models.modules import confined
from unfed.objectives.base import Objective
from unfed.training.args import LoopArgs, usable_optimizer
from unfed.training.batches import BatchPlan, Collation, Step, steps_per_epoch
from unfed.training.context import Companions, ModelContext
from unfed.training.correction import Corrected
from unfed.training.extent import Extent, Share
from unfed.training.gradients import GradientRule, Micro, Passes, gradient_rule
from unfed.training.precision import check_fp16, enable_checkpointing, make_accelerator
from unfed.training.private import ExampleContext, PrivateGradients, factors


@dataclass(frozen=True)
class StepEvent:
    """Told after an optimizer step. ``loss`` is the mean since the last event (nats)."""

    step: int
    total: int
    loss: float
    lr: float


class Constraint(Protocol):
    """Holds a client's weights somewhere during its local steps."""

    def bind(self, model: nn.Module) -> Callable[[], bool]:
        """What to call after every optimizer step: it may move the model's trainable weights in place, and says
        whether training should stop here."""
        ...


@dataclass(frozen=True)
class LocalTask:
    """What to train on, for how long, with which objective.

    ``window``: this call's share of the learning-rate schedule. ``part``: its share of one run over the rows;
    ``epochs`` are those of this call, all parts together take ``epochs * part.count``. ``after_step``: see
    :class:`Constraint`. ``privacy``: DP-SGD; ``args.max_grad_norm`` has no part in it, for every example is clipped.
    ``steps``: so many optimizer steps instead of ``epochs``, over as many epochs as that takes.
    ``correction``: what every gradient gets added, by tensor name (SCAFFOLD's ``c - c_k``).
    """

    plan: BatchPlan
    objective: Objective
    epochs: float
    window: Share = field(default_factory=Share)
    on_step: Callable[[StepEvent], None] | None = None
    part: Share = field(default_factory=Share)
    after_step: Callable[[], bool] | None = None
    privacy: ExamplePrivacy | None = None
    steps: int | None = None
    correction: AdapterState | None = None


@dataclass(frozen=True)
class TrainResult:
    """Means over the steps; ``curve`` holds the loss of every optimizer step. ``num_examples`` counts one epoch.
    ``gradient``: the mean of the gradients before their correction, where there was one."""

    steps: int
    num_examples: int
    loss: float
    parts: dict[str, float]
    curve: tuple[float, ...]
    gradient: AdapterState | None = None


class Local:
    """A model with the device, mixed precision and seed it trains under. Made once, used for every client.

    Raises ``ConfigError`` for a precision, optimizer or learning-rate schedule that cannot be had here.
    """

    def __init__(self, model: nn.Module, args: LoopArgs, collation: Collation, seed: int) -> None:
        self.model, self.args, self.collation = model, args, collation
        self.seed = seed if args.seed is None else args.seed
        self.device = next(p.device for p in model.parameters())
        self._trained: dict[str, nn.Parameter] = {}
        if args.fp16:
            check_fp16(model, self.device)
        self.optim, self.optim_note = usable_optimizer(args.optim)
        if args.tf32 is not None:
            torch.backends.cuda.matmul.allow_tf32 = args.tf32
        if args.gradient_checkpointing:
            enable_checkpointing(model, args)
        self._hf_args = TrainingArguments(
            output_dir="unused",
            optim=self.optim,
            optim_args=args.optim_args,
            learning_rate=args.resolved_learning_rate(use_lora=isinstance(model, PeftModel)),
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
            adam_epsilon=args.adam_epsilon,
            report_to="none",
            use_cpu=self.device.type == "cpu",
        )
        # Settle the devices now: TrainingArguments resets Accelerate's state when it is first asked.
        _ = self._hf_args.device
        self.accelerator = make_accelerator(args)
        scaler = self.accelerator.scaler
        self._fresh_scaler = {} if scaler is None else scaler.state_dict()
        self._try_settings()

    def train(self, task: LocalTask, beside: Companions) -> TrainResult:
        """Train the model in place; it is left in the mode it was in. An objective may confine what is trained.

        Raises ``AdapterError`` after the first step when a trainable parameter received no gradient.
        """
        with confined(self.model, task.objective.needs.scope):
            return self._train(task, beside)

    def _train(self, task: LocalTask, beside: Companions) -> TrainResult:
        per_epoch = steps_per_epoch(task.plan.rows, task.plan.driver, self.args.step_size())
        part = task.part
        # Every call takes a step at least. Rounding: a third of 3 epochs is one epoch, whatever floats make of it.
        steps = per_epoch * task.epochs if task.steps is None else task.steps
        whole = max(part.count, math.ceil(round(steps * part.count, 6)))
        first, last = part.steps(whole)
        total = last - first
        if self.args.max_steps > 0:
            total = min(total, self.args.max_steps)
        extent = Extent(whole, first) if part.count > 1 and task.window.count > 1 else task.window.extent(total)
        self._trained = trainable_parameters(self.model)  # once: a walk over all modules takes milliseconds
        optimizer, scheduler = self._optimizer(extent, per_epoch)
        was_training = self.model.training
        self.model.train()
        torch.manual_seed(derive_seed(self.seed, *task.plan.seed_path, "dropout", *([first] if first else [])))
        if self.accelerator.scaler is not None:
            # What one client's overflow taught it must not reach the next client; a resumed run would not know it.
            self.accelerator.scaler.load_state_dict(self._fresh_scaler)
        rule, corrected = self._rule(task, first, per_epoch), None
        if task.correction is not None:
            rule = corrected = Corrected(rule, self.model, task.correction)
        log = _LossLog(self.args.logging_steps, total, task.on_step)
        try:
            for number, step in enumerate(self._steps(task.plan, first, total)):
                losses = self._step(step, rule, task, beside, optimizer, check=number == 0)
                optimizer.step()
                if not getattr(optimizer, "step_was_skipped", False):
                    scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                log.add(losses, scheduler.get_last_lr()[0])
                if task.after_step is not None and task.after_step():
                    break
        finally:
            self.model.train(was_training)
            optimizer.zero_grad(set_to_none=True)  # a client that broke off must leave nothing to the next one
            self._release()
        result = log.result(len(task.plan.rows.splits[task.plan.driver]))
        return result if corrected is None else replace(result, gradient=corrected.mean())

    def _rule(self, task: LocalTask, first: int, per_epoch: int) -> GradientRule:
        if task.privacy is None:
            return gradient_rule(task.objective, first, per_epoch)
        expected = min(self.args.step_size(), len(task.plan.rows.splits[task.plan.driver]))
        return PrivateGradients(task.privacy, factors(self.model), expected, self.seed, task.plan.seed_path, done=first)

    def _steps(self, plan: BatchPlan, first: int, total: int) -> Iterator[Step]:
        epoch, skip = divmod(first, steps_per_epoch(plan.rows, plan.driver, self.args.step_size()))
        done = 0
        while done < total:
            for step in plan.epoch(self.seed, epoch, self.collation, skip):
                if done == total:
                    return
                yield step
                done += 1
            epoch, skip = epoch + 1, 0

    def _step(
        self, step: Step, rule: GradientRule, task: LocalTask, beside: Companions, optimizer: Any, *, check: bool
    ) -> dict[str, Tensor]:
        context = ModelContext if task.privacy is None else ExampleContext

        def forward(objective: Objective, micro: Micro) -> LossTerms:
            batches: dict[Split, Batch] = {split: b.to(self.device) for split, b in micro.items()}
            with self.accelerator.autocast():
                return objective(context(self.model, batches, step.totals, task.plan.driver, beside))

        passes = Passes(step.micro, forward, self.accelerator.backward, list(self._trained.values()))
        sums = rule(task.objective, passes)
        if check:
            _check_gradients(self._trained)
        if self.args.max_grad_norm > 0 and task.privacy is None:
            self._clip(optimizer)
        return sums

    def _clip(self, optimizer: Any) -> None:
        if self.args.fp16:
            self.accelerator.unscale_gradients(optimizer)
        torch.nn.utils.clip_grad_norm_(self._trained.values(), self.args.max_grad_norm)

    def _optimizer(self, extent: Extent, per_epoch: int) -> tuple[Any, Any]:
        parameters = self._trained or trainable_parameters(self.model)
        groups = [
            {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": self.args.weight_decay},
            {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        cls, options = Trainer.get_optimizer_cls_and_kwargs(self._hf_args)
        optimizer = cls([g for g in groups if g["params"]], **options)
        scheduler = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=self.args.warmup(extent.total, per_epoch),
            num_training_steps=extent.total,
            scheduler_specific_kwargs=dict(self.args.lr_scheduler_kwargs),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "scheduler.step() before optimizer.step()": meant here
            for _ in range(extent.before):
                scheduler.step()
        return (self.accelerator.prepare_optimizer(optimizer) if self.args.fp16 else optimizer), scheduler

    def _try_settings(self) -> None:
        """Make optimizer and schedule once, so that a setting that cannot work stops the run and not every client."""
        names = f"trainer.args.optim={self.args.optim}, lr_scheduler_type={self.args.lr_scheduler_type}"
        try:
            self._optimizer(Extent(2, 1), 1)
        except (ImportError, ValueError, TypeError, AttributeError) as e:
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise ConfigError([f"{names}: cannot be used here: {reason}"]) from e
        finally:
            self._release()

    def _release(self) -> None:
        self.accelerator._optimizers.clear()  # noqa: SLF001 - Accelerate keeps every optimizer it ever prepared


def _check_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Every trainable parameter took part in the first step, or the run stops here."""
    without = [n for n, p in parameters.items() if p.grad is None]
    if without:
        raise AdapterError(
            f"{len(without)} of {len(parameters)} trainable parameters received no gradient (the first: {without[0]}); "
            "the model does not use them, or gradient checkpointing cuts them off"
        )


class _LossLog:
    """Collects losses without waiting for the device at every step."""

    def __init__(self, every: int, total: int, on_step: Callable[[StepEvent], None] | None) -> None:
        self._every, self._total, self._on_step = max(1, every), total, on_step
        self._sums: list[dict[str, Tensor]] = []
        self._told = 0

    def add(self, sums: dict[str, Tensor], lr: float) -> None:
        self._sums.append(sums)
        done = len(self._sums)
        if self._on_step is not None and (done % self._every == 0 or done == self._total):
            recent = [s["loss"].float() for s in self._sums[self._told :] if "loss" in s]
            self._told = done
            if recent:  # a Poisson sample may be empty
                self._on_step(StepEvent(done, self._total, float(torch.stack(recent).mean()), lr))

    def result(self, num_examples: int) -> TrainResult:
        losses = [s["loss"].float() for s in self._sums if "loss" in s]
        curve = torch.stack(losses).tolist() if losses else [math.nan]
        names = {n for s in self._sums for n in s} - {"loss"}
        parts = {n: float(torch.stack([s[n].float() for s in self._sums if n in s]).mean()) for n in sorted(names)}
        return TrainResult(len(self._sums), num_examples, sum(curve) / len(curve), parts, tuple(curve))


def mean_nll(local: Local, examples: Sequence[EncodedExample]) -> float:
    """Mean loss (nats a token) of a few rows, in evaluation mode: tells a lost adapter at once."""
    with inference(local.model):
        logps, _ = token_logps(local.model, local.collation.batch(examples).to(local.device))
    return float(-logps.mean())
