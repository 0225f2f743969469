"""``trainer.args``: every name reaches the loop, or is refused with the nearest one."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from transformers import TrainingArguments

from unfed.app import runs
from unfed.base.errors import ConfigError
from unfed.training import advice, args, loop
from unfed.training.args import HARMLESS, LoopArgs, arg_problems, loop_args, usable_optimizer

OURS = {"warmup_epochs", "warmup_ratio"}  # the second was TrainingArguments' own before transformers 5


def test_names_are_those_of_training_arguments():
    theirs = {f.name for f in dataclasses.fields(TrainingArguments)}
    ours = {f.name for f in dataclasses.fields(LoopArgs)}
    assert ours - theirs <= OURS
    assert not set(HARMLESS) & ours


def test_every_name_is_used_somewhere():
    """A field that nothing reads would be a setting without effect."""
    from unfed.app import tracking
    from unfed.federated import client
    from unfed.training import precision

    code = "".join(inspect.getsource(m) for m in (args, loop, precision, runs, client, tracking))
    unread = [
        f.name for f in dataclasses.fields(LoopArgs) if f"args.{f.name}" not in code and f"self.{f.name}" not in code
    ]
    assert unread == []


def test_an_unknown_name_has_a_nearest_one():
    assert arg_problems({"learning_rat": 1e-3})[0].startswith(
        "trainer.args.learning_rat: no such name; did you mean 'learning_rate'?"
    )


def test_a_name_that_the_loop_does_not_use_is_refused():
    (problem,) = arg_problems({"torch_compile": True})
    assert "a TrainingArguments name that Unfed's loop does not use" in problem


def test_server_hyperparameters_are_no_training_arguments():
    assert len(arg_problems({"tau": 1e-3, "server_lr": 0.1})) == 2


def test_values_of_the_wrong_kind():
    problems = arg_problems({"per_device_train_batch_size": 8.5, "num_train_epochs": "many", "optim": "adamw_torch"})
    assert problems == [
        "trainer.args.per_device_train_batch_size=8.5: not a whole number",
        "trainer.args.num_train_epochs='many': not a number",
    ]
    assert loop_args({"per_device_train_batch_size": 8.0, "learning_rate": "1e-3"}) == LoopArgs(
        per_device_train_batch_size=8, learning_rate=1e-3
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"gradient_accumulation_steps": 0}, "at least 1"),
        ({"num_train_epochs": 0}, "above 0"),
        ({"learning_rate": -1}, "above 0"),
        ({"learning_rate": float("nan")}, "above 0"),
        ({"warmup_ratio": 1.5}, "between 0 and 1"),
        ({"max_grad_norm": -1}, "0 does not clip"),
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, "give one of warmup_ratio, warmup_steps"),
        ({"bf16": True, "fp16": True}, "exclude each other"),
        ({"optim": "adam"}, "did you mean"),
        ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_values_out_of_their_limits(given, said):
    (problem,) = arg_problems(given)
    assert said in problem and next(iter(given)) in problem


def test_null_takes_the_default_where_there_is_one():
    made = loop_args({"learning_rate": None, "lr_scheduler_kwargs": None, "report_to": None, "seed": None})
    assert made == LoopArgs(report_to=())
    assert loop_args({"report_to": "wandb"}).report_to == ("wandb",)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, 0),
        ({"warmup_steps": 7}, 7),
        ({"warmup_steps": 700}, 40),
        ({"warmup_steps": 0.25}, 10),
        ({"warmup_ratio": 0.1}, 4),
        ({"warmup_ratio": 0.01}, 1),
        ({"warmup_epochs": 1}, 5),
        ({"warmup_epochs": 0.5}, 3),
        ({"warmup_epochs": 100}, 40),
    ],
)
def test_warmup_in_steps(given, steps):
    assert LoopArgs(**given).warmup(total_steps=40, steps_per_epoch=5) == steps


def test_learning_rates_have_a_default_for_each_kind():
    assert LoopArgs().resolved_learning_rate(use_lora=True) == 1e-4
    assert LoopArgs().resolved_learning_rate(use_lora=False) == 1e-5
    assert LoopArgs(learning_rate=0.5).resolved_learning_rate(use_lora=True) == 0.5


def test_an_optimizer_that_needs_cuda_has_a_stated_stand_in(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    name, note = usable_optimizer("paged_adamw_32bit")
    assert name == "adamw_torch" and note == "optim: adamw_torch instead of paged_adamw_32bit (needs a CUDA device)"
    assert usable_optimizer("sgd") == ("sgd", None)
    with pytest.raises(ConfigError, match="lion_8bit: needs a CUDA device; use adamw_torch"):
        usable_optimizer("lion_8bit")


def test_without_bitsandbytes_the_note_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert usable_optimizer("paged_adamw_32bit") == (
        "adamw_torch",
        "optim: adamw_torch instead of paged_adamw_32bit (needs bitsandbytes)",
    )


def test_out_of_memory_is_answered_with_the_runs_own_numbers():
    settings = {
        "batch": 8, "accumulation": 2, "checkpointing": False, "max_length": 512, "r": 64, "modules": 7,
        "dtype": "float32",
    }  # fmt: skip
    text = advice.out_of_memory(settings, "CUDA out of memory. Tried to allocate 2.00 GiB\nmore")
    assert "Tried to allocate 2.00 GiB" in text and "more" not in text.split("\n")[0]
    assert "batch 8 x accumulation 2, longest row 512 tokens, LoRA r 64 on 7 modules" in text
    assert "per_device_train_batch_size=4 trainer.args.gradient_accumulation_steps=4" in text
    assert "gradient_checkpointing=true" in text and "torch_dtype=bfloat16" in text
    spare = advice.out_of_memory({"batch": 1, "checkpointing": True, "dtype": "bfloat16"}, "")
    assert "gradient_checkpointing=true" not in spare and "train_batch_size=" not in spare


@pytest.mark.parametrize(
    ("losses", "stuck"),
    [
        ([2.0] * 8, True),
        ([2.0, 1.999, 2.001, 2.0], True),
        ([2.0, 1.9, 1.8, 1.7], False),
        ([2.0, 2.0], True),
        ([2.0], False),
        ([float("nan")] * 8, False),
        ([-1.0, -1.0, -2.0, -3.0], False),
    ],
)
def test_a_loss_that_does_not_move(losses, stuck):
    assert advice.stuck(losses) is stuck
