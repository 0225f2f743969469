"""RMU: worked numbers, the published defect beside the paper's mean, and its run on a model."""

from __future__ import annotations

import pytest
import torch

from unfed.app.runs import run
from unfed.base.errors import ConfigError, UnfedError
from unfed.base.types import AdapterState, Broadcast
from unfed.config.schema import MethodConfig
from unfed.federated.client import Client, ClientData
from unfed.federated.schedule import FitTask, Phase, Work
from unfed.models.adapter import restore, snapshot
from unfed.models.spec import LoraArgs
from unfed.objectives.registry import build_objective, objective_problems
from unfed.objectives.rmu import RMU, activation_loss, steering_vector
from unfed.training.batches import totals_of
from unfed.training.context import Companions, ModelContext, Reference

LAYER = r"model\.layers\.0"


def test_the_distance_by_hand():
    """Two examples of two tokens and two dimensions; the second example has one token that counts."""
    states = torch.tensor([[[1.0, 3.0], [2.0, 0.0]], [[0.0, 2.0], [9.0, 9.0]]], dtype=torch.float64)
    target = torch.tensor([1.0, 1.0], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    # (0 + 4) / 2 = 2 and (1 + 1) / 2 = 1, over two tokens; (1 + 1) / 2 = 1, over one.
    assert activation_loss(states, target, mask).tolist() == [1.5, 1.0]
    # There: sums 3 and 1, each times the mean of 1/2 and 1/1.
    theirs = activation_loss(states, target, mask, "openunlearning")
    assert theirs.tolist() == [2.25, 0.75]
    sums, lengths = torch.tensor([3.0, 1.0]), torch.tensor([[2.0], [1.0]])
    assert float(theirs.mean()) == pytest.approx(float((sums / lengths).mean()))  # (B,) by (B, 1) is (B, B)


def test_an_example_without_labels_counts_nothing_and_padding_may_hold_anything():
    states = torch.full((2, 3, 4), float("nan"))
    states[0, 0] = 1.0
    mask = torch.tensor([[True, False, False], [False, False, False]])
    assert activation_loss(states, torch.zeros(4), mask).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("parity", [None, "openunlearning"])
def test_gradients_in_float64(parity):
    torch.manual_seed(0)
    states = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    target, mask = torch.randn(4, dtype=torch.float64), torch.tensor([[True, True, False], [True, False, False]])
    assert torch.autograd.gradcheck(lambda x: activation_loss(x, target, mask, parity), (states,))


def test_the_vector_is_the_runs_and_has_the_length_asked_for():
    one = steering_vector(16, 6.5, seed=3)
    torch.rand(5)
    assert torch.equal(one, steering_vector(16, 6.5, seed=3)) and not torch.equal(one, steering_vector(16, 6.5, seed=4))
    assert float(one.norm()) == pytest.approx(6.5) and bool((one >= 0).all())
    assert torch.equal(RMU(steering_coeff=6.5, seed=3).vector(16), one)
    assert RMU(control_vec=(1.0, 2.0)).vector(2).tolist() == [1.0, 2.0]


def test_hyperparameters_and_their_mistakes():
    made = build_objective("RMU", {"trainable_params_regex": [r".*\.down_proj", "x"], "module_regex": "a.b"})
    assert made.settings()["trainable_params_regex"] == (r".*\.down_proj", "x")
    assert RMU(trainable_params_regex=".*x").trainable_params_regex == (".*x",)
    found = objective_problems(
        "RMU", {"module_regex": "(", "trainable_params_regex": [], "steering_coeff": 0, "seed": 1}
    )
    assert "method.module_regex: '(' is not a regular expression" in found[0]
    assert found[1] == "method.trainable_params_regex: must be regular expressions, not []"
    assert "method.steering_coeff: must be a number above 0" in found[2]
    assert "RMU has no such hyperparameter" in found[3]
    assert (
        "method.module_regex: must be a regular expression, not 7" in objective_problems("RMU", {"module_regex": 7})[0]
    )


def test_needs():
    usual = RMU().needs
    assert usual.splits == {"forget", "retain"} and usual.reference_distribution and usual.scope.only_below
    assert not RMU(retain_loss_type="NLL").needs.reference_distribution
    assert not RMU(retain_loss_type="NLL").needs.scope.only_below
    assert RMU(alpha=0).needs.splits == {"forget"} and RMU(alpha=0).needs.scope.only_below


def noise(state: AdapterState, seed: int) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    return AdapterState({n: t + 0.05 * torch.randn(t.shape, generator=g) for n, t in state.items()})


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("parity", [None, "openunlearning"])
def test_the_loss_on_a_model_against_its_hidden_states(small_local, small_examples, lora, parity):
    local = small_local(lora=lora)
    old = noise(snapshot(local.model), 1)
    reference = Reference(local.model, old)
    batches = {s: local.collation.batch(small_examples[i : i + 4]) for s, i in (("forget", 0), ("retain", 8))}

    def states(split):
        b = batches[split]
        out = local.model(input_ids=b.input_ids, attention_mask=b.attention_mask, output_hidden_states=True)
        return out.hidden_states[1].detach(), b.labels != -100

    local.model.eval()
    restore(local.model, old)
    theirs, _ = states("retain")
    restore(local.model, noise(old, 2))
    vector = tuple(torch.rand(32, generator=torch.Generator().manual_seed(7)).tolist())
    objective = RMU(module_regex=LAYER, gamma=0.5, alpha=3.0, parity=parity, control_vec=vector)
    ctx = ModelContext(local.model, batches, totals_of([batches]), "forget", Companions(reference))
    terms = objective(ctx)

    def loss(found, target, mask):
        each = torch.stack([((h - t).square().mean(-1) * m).sum() for h, t, m in zip(found, target, mask, strict=True)])
        counts = mask.sum(1)
        return each.mean() * (1.0 / counts).mean() if parity else (each / counts).mean()

    mine, mask = states("forget")
    forget = loss(mine, torch.tensor(vector).expand_as(mine), mask)
    mine, mask = states("retain")
    retain = loss(mine, theirs, mask)
    torch.testing.assert_close(terms.parts["forget"], forget, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.parts["retain"], retain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.total.detach(), 0.5 * forget + 3.0 * retain, rtol=1e-5, atol=1e-6)
    assert float(retain) > 1e-4


def fit(local, examples, objective, start):
    data = {"forget": examples[:6], "retain": examples[6:], "train": examples[6:]}
    client = Client(local, {"c": ClientData("c", data)}, start)
    phase = Phase("p", 1, {"c": Work("forget", objective, 2.0)})
    return client.fit(FitTask(phase, 0, 0), Broadcast(start), "c").adapter


def test_only_the_named_factors_below_the_module_move_and_later_training_moves_all(small_local, small_examples):
    local = small_local(dropout=0.1)
    start = snapshot(local.model)
    end = fit(local, small_examples, RMU(module_regex=LAYER, trainable_params_regex=(r".*\.(q|v)_proj",)), start)
    moved = {n for n in start if not torch.equal(start[n], end[n])}
    below = {n for n in start if ".layers.0." in n and ("q_proj" in n or "v_proj" in n)}
    assert moved <= below and {n for n in below if "lora_B" in n} <= moved
    again = fit(local, small_examples, build_objective("GradDiff", {}), end)
    assert {n for n in start if "lora_B" in n} <= {n for n in start if not torch.equal(end[n], again[n])}


def test_hidden_states_come_near_the_vector_with_checkpointing_and_bfloat16(small_local, small_examples):
    for given in ({"gradient_checkpointing": True}, {"bf16": True}):
        local = small_local(**given)
        objective = RMU(module_regex=LAYER, alpha=0.1, seed=5)
        curve = []
        start = snapshot(local.model)
        client = Client(
            local, {"c": ClientData("c", {"forget": small_examples[:6], "retain": small_examples[6:]})}, start
        )
        client.fit(FitTask(Phase("p", 1, {"c": Work("forget", objective, 20.0)}), 0, 0), Broadcast(start), "c")
        curve = client.curves["p"][0]
        assert curve[-1] < 0.9 * curve[0]


def test_what_checkpointing_cuts_off_is_said(small_local, small_examples):
    local = small_local(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(UnfedError, match="use_reentrant=false"):
        fit(local, small_examples, RMU(module_regex=LAYER + r"\.mlp"), snapshot(local.model))


@pytest.mark.parametrize(
    ("params", "shape", "said"),
    [
        ({}, {}, r"method.module_regex=model\\.layers\\.7: must match .* model.layers.0 to model.layers.1"),
        ({"module_regex": LAYER}, {"layers_to_transform": (1,)}, "so nothing could learn"),
        ({"module_regex": LAYER, "trainable_params_regex": ["mlp"]}, {}, "matches none of the"),
    ],
)
def test_a_mistake_is_found_before_the_model_is_loaded(small_run, tmp_path, monkeypatch, params, shape, said):
    monkeypatch.setattr("unfed.app.runs.load_model", None)
    lora = LoraArgs(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"), **shape)
    config = small_run("unlearn", tmp_path / "r", model_args={"lora_config": lora}, method=MethodConfig("RMU", params))
    with pytest.raises(ConfigError, match=said):
        run(config)
    assert not (tmp_path / "r").exists()
