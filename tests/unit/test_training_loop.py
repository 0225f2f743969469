"""The local loop: precision, optimizer, schedule, clipping, gradients that arrive, modes that come back."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import get_scheduler

from unfed.base.errors import AdapterError, ConfigError
from unfed.models.adapter import snapshot, trainable_parameters
from unfed.models.generate import inference
from unfed.objectives.nll import NLL
from unfed.training.batches import BatchPlan, TrainRows
from unfed.training.context import Companions
from unfed.training.extent import Extent, Share
from unfed.training.loop import LocalTask, mean_nll


def task(
    local, examples, *, epochs=1.0, window=None, objective=None, path=("fit", 0, "c"), on_step=None, part=None
) -> LocalTask:
    a = local.args
    plan = BatchPlan(
        TrainRows({"train": list(examples)}), "train", frozenset({"train"}), a.per_device_train_batch_size,
        a.gradient_accumulation_steps, path, a.dataloader_num_workers,
    )  # fmt: skip
    return LocalTask(plan, objective or NLL(), epochs, window or Share(), on_step, part or Share())


def train(local, examples, **given):
    return local.train(task(local, examples, **given), Companions())


def rates(local, examples, **given) -> list[float]:
    """The learning rate that each optimizer step was made with."""
    used: list[float] = []
    made = local._optimizer

    def spy(*args):
        optimizer, scheduler = made(*args)
        optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[0]["lr"]))
        return optimizer, scheduler

    local._optimizer = spy
    train(local, examples, **given)
    local._optimizer = made
    return used


def test_training_lowers_the_loss_and_tells_of_it(small_local, small_examples):
    local = small_local(logging_steps=2)
    before, events = mean_nll(local, small_examples), []
    result = train(local, small_examples, epochs=6, on_step=events.append)
    assert result.steps == len(result.curve) == 30 and result.num_examples == 18
    assert result.curve[-1] < result.curve[0] and mean_nll(local, small_examples) < before - 0.5
    assert result.parts.keys() == {"train"} and result.loss == pytest.approx(sum(result.curve) / 30)
    assert [e.step for e in events] == list(range(2, 31, 2)) and all(e.total == 30 for e in events)
    assert events[0].loss == pytest.approx(sum(result.curve[:2]) / 2, rel=1e-5)


def test_the_same_task_gives_the_same_bits(small_local, small_examples):
    def once(**given):
        local = small_local(dropout=0.2)
        torch.rand(3)  # whatever was drawn before must not matter
        train(local, small_examples, **given)
        return snapshot(local.model).digest()

    usual = once()
    assert once() == usual
    assert once(path=("fit", 1, "c")) != usual


def test_trainer_args_seed_decides_order_and_dropout_where_it_is_given(small_local, small_examples):
    def once(seed, own=None):
        local = small_local(seed=seed, dropout=0.2, **({} if own is None else {"args_seed": own}))
        train(local, small_examples)
        return snapshot(local.model).digest()

    assert once(0) != once(1) == once(0, own=1)


def test_workers_change_no_bit(small_local, small_examples):
    digests = []
    for workers in (0, 2):
        local = small_local(dataloader_num_workers=workers)
        train(local, small_examples)
        digests.append(snapshot(local.model).digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("given", "warmup"), [({"warmup_steps": 3}, 3), ({"warmup_ratio": 0.2}, 2), ({"warmup_epochs": 1}, 5)]
)
def test_the_schedule_is_transformers_own_over_the_clients_steps(small_local, small_examples, given, warmup):
    used = rates(small_local(lr_scheduler_type="cosine", **given), small_examples, epochs=2)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-2)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=10)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert used == pytest.approx(expected) and used[0] == 0.0


def test_windows_of_a_phase_are_one_schedule(small_local, small_examples):
    whole = rates(small_local(), small_examples, epochs=3)
    parts = [r for i in range(3) for r in rates(small_local(), small_examples, window=Share(i, 3))]
    assert parts == pytest.approx(whole) and sorted(whole, reverse=True) == whole and len(set(whole)) == 15


def test_fractions_of_an_epoch_and_max_steps(small_local, small_examples):
    assert train(small_local(), small_examples, epochs=0.5).steps == 3
    assert train(small_local(), small_examples, epochs=1.5).steps == 8
    assert train(small_local(max_steps=2), small_examples, epochs=9).steps == 2
    assert train(small_local(), small_examples[:1], epochs=0.1).steps == 1


def test_gradients_are_clipped_over_the_whole_model(small_local, small_examples):
    local = small_local(max_grad_norm=1e-3, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_steps=1)
    before = snapshot(local.model)
    train(local, small_examples)
    after = snapshot(local.model)
    moved = math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in before))
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_weight_decay_spares_vectors(small_local):
    local = small_local(lora=False, weight_decay=0.3)
    optimizer, _ = local._optimizer(Extent(1, 0), 1)
    decayed = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decayed) == len(trainable_parameters(local.model))
    for name, parameter in trainable_parameters(local.model).items():
        assert decayed[id(parameter)] == (0.0 if "norm" in name else 0.3)


def test_optimizer_arguments_reach_the_optimizer(small_local):
    optimizer, _ = small_local(adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3)._optimizer(Extent(1, 0), 1)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.5, 0.6) and optimizer.defaults["eps"] == 1e-3
    assert isinstance(small_local(optim="sgd")._optimizer(Extent(1, 0), 1)[0], torch.optim.SGD)


@pytest.mark.parametrize(
    "given",
    [{"lr_scheduler_type": "reduce_lr_on_plateau"}, {"lr_scheduler_type": "cosine_with_min_lr"}, {"optim": "lomo"}],
)
def test_a_setting_that_cannot_work_stops_before_the_first_client(small_local, given):
    with pytest.raises(ConfigError, match=f"{next(iter(given.values()))}.*: cannot be used here"):
        small_local(**given)


def test_schedule_arguments_reach_the_schedule(small_local, small_examples):
    kwargs = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 9e-3}}
    assert min(rates(small_local(**kwargs), small_examples)) >= 9e-3


def test_paged_adamw_says_what_it_does_instead(small_local, small_examples):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    local = small_local(optim="paged_adamw_32bit")
    assert local.optim_note is not None and "adamw_torch instead of paged_adamw_32bit" in local.optim_note
    train(local, small_examples)


def test_fp16_needs_a_gpu(small_local):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match="fp16: needs a CUDA device, this model is on cpu"):
        small_local(fp16=True)


def test_bf16_autocast_trains_float32_adapters(small_local, small_examples):
    local = small_local(bf16=True)
    result = train(local, small_examples, epochs=4)
    assert result.curve[-1] < result.curve[0]
    assert {t.dtype for t in snapshot(local.model).values()} == {torch.float32}
    small_local()  # another precision in the same process


@pytest.mark.parametrize("dtype", ["bfloat16"])
@pytest.mark.parametrize("lora", [True, False])
def test_a_bfloat16_model_trains(small_local, small_examples, dtype, lora):
    local = small_local(lora=lora, dtype=dtype)
    result = train(local, small_examples, epochs=4)
    assert result.curve[-1] < result.curve[0] - 0.2
    assert {t.dtype for t in snapshot(local.model).values()} == {torch.float32 if lora else torch.bfloat16}


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_what_it_was(small_local, small_examples, training):
    local = small_local()
    local.model.train(training)
    train(local, small_examples[:4])
    assert local.model.training is training
    mean_nll(local, small_examples[:2])
    assert local.model.training is training
    with pytest.raises(ZeroDivisionError), inference(local.model):  # noqa: PT012
        assert not local.model.training
        raise ZeroDivisionError
    assert local.model.training is training


def test_a_parameter_without_gradient_stops_the_run(small_local, small_examples):
    local = small_local()
    local.model.register_parameter("lost", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(AdapterError, match=r"1 of \d+ trainable parameters received no gradient \(the first: lost\)"):
        train(local, small_examples)


class Breaks:
    """An objective that fails in the second micro-batch, with gradients of the first already there."""

    name, needs = "Breaks", NLL().needs

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ctx):
        self.calls += 1
        if self.calls == 2:
            raise ZeroDivisionError
        return NLL()(ctx)


def test_a_client_that_breaks_off_leaves_no_gradient_behind(small_local, small_examples):
    local = small_local(gradient_accumulation_steps=2, max_steps=1)
    start = snapshot(local.model)
    with pytest.raises(ZeroDivisionError):
        train(local, small_examples, objective=Breaks())
    assert all(p.grad is None for p in trainable_parameters(local.model).values())
    train(local, small_examples)
    fresh = small_local(gradient_accumulation_steps=2, max_steps=1)
    train(fresh, small_examples)
    assert snapshot(local.model).digest() == snapshot(fresh.model).digest() != start.digest()


def test_no_optimizer_is_kept_from_one_client_to_the_next(small_local, small_examples):
    local = small_local()
    for _ in range(3):
        train(local, small_examples[:4])
    assert local.accelerator._optimizers == []


def test_parts_of_a_run_take_its_steps_in_order(small_local, small_examples):
    """18 rows in batches of 4 are 5 steps an epoch; 2 epochs over 4 rounds are 10 steps: 2, 3, 2, 3."""

    def seen(local, parts, epochs):
        rows = []
        original = local._step

        def spy(step, *args, **given):
            rows.append(tuple(i for b in step.micro for i in b["train"].example_ids))
            return original(step, *args, **given)

        local._step = spy
        counts = [
            local.train(dataclasses.replace(task(local, small_examples, epochs=epochs), part=p), Companions()).steps
            for p in parts
        ]
        return counts, rows

    whole = seen(small_local(), [Share()], 2.0)
    dealt = seen(small_local(), [Share(i, 4) for i in range(4)], 0.5)
    assert whole[0] == [10] and dealt[0] == [2, 3, 2, 3]
    assert dealt[1] == whole[1]
    assert seen(small_local(), [Share(i, 7) for i in range(7)], 0.1)[0] == [1] * 7, "a step at least in each"


def test_parts_of_a_run_share_one_learning_rate_schedule(small_local, small_examples):
    whole = rates(small_local(), small_examples, epochs=2.0)
    local = small_local()
    parts = [
        r for i in range(4) for r in rates(local, small_examples, epochs=0.5, window=Share(i, 4), part=Share(i, 4))
    ]
    assert parts == pytest.approx(whole)
