"""The relearning check: a little plain fine-tuning on the forget set, of the model and of the oracle alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from unfed.data.chat import encode_rows
from unfed.evaluation.robustness import (
    RELEARNING,
    CannotBeDoneError,
    Outcome,
    Subject,
    Values,
    left_as_it_was,
    relearning_score,
    tells_forgetting,
)
from unfed.models.adapter import live_tensors
from unfed.models.generate import pad_id
from unfed.objectives.nll import NLL
from unfed.training.args import LoopArgs
from unfed.training.batches import BatchPlan, Collation, TrainRows
from unfed.training.context import Companions
from unfed.training.loop import Local, LocalTask, TrainResult

WEAK_GAIN = 0.01
"""Relearning that raises no metric by as much says little, and the quotient of two such gains nothing."""

Opened = Callable[[], AbstractContextManager[nn.Module]]
"""Opens a model for a ``with`` block."""


@dataclass(frozen=True)
class Relearning:
    """AdamW with a linearly falling rate, whole batches, no weight decay; the length is OpenUnlearning's, and so is the
    default rate of whole weights, 2e-5 (App. E.2 of arXiv 2506.12618). An adapter, which that rate hardly moves, takes
    ten times as much."""

    learning_rate: float | None = None
    epochs: float = 1.0
    batch_size: int = 8
    seed: int = 0


def relearning(subject: Subject, settings: Relearning, oracle: Opened | None = None) -> Outcome:
    """Fine-tune on the forget rows and measure; with ``oracle`` do the same to the retain model, for the score.

    Departure from OpenUnlearning, which trains all weights: of a model with an adapter the adapter trains alone.
    Raises ``CannotBeDoneError`` for a whole model in float16, which plain AdamW does not train.
    """
    if settings.learning_rate is None:
        settings = replace(settings, learning_rate=2e-4 if isinstance(subject.model, PeftModel) else 2e-5)
    after, trained = _relearned(subject, settings)
    before = {name: subject.before.get(name) for name in after}
    rows = f"{len(subject.forget)} forget rows"
    what = "its adapter" if isinstance(subject.model, PeftModel) else "all its weights"
    did = f"The model was fine-tuned on the {rows} for {settings.epochs:g} epochs of plain training ({what})."
    extra: dict[str, Any] = {"training": _told(trained)}
    gains = [v - b for n, v in after.items() if v is not None and (b := before[n]) is not None]
    if max(gains, default=0.0) < WEAK_GAIN:
        extra["note"] = (
            f"no metric rose by {WEAK_GAIN:g}: too weak an attempt to tell robust from fragile; raise "
            "eval.robustness.relearn.learning_rate (an adapter needs more than whole weights)"
        )
    outcome = Outcome(
        "relearn", did, asdict(settings), before, after, formula=RELEARNING, extra=extra,
        why="no eval.robustness.oracle_path: the score compares with the retain model's relearning",
    )  # fmt: skip
    if oracle is None:
        return outcome
    with oracle() as model:
        other = replace(subject, model=model)
        start = other.measure()
        end, trained = _relearned(other, settings)
    extra["oracle"] = {"before": start, "after": end, "training": _told(trained)}
    whole = "; ".join(
        f"{who}: {'the adapter' if isinstance(m, PeftModel) else 'all weights'} trained"
        for who, m in (("model", subject.model), ("oracle", model))
    )
    did = f"{did[:-1]}, and so was the retain model ({whole})."
    return replace(outcome, did=did, score=_scores((before, after), (start, end)), why=None)


def _scores(model: tuple[Values, Values], oracle: tuple[Values, Values]) -> dict[str, float | None]:
    return {
        n: relearning_score((oracle[0][n], oracle[1][n]), (model[0][n], model[1][n]))
        for n in model[1]
        if tells_forgetting(n)
    }


def _told(trained: TrainResult) -> dict[str, Any]:
    return {"steps": trained.steps, "first_loss": trained.curve[0], "last_loss": trained.curve[-1]}


def _relearned(subject: Subject, settings: Relearning) -> tuple[Values, TrainResult]:
    """The metrics after training; the model is put back."""
    model = subject.model
    places = {t.data_ptr() for t in live_tensors(model).values()}
    trained = [p for p in model.parameters() if p.data_ptr() in places]
    dtypes = {p.dtype for p in model.parameters()}
    if any(p.dtype == torch.float16 for p in trained):
        raise CannotBeDoneError("the weights are float16, which cannot be trained: set model.model_args.torch_dtype")
    encoded = encode_rows(subject.tokenizer, subject.template, subject.forget, subject.suite.max_length)
    rows = TrainRows({"train": [e for e in encoded if e.num_label_tokens]})
    plan = BatchPlan(rows, "train", NLL().needs.splits, settings.batch_size, 1, ("robustness", "relearn"))
    args = LoopArgs(
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        bf16=torch.bfloat16 in dtypes,
        use_cpu=next(model.parameters()).device.type == "cpu",
        report_to=(),
    )
    with left_as_it_was(model, trained):
        chosen = {id(p) for p in trained}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        local = Local(model, args, Collation(pad_id(subject.tokenizer)), settings.seed)
        result = local.train(LocalTask(plan, NLL(), settings.epochs), Companions())
        return subject.measure(), result
