"""Defects seen in other systems for federated unlearning, one test for each: here they cannot happen, or they say so.

Each docstring tells what went wrong elsewhere.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import gc
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from unfed.aggregation.registry import aggregator_problems, build_aggregator
from unfed.app import build, runs
from unfed.app.runs import run
from unfed.base.artifacts import read_json, read_tensors
from unfed.base.errors import AdapterError, ConfigError, UnfedError
from unfed.base.types import AdapterState, Broadcast, ClientUpdate, ServerState
from unfed.config.schema import AggregatorConfig, EvalConfig, MethodConfig
from unfed.config.schema_eval import GenerationConfig
from unfed.data.chat import Template, encode_rows
from unfed.data.collate import collate
from unfed.data.partition import Partition
from unfed.federated.client import Client, ClientData
from unfed.federated.rounds import RoundsConfig, RunKeeper, run_rounds
from unfed.federated.schedule import FitTask, Phase, Schedule, Work
from unfed.federated.transport import InProcess
from unfed.models.adapter import restore, snapshot, trainable_parameters
from unfed.models.forward import answer_logps
from unfed.models.load import load_model
from unfed.models.spec import ModelArgs, TokenizerArgs
from unfed.objectives.nll import NLL
from unfed.objectives.npo import NPO
from unfed.training.args import arg_problems, loop_args

IDS = torch.tensor([[1, 9, 12, 40, 7, 2], [1, 30, 31, 32, 33, 34]])


def weights(directory: Path) -> AdapterState:
    return read_tensors(directory / "adapter_model.safetensors")


def noise(state: AdapterState, seed: int = 0, size: float = 0.05) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    moved = {n: t + size * torch.randn(t.shape, generator=g) if t.is_floating_point() else t for n, t in state.items()}
    return AdapterState({n: t.to(state[n].dtype) for n, t in moved.items()})


def client_over(local, examples, names=("a",), **data) -> Client:
    splits = {"train": examples} | data
    return Client(local, {n: ClientData(n, splits) for n in names})


def task(objective=None, rows="train", *, round_=0, rounds=1, names=("a",), epochs=1.0) -> FitTask:
    work = Work(rows, objective or NLL(), epochs)
    return FitTask(Phase("p", rounds, dict.fromkeys(names, work)), round_, round_)


# --- the adapter ------------------------------------------------------------------------------------------------------


def test_an_adapter_directory_is_not_wrapped_again(finetuned, small_base):
    """Given an adapter directory, unlearning put fresh LoRA layers around the loaded model and set ``lora_B`` to 0,
    so that it silently began at the base model, which had never seen what it was to forget."""
    stored = weights(finetuned)
    assert max(float(t.abs().max()) for n, t in stored.items() if "lora_B" in n) > 0
    opened = [
        load_model(ModelArgs(str(finetuned), use_lora=True), TokenizerArgs(), trainable=trainable)
        for trainable in (True, False)
    ]
    for loaded in opened:
        found = snapshot(loaded.model)
        assert found.digest() == stored.digest()
        assert list(loaded.model.peft_config) == ["default"]
    model = opened[0].model.eval()
    with torch.no_grad():
        logits = model(IDS).logits
        bare = LlamaForCausalLM.from_pretrained(small_base).eval()
        for module, scale in {(n.split(".lora_")[0], 2.0) for n in stored}:
            linear = bare.get_submodule(module.removeprefix("base_model.model."))
            linear.weight += scale * stored[f"{module}.lora_B.weight"] @ stored[f"{module}.lora_A.weight"]
        torch.testing.assert_close(logits, bare(IDS).logits, rtol=1e-4, atol=1e-5)


def test_unlearning_starts_at_the_loss_that_fine_tuning_left(from_finetuned, finetuned, tmp_path, capsys):
    """The lost adapter showed nowhere. The loss on forget rows at the start is recorded and compared."""
    run(from_finetuned(tmp_path / "run"))
    stored = read_json(finetuned / "unfed.json")["forget_loss"]["value"]
    record = read_json(tmp_path / "run" / "run.json")
    assert record["forget_loss_at_start"] == pytest.approx(stored, rel=1e-5) and record["forget_loss_agrees"] is True
    origin = read_json(finetuned / "unfed.json")
    changed = {**origin, "forget_loss": {**origin["forget_loss"], "value": stored + 2.0}}
    place = tmp_path / "copy"
    place.mkdir()
    for file in finetuned.iterdir():
        if file.is_file():
            (place / file.name).write_bytes(file.read_bytes())
    (place / "unfed.json").write_text(json.dumps(changed))
    run(from_finetuned(tmp_path / "other", model_args={"pretrained_model_name_or_path": str(place)}))
    assert read_json(tmp_path / "other" / "run.json")["forget_loss_agrees"] is False
    assert "WARNING: the forget rows have loss" in " ".join(capsys.readouterr().err.split())


def test_an_adapter_by_lora_model_path_is_trainable(small_run, small_base, finetuned, tmp_path):
    """``lora_model_path`` loaded the adapter frozen, and the first backward pass crashed."""
    args = {"pretrained_model_name_or_path": str(small_base), "lora_model_path": str(finetuned)}
    loaded = load_model(ModelArgs(use_lora=True, **args), TokenizerArgs(), trainable=True)
    trained = trainable_parameters(loaded.model)
    assert len(trained) == len(weights(finetuned)) and snapshot(loaded.model).digest() == weights(finetuned).digest()
    run(small_run("unlearn", tmp_path / "run", model_args=args))
    before, after = weights(finetuned), weights(tmp_path / "run")
    assert all(not torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_adapter_the_same_gradients(small_local, small_examples, reentrant):
    """With checkpointing and a frozen base, no input of a block required a gradient: adapters got none, silently."""
    ends = []
    for args in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}):
        local = small_local(**args)
        restore(local.model, noise(snapshot(local.model)))
        local.model.train()
        batch = local.collation.batch(small_examples[:6])
        (-answer_logps(local.model, batch)).mean().backward()
        ends.append({n: p.grad for n, p in trainable_parameters(local.model).items()})
    assert ends[0].keys() == ends[1].keys()
    for name, gradient in ends[0].items():
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(ends[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_an_adapter_without_gradient_stops_the_run(small_local, small_examples):
    """The same: had the inputs not been asked for gradients, the run would have stopped after its first step."""
    local = small_local(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    local.model.get_input_embeddings()._forward_hooks.clear()
    with pytest.raises((AdapterError, RuntimeError), match=r"received no gradient|does not require grad"):
        client_over(local, small_examples).fit(task(), Broadcast(snapshot(local.model)), "a")


# --- whose data -------------------------------------------------------------------------------------------------------


def test_unlearning_follows_the_partition_of_fine_tuning(from_finetuned, finetuned, tmp_path):
    """Fine-tuning shuffled the rows over the clients and unlearning split them anew, so "the target client's data" had
    been learned by others."""
    dealt = Partition.read(finetuned / "partition.json")
    run(from_finetuned(tmp_path / "run", seed=77))
    assert Partition.read(tmp_path / "run" / "partition.json").clients == dealt.clients
    config = from_finetuned(tmp_path / "run", seed=77)
    rows = build.read_rows(config)
    partition, where = build.settle_partition(config, rows)
    assert partition.clients == dealt.clients and str(finetuned / "partition.json") in where
    assert set(partition.owners(e["id"] for e in rows.forget)) == {"client_0"}


def test_a_target_that_does_not_own_the_forget_set_is_refused(from_finetuned, tmp_path):
    """The same, by a wrong index: refused with who owns what, before a model is opened."""
    with pytest.raises(UnfedError, match=r"client_1 owns 0 of the 6 forget rows.*client_0 6"):
        run(from_finetuned(tmp_path / "run", method_args={"target_client_idx": 1}))
    with pytest.raises(UnfedError, match=r"num_clients=5, but .* deals the rows to 3 clients"):
        run(from_finetuned(tmp_path / "run", method_args={"num_clients": 5}))
    assert not (tmp_path / "run").exists()


def test_every_retain_row_is_used(small_local, small_examples):
    """Retain rows were paired by ``idx % len(forget)``, so only the first few of them were ever seen."""
    local, seen = small_local(), []

    class Watch(NPO):
        def __call__(self, ctx):
            seen.append(ctx._batches["retain"].example_ids)
            return super().__call__(ctx)

    forget, retain = small_examples[:4], small_examples[4:]
    client = client_over(local, [], forget=forget, retain=retain)
    client.fit(task(Watch(), "forget", epochs=20), Broadcast(snapshot(local.model)), "a")
    epochs = [i for batch in seen for i in batch]
    assert set(epochs) == {e.example_id for e in retain}
    assert all(len(set(epochs[k : k + 4])) == 4 for k in range(0, len(epochs), 4))


# --- hyperparameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("NPO", {"beta": 0.1, "gamma": 1.0, "alpha": 1.0}),
        ("SimNPO", {"beta": 4.5, "delta": 0.0, "gamma": 0.125, "alpha": 1.0}),
        ("GradDiff", {"gamma": 1.0, "alpha": 1.0, "retain_loss_type": "NLL"}),
    ],
)
def test_the_methods_yaml_reaches_the_objective(from_finetuned, repo_root, tmp_path, method, expected, capsys):
    """The method's YAML never reached the inner trainer: NPO ran with beta 1.0 and SimNPO with 1 and 1."""
    from omegaconf import OmegaConf

    given = OmegaConf.to_container(OmegaConf.load(repo_root / "configs" / "method" / f"{method}.yaml"))
    name = given.pop("name")
    run(from_finetuned(tmp_path / "run", method=MethodConfig(name, given), method_args={"global_rounds": 1}))
    settings = read_json(tmp_path / "run" / "run.json")["settings"][method]
    assert {k: settings[k] for k in expected} == expected
    printed = " ".join(capsys.readouterr().err.split())
    assert f"{method}: gamma=" in printed and all(f"{k}={v}" in printed for k, v in expected.items())


def test_a_changed_hyperparameter_changes_the_loss(from_finetuned, tmp_path):
    """The same, from the other end: what is set has an effect, and what does not exist is refused."""
    losses = []
    for beta in (0.1, 0.5):
        config = from_finetuned(tmp_path / f"{beta}", method=MethodConfig("NPO", {"beta": beta}))
        losses.append(run(config).records[0].metrics["client_0"]["forget"])
    assert losses[0] > 2 * losses[1]  # 2 log(2) / beta at the start
    with pytest.raises(ConfigError, match=r"method\.betta: NPO has no such hyperparameter; did you mean 'beta'"):
        run(from_finetuned(tmp_path / "no", method=MethodConfig("NPO", {"betta": 1.0})))


def test_server_hyperparameters_reach_the_server(from_finetuned, tmp_path):
    """Server hyperparameters went to the client's trainer: ``tau`` raised TypeError, ``server_lr`` was never used."""
    ends = []
    for lr in (1e-3, 1e-2):
        config = from_finetuned(
            tmp_path / f"{lr}", aggregator=AggregatorConfig("FedYogi", {"server_lr": lr, "tau": 0.01})
        )
        ends.append(weights(run(config).directory))
        assert read_json(tmp_path / f"{lr}" / "run.json")["settings"]["FedYogi"]["tau"] == 0.01
    assert ends[0].digest() != ends[1].digest()
    (problem,) = aggregator_problems("FedYogi", {"tua": 1e-3})
    assert problem.startswith("aggregator.tua: FedYogi has no such hyperparameter; did you mean 'tau'?")
    assert arg_problems({"tau": 1e-3}) and arg_problems({"server_lr": 1.0})


@pytest.mark.parametrize("name", ["FedAdam", "FedYogi"])
def test_the_first_adaptive_step_is_the_published_one(small_local, small_examples, name):
    """FedAdam and FedYogi took the whole difference as the first moment and its square for v: the first step was ten
    times that of Reddi et al. 2021, Algorithm 2 (m = (1 - beta1) d; v from tau^2; no bias correction)."""
    local = small_local()
    client = client_over(local, small_examples, ("a", "b"))
    start = snapshot(local.model)
    rule = build_aggregator(name, {"server_lr": 0.1, "tau": 1e-3, "beta1": 0.9, "beta2": 0.99})
    schedule = Schedule((task(names=("a", "b")).phase,))
    end = run_rounds(schedule, InProcess(client.fit), rule, ServerState(0, start), RoundsConfig(), RunKeeper())
    first, second = (client.fit(next(schedule.tasks()), Broadcast(start), c).adapter for c in ("a", "b"))
    for n in start:
        d = (first[n].double() + second[n].double()) / 2 - start[n].double()
        v = 1e-6 - 0.01 * d**2 * torch.sign(1e-6 - d**2) if name == "FedYogi" else 0.99 * 1e-6 + 0.01 * d**2
        expected = start[n].double() + 0.1 * (0.1 * d) / (v.sqrt() + 1e-3)
        torch.testing.assert_close(end.adapter[n].double(), expected, rtol=1e-4, atol=1e-7)


def test_an_unknown_strategy_is_refused_before_anything_is_loaded(from_finetuned, tmp_path, monkeypatch):
    """An unknown aggregation strategy raised its error after all clients had trained."""
    monkeypatch.setattr(runs, "load_model", None)
    monkeypatch.setattr(build, "load_rows", None)
    with pytest.raises(ConfigError, match=r"unknown aggregation strategy 'FedAvgg'; did you mean 'FedAvg'.*FedYogi"):
        run(from_finetuned(tmp_path / "run", aggregator="FedAvgg"))
    assert not (tmp_path / "run").exists()


# --- the mathematics --------------------------------------------------------------------------------------------------


def test_the_proximal_term_is_above_zero_after_one_step(from_finetuned, small_local, small_examples, tmp_path):
    """FedProx compared the model with itself, through tensors that went on changing: its term was always 0."""
    seen = []

    class Watch:
        name, needs = "Watch", dataclasses.replace(NLL().needs, anchor=True)

        def __call__(self, ctx):
            seen.append(ctx.adapter_distance_sq().item())
            return NLL()(ctx)

    local = small_local(max_steps=2)
    client_over(local, small_examples).fit(task(Watch()), Broadcast(snapshot(local.model)), "a")
    assert seen[0] == 0.0 and seen[1] > 0
    result = run(from_finetuned(tmp_path / "run", aggregator=AggregatorConfig("FedProx", {"proximal_mu": 1.0})))
    assert result.records[0].metrics["client_0"]["proximal"] > 0


def test_accumulated_micro_batches_are_one_step(small_local, small_examples):
    """Losses ignored gradient accumulation: the gradient grew with the number of micro-batches."""
    ends = []
    for micro, accumulation in ((8, 1), (4, 2), (2, 4)):
        local = small_local(
            per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation, max_grad_norm=0, optim="sgd"
        )
        client = client_over(local, [], forget=small_examples[:9], retain=small_examples[9:])
        ends.append(client.fit(task(NPO(), "forget", epochs=2), Broadcast(snapshot(local.model)), "a").adapter)
    for other in ends[1:]:
        for name in other:
            torch.testing.assert_close(other[name], ends[0][name], rtol=1e-4, atol=1e-6)


def test_order_and_dropout_differ_by_client_and_round(small_local, small_examples):
    """Every client and every round had the same order of rows and the same dropout masks."""
    orders = {}

    class Watch:
        name, needs = "Watch", NLL().needs

        def __call__(self, ctx):
            orders.setdefault(self.key, []).append(ctx._batches["train"].example_ids)
            return NLL()(ctx)

    local, watch = small_local(dropout=0.3), Watch()
    start = noise(snapshot(local.model))
    client = client_over(local, small_examples, ("a", "b"))
    keys = [(r, c) for r in (0, 1) for c in ("a", "b")]
    for watch.key in keys:
        client.fit(task(watch, round_=watch.key[0], names=("a", "b")), Broadcast(start), watch.key[1])
    assert len({str(orders[k]) for k in keys}) == 4

    # A single row has no order, so what differs is the dropout.
    client = client_over(small_local(dropout=0.3, optim="sgd", learning_rate=1.0), small_examples[:1], ("a", "b"))
    ends = {k: client.fit(task(round_=k[0], rounds=2, names=("a", "b")), Broadcast(start), k[1]).adapter for k in keys}
    for one, two in itertools.combinations(keys, 2):
        assert max(float((ends[one][n] - ends[two][n]).abs().max()) for n in start) > 1e-4
    assert (
        client.fit(task(round_=1, rounds=2, names=("a", "b")), Broadcast(start), "b").adapter.digest()
        == ends[1, "b"].digest()
    )


@pytest.mark.parametrize("per_phase", [True, False])
def test_the_learning_rate_spans_the_phase_or_each_round_by_choice(small_local, small_examples, per_phase):
    """The learning rate fell to 0 in every round and began anew in the next, whatever one wanted."""
    local, rates = small_local(logging_steps=1), []
    client = client_over(local, small_examples)
    client.lr_per_phase = per_phase
    client.on_step = lambda _task, _client, event: rates.append(event.lr)
    for round_ in range(3):
        client.fit(task(round_=round_, rounds=3), Broadcast(snapshot(local.model)), "a")
    assert len(rates) == 15  # each told after its step: the next one's
    if per_phase:
        assert rates == sorted(rates, reverse=True) and rates[-1] == 0.0 and rates[4] > 0.5 * rates[0]
    else:
        assert rates[:5] == rates[5:10] == rates[10:] and rates[4] == 0.0


def test_sums_are_made_in_float32():
    """Weighted sums in bfloat16 had an error above the update itself."""
    start = AdapterState({"w": torch.full((64,), 1.0, dtype=torch.bfloat16)})
    steps = [2**-7 * (k % 4 > 0) for k in range(256)]  # three of four clients move by one bfloat16 step
    updates = [ClientUpdate(f"c{k}", AdapterState({"w": (start["w"] + s)}), 1) for k, s in enumerate(steps)]
    naive = torch.zeros(64, dtype=torch.bfloat16)
    for update in updates:
        naive += update.adapter["w"] / 256
    combined = build_aggregator("FedAvg", {}).combine(updates, 256).adapter["w"]
    exact = torch.stack([u.adapter["w"].double() for u in updates]).mean(0)
    assert float((naive.double() - exact).abs().min()) >= float((exact - 1).max()) > 0  # all of the update is lost
    assert torch.equal(combined, exact.to(torch.bfloat16)) and float(combined.min()) > 1


def test_tied_embeddings_move_once(small_local, small_examples):
    """With all parameters, tied embeddings were listed twice and the server's update hit them twice."""
    local = small_local(lora=False, learning_rate=1e-3)
    start = snapshot(local.model)
    assert [n for n in start if "embed_tokens" in n or "lm_head" in n] == ["model.embed_tokens.weight"]
    rule = build_aggregator("FedAvg", {"server_lr": 0.5})
    schedule = Schedule((task().phase,))
    client = client_over(local, small_examples)
    end = run_rounds(schedule, InProcess(client.fit), rule, ServerState(0, start), RoundsConfig(), RunKeeper())
    theirs = client.fit(next(schedule.tasks()), Broadcast(start), "a").adapter["model.embed_tokens.weight"]
    ours = start["model.embed_tokens.weight"]
    torch.testing.assert_close(end.adapter["model.embed_tokens.weight"], (ours + theirs) / 2)
    restore(local.model, end.adapter)
    assert local.model.get_output_embeddings().weight is local.model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam"])
def test_integer_buffers_are_copied(small_local, small_examples, name):
    """With all parameters, integer buffers crashed the average."""
    local = small_local(lora=False)
    local.model.register_buffer("steps_seen", torch.tensor([3, 4]))
    state = ServerState(0, snapshot(local.model))
    client = client_over(local, small_examples, ("a", "b"))
    schedule = Schedule((task(names=("a", "b")).phase,))
    end = run_rounds(schedule, InProcess(client.fit), build_aggregator(name, {}), state, RoundsConfig(), RunKeeper())
    assert torch.equal(end.adapter["steps_seen"], torch.tensor([3, 4]))
    assert end.adapter.digest() != state.adapter.digest()


def test_the_error_of_averaging_factors_is_measured_in_every_round(from_finetuned, tmp_path):
    """Averaging A and B apart is off by one to eight percent, and nobody was told."""
    result = run(from_finetuned(tmp_path / "run"))
    alone, *rounds = [r.aggregation_error for r in result.records]
    assert alone == pytest.approx(0, abs=1e-6) and len(rounds) == 2
    assert all(e is not None and 1e-5 < e < 0.5 for e in rounds)
    assert [r["aggregation_error"] for r in read_json(result.directory / "run.json")["rounds"]] == [alone, *rounds]


# --- memory and time --------------------------------------------------------------------------------------------------


def alive() -> tuple[int, int]:
    """Models, and storages of the embedding's size, that are alive in this process."""
    gc.collect()
    found = gc.get_objects()
    models = sum(issubclass(type(o), PreTrainedModel) for o in found)
    shapes = [o for o in found if issubclass(type(o), torch.Tensor) and o.dim() == 2 and o.shape[1] == 32]
    return models, len({t.untyped_storage().data_ptr() for t in shapes if t.shape[0] > 250})


def test_there_is_one_model(from_finetuned, tmp_path, monkeypatch):
    """There was a deep copy of the model for each client and another for the reference: 2N models in memory."""

    def forbidden(value, *_args, **_kwargs):
        if isinstance(value, torch.nn.Module):
            raise AssertionError(f"deepcopy of {type(value).__name__}")
        return original(value, *_args, **_kwargs)

    original, calls, during, fit = copy.deepcopy, [], [], Client.fit

    def watched(self, *args):
        update = fit(self, *args)
        calls.append(1)
        if len(calls) in {1, 7}:  # unlearning, and the last client of the recovery
            during.append(alive())
        return update

    monkeypatch.setattr(copy, "deepcopy", forbidden)
    monkeypatch.setattr(Client, "fit", watched)
    before = alive()
    run(from_finetuned(tmp_path / "run", method=MethodConfig("NPO", {"retain_loss_type": "KL"})))
    assert len(calls) == 7 and len(during) == 2
    new = {(models - before[0], storages - before[1]) for models, storages in during}
    # LlamaForCausalLM and the LlamaModel in it, and one storage for the tied embeddings of both.
    assert new == {(2, 1)}


def test_one_reference_for_all_targets(small_local, small_examples):
    """The reference of several targets is one adapter, not one for each."""
    local = small_local()
    data = {"forget": small_examples[:4], "retain": small_examples[4:8]}
    client = client_over(local, [], ("a", "b"), **data)
    references = []
    for name in ("a", "b"):
        client.fit(task(NPO(), "forget", names=("a", "b")), Broadcast(snapshot(local.model)), name)
        references.append(client._reference)
    assert references[0] is references[1] is not None


def test_rows_are_tokenised_once_and_no_client_collects_garbage(small_run, tmp_path, monkeypatch):
    """Every ``train()`` call collected garbage and set itself up, and rows were tokenised anew in each epoch: 10 to 23
    percent of the time was not training."""
    from unfed.data import chat

    calls = {"render": 0, "collect": 0}
    render, collect = chat._render, gc.collect

    def counted(*args, **kwargs):
        calls["render"] += 1
        return render(*args, **kwargs)

    def collected(*args):
        calls["collect"] += 1
        return collect(*args)

    monkeypatch.setattr(chat, "_render", counted)
    monkeypatch.setattr(gc, "collect", collected)
    seen = []
    for rounds in (1, 6):
        calls.update(render=0, collect=0)
        run(small_run("finetune", tmp_path / f"{rounds}", method_args={"global_rounds": rounds}))
        seen.append(dict(calls))
    assert seen[0] == seen[1] and 0 < seen[0]["render"] <= 4 and seen[0]["collect"] == 0


# --- settings that had no effect --------------------------------------------------------------------------------------


def test_attention_and_device_map_take_effect_or_are_refused(small_run, small_base, tmp_path):
    """``attn_implementation`` and ``device_map`` were dropped on the way, without a word."""
    seen = {}
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: (seen.update(k), original(*a, **k))[1])
        run(small_run("finetune", tmp_path / "run", model_args={"attn_implementation": "eager", "device_map": "cpu"}))
    assert seen["attn_implementation"] == "eager" and seen["device_map"] == "cpu"
    for bad in ({"attn_implementation": "sdp"}, {"device_map": "nonsense"}):
        with pytest.raises(UnfedError, match=next(iter(bad.values()))):
            run(small_run("finetune", tmp_path / "bad", model_args=bad))


@pytest.mark.parametrize(("clients", "steps"), [(1, 5), (3, 5)])
def test_warm_up_counts_the_clients_own_steps(small_local, small_examples, clients, steps):
    """Warm-up was computed from the number of clients, and divided by the number of GPUs: no training on a CPU."""
    local, rates = small_local(logging_steps=1, warmup_epochs=1, use_cpu=True), []
    names = tuple("abc"[:clients])
    client = client_over(local, small_examples, names)
    client.on_step = lambda _task, name, event: rates.append(event.lr) if name == "a" else None
    for round_ in range(2):
        for name in names:
            client.fit(task(round_=round_, rounds=2, names=names), Broadcast(snapshot(local.model)), name)
    peak = rates.index(max(rates)) + 1  # each told after its step
    assert peak == steps and max(rates) == pytest.approx(1e-2) and rates[-1] == 0.0


def test_padding_that_shares_its_id_with_eos_is_masked_by_length(small_base):
    """With pad = eos, masks made by comparing ids hid the real ends of turns."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_base)
    tokenizer.pad_token = tokenizer.eos_token
    texts = [{"id": str(i), "question": "Who?", "answer": "Bo bakes. " * (i + 1)} for i in range(2)]
    encoded = encode_rows(tokenizer, Template(system_prompt="Be brief."), texts)
    batch = collate(encoded, tokenizer.pad_token_id)
    for row, example in enumerate(encoded):
        n = len(example)
        assert example.input_ids.count(tokenizer.eos_token_id) >= 3  # system, user and assistant turns
        assert batch.attention_mask[row].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
        assert batch.labels[row, n - 1] == tokenizer.eos_token_id and bool((batch.labels[row, n:] == -100).all())


# --- evaluation and files ---------------------------------------------------------------------------------------------

METRICS = ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_truth_ratio")


def evaluation(small_run, model: Path, data: Path, output: Path, *, batch_size: int = 32):
    config = small_run("finetune", output, model_args={"pretrained_model_name_or_path": str(model)})
    suite = EvalConfig(
        forget_split="forget01", limit=4, metrics=METRICS, batch_size=batch_size,
        generation=GenerationConfig(max_new_tokens=8),
    )  # fmt: skip
    paths = dataclasses.replace(config.paths, data_dir=str(data))
    return dataclasses.replace(config, mode="eval", trainer=None, aggregator=None, paths=paths, eval=suite)


def test_scores_do_not_depend_on_the_batch(small_run, finetuned, data_dir, tmp_path):
    """Token metrics depended on what else was in the batch."""
    found = []
    for size in (1, 3, 32):
        run(evaluation(small_run, finetuned, data_dir, tmp_path / f"{size}", batch_size=size))
        found.append(read_json(tmp_path / f"{size}" / "TOFU_EVAL.json"))
    for metric in METRICS:
        rows = [f[metric]["value_by_index"] for f in found]
        assert rows[0].keys() == rows[1].keys() == rows[2].keys() and len(rows[0]) == 4
        for index, row in rows[0].items():
            for other in rows[1:]:
                numbers = {k: v for k, v in row.items() if isinstance(v, float)}
                assert numbers and {k: other[index][k] for k in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)


def test_results_say_whose_they_are(small_run, finetuned, small_base, data_dir, tmp_path):
    """An evaluation read a cache that belonged to another model, and two models had the same results."""
    digests, scores = [], []
    for name, model in (("tuned", finetuned), ("base", small_base)):
        result = run(evaluation(small_run, model, data_dir, tmp_path / name))
        digests.append(read_json(tmp_path / name / "TOFU_EVAL.json")["_run"]["digests"])
        scores.append(result.summary)
    assert digests[0]["adapter"] == weights(finetuned).digest() != digests[1]["adapter"]
    assert digests[0]["base"] == digests[1]["base"] == read_json(finetuned / "unfed.json")["base_fingerprint"]
    assert digests[0]["data.forget"] == digests[1]["data.forget"]
    assert scores[0]["forget_Q_A_Prob"] != scores[1]["forget_Q_A_Prob"]


def test_evaluation_leaves_the_model_as_it_was(small_run, finetuned, data_dir, tmp_path, monkeypatch):
    """Evaluating left the model in another mode, and the training after it was not the one asked for."""
    from unfed.app import evaluate

    loaded = load_model(ModelArgs(str(finetuned), use_lora=True), TokenizerArgs(), trainable=True)
    loaded.model.train()
    next(m for n, m in loaded.model.named_modules() if n.endswith("layers.1")).eval()  # mixed modes, on purpose
    before = {n: m.training for n, m in loaded.model.named_modules()}
    grads = {n: p.requires_grad for n, p in loaded.model.named_parameters()}
    digest = snapshot(loaded.model).digest()
    evaluate.evaluate_model(evaluation(small_run, finetuned, data_dir, tmp_path / "e"), loaded, tmp_path / "e")
    assert {n: m.training for n, m in loaded.model.named_modules()} == before
    assert {n: p.requires_grad for n, p in loaded.model.named_parameters()} == grads
    assert snapshot(loaded.model).digest() == digest


def test_each_round_has_its_own_checkpoint(small_run, tmp_path):
    """Clients' checkpoints overwrote each other and nothing could be resumed: a killed run was lost."""
    config = small_run("finetune", tmp_path / "run", method_args={"global_rounds": 3})
    run(dataclasses.replace(config, engine=dataclasses.replace(config.engine, keep_checkpoints=9)))
    places = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [p.name for p in places] == ["round_00001", "round_00002", "round_00003"]
    saved = [read_tensors(p / "adapter.safetensors").digest() for p in places]
    rounds = read_json(tmp_path / "run" / "run.json")["rounds"]
    assert saved == [r["adapter_after"] for r in rounds] and len(set(saved)) == 3
    assert weights(tmp_path / "run").digest() == saved[-1]


def test_optional_libraries_are_not_imported(repo_root):
    """flash-attn and deepspeed were imported at the top of modules: without them nothing started."""
    optional = {"flash_attn", "deepspeed", "bitsandbytes", "nvflare", "ray", "wandb"}
    found = []
    for file in sorted((repo_root / "src").rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            # What a job runs inside NVFlare is imported there alone, Ray's own module by a run on Ray.
            allowed = {"nvflare_app.py": {"nvflare"}, "nvflare.py": {"nvflare"}, "ray.py": {"ray"}}
            wanted = optional - allowed.get(file.name, set())
            found += [f"{file.name}: {n}" for n in names if n.split(".")[0] in wanted]
    assert found == []
    assert not optional & {m.split(".")[0] for m in sys.modules if m.startswith(("flash", "deepspeed"))}


def test_a_setting_is_checked_before_the_first_client(small_run, tmp_path):
    """Of the same kind: an argument that cannot work stops the run, not every client one by one."""
    config = small_run("finetune", tmp_path / "run", args={"lr_scheduler_type": "reduce_lr_on_plateau"})
    with pytest.raises(ConfigError, match="reduce_lr_on_plateau"):
        run(config)
    assert loop_args({"lr_scheduler_type": "cosine"}).lr_scheduler_type == "cosine"
