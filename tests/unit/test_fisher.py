"""EWC: its Fisher information against squared gradients made by hand, and its penalty."""

from __future__ import annotations

import pytest
import torch

from unfed.base.errors import UnfedError
from unfed.base.types import AdapterState, Broadcast
from unfed.federated.client import Client, ClientData
from unfed.federated.schedule import FitTask, Phase, Work
from unfed.models.adapter import restore, snapshot, trainable_parameters
from unfed.objectives.ewc import EWC
from unfed.objectives.grad_ascent import GradAscent
from unfed.training.fisher import Fisher


def noise(state: AdapterState, seed: int) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    return AdapterState({n: t + 0.05 * torch.randn(t.shape, generator=g) for n, t in state.items()})


@pytest.mark.parametrize("lora", [True, False])
def test_the_fisher_information_is_the_mean_of_squared_gradients(small_local, small_examples, lora):
    local = small_local(lora=lora, dropout=0.3 if lora else 0.0)
    start = noise(snapshot(local.model), 1)
    restore(local.model, start)
    parameters = trainable_parameters(local.model)
    local.model.eval()
    expected = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for example in small_examples[:3]:
        b = local.collation.batch([example])
        logps = local.model(input_ids=b.input_ids).logits.log_softmax(-1)
        loss = sum(logps[0, t - 1, b.labels[0, t]] for t in range(1, b.labels.shape[1]) if b.labels[0, t] != -100)
        for (n, _), grad in zip(parameters.items(), torch.autograd.grad(loss, list(parameters.values())), strict=True):
            expected[n] += grad.square() / 3
    local.model.train()
    restore(local.model, noise(start, 2))
    fisher = Fisher(local.model, start, [local.collation.batch([e]) for e in small_examples[:3]])
    assert local.model.training and all(p.grad is None for p in parameters.values())
    measured = {id(p): d for p, d in zip(fisher._parameters, fisher.diagonal, strict=True)}
    assert len(measured) == len(parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(measured[id(parameter)], expected[name], rtol=1e-3, atol=1e-6)

    now = snapshot(local.model)
    distance = fisher.distance_sq()
    own = {n.replace(".default", ""): f for n, f in expected.items()}
    by_hand = sum(float((own[n] * (now[n] - start[n]).square()).sum()) for n in own)
    assert float(distance.detach()) == pytest.approx(by_hand, rel=1e-3)
    distance.backward()
    name, parameter = next((n, p) for n, p in parameters.items() if float(expected[n].max()) > 0)
    short = name.replace(".default", "")
    torch.testing.assert_close(parameter.grad, 2 * own[short] * (now[short] - start[short]), rtol=1e-3, atol=1e-6)
    restore(local.model, start)
    assert float(fisher.distance_sq().detach()) == 0.0


def fit(local, examples, objective, start, **data):
    rows = {"forget": examples[:6], "retain": examples[6:], **data}
    client = Client(local, {"c": ClientData("c", rows)}, start)
    return client, client.fit(
        FitTask(Phase("p", 1, {"c": Work("forget", objective, 20.0)}), 0, 0), Broadcast(start), "c"
    )


def test_the_penalty_is_0_at_the_start_and_holds_the_weights(small_local, small_examples):
    ends = []
    for strength in (0.0, 20.0):
        local = small_local(optim="sgd", learning_rate=1e-3, max_grad_norm=0.0, lr_scheduler_type="constant")
        start = noise(snapshot(local.model), 1)
        seen = []

        class Watched(EWC):
            def __call__(self, ctx, seen=seen):
                terms = super().__call__(ctx)
                seen.append(float(terms.parts["ewc"]))
                return terms

        client, _ = fit(local, small_examples, Watched(GradAscent(), strength, fisher_rows=5), start)
        assert seen[0] == 0.0 and (max(seen) > 0.0) is (strength > 0)
        assert client._fisher is not None
        ends.append(float(client._fisher[1].distance_sq().detach()))
    assert ends[1] < 0.7 * ends[0]


def test_a_client_without_retain_rows_is_told(small_local, small_examples):
    local = small_local()
    with pytest.raises(UnfedError, match="c has no retain rows, whose Fisher information wrapper=EWC needs"):
        fit(local, small_examples, EWC(GradAscent()), snapshot(local.model), retain=[])


def test_the_rows_are_the_runs_draw(small_local, small_examples):
    digests = []
    for seed in (0, 0, 2):
        local = small_local(seed=seed, max_steps=1)
        client, _ = fit(local, small_examples, EWC(GradAscent(), fisher_rows=2), snapshot(local.model))
        digests.append(float(torch.stack([d.sum() for d in client._fisher[1].diagonal]).sum()))
    assert digests[0] == digests[1] != digests[2]
