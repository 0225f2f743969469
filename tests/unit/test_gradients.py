"""How a step's gradient is made: worked numbers on a few weights, and the same on a model however a step is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from unfed.base.errors import ConfigError, UnfedError
from unfed.base.types import AdapterState, Broadcast, LossTerms
from unfed.federated.client import Client, ClientData
from unfed.federated.schedule import FitTask, Phase, Work
from unfed.models.adapter import restore, snapshot
from unfed.objectives.base import Needs
from unfed.objectives.ewc import EWC
from unfed.objectives.grad_ascent import GradAscent
from unfed.objectives.grad_diff import GradDiff
from unfed.objectives.gru import GRU
from unfed.objectives.npo import NPO
from unfed.objectives.pdu import PDU
from unfed.objectives.proximal import Proximal
from unfed.objectives.sam import SAM
from unfed.objectives.wrappers import build_wrapper, misfits, wrapper_problems
from unfed.training.gradients import Passes, gradient_rule


@dataclass(frozen=True)
class Given:
    """Losses as functions of the weights; a micro-batch is its share of the step."""

    forget: Any
    retain: Any = None
    name = "Given"
    needs = Needs(frozenset({"forget", "retain"}))

    def __call__(self, ctx: Any) -> LossTerms:
        terms = {n: f() * ctx for n, f in (("forget", self.forget), ("retain", self.retain)) if f is not None}
        total = torch.stack(list(terms.values())).sum()
        return LossTerms(total, {n: t.detach() for n, t in terms.items()}, terms)


def weights(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def gradient(objective: Any, w: nn.Parameter, shares=(1.0,), rule=None) -> tuple[list[float], dict[str, float]]:
    w.grad = None
    passes = Passes(shares, lambda o, micro: o(micro), lambda loss: loss.backward(), [w])
    sums = (rule or gradient_rule(objective))(objective, passes)
    assert w.grad is not None
    return w.grad.tolist(), {n: float(v) for n, v in sums.items()}


# --- SAM --------------------------------------------------------------------------------------------------------------


def test_sam_by_hand():
    """``forget = w^2``, ``retain = 3 w`` at 2: the forget gradient is 4, so the perturbed weight is 2.5 and its 5."""
    w = weights(2.0)
    given = Given(lambda: w.square().sum(), lambda: 3 * w.sum())
    grad, sums = gradient(SAM(given, rho=0.5), w)
    assert grad == [5.0 + 3.0] and w.tolist() == [2.0]
    assert sums == {"loss": 10.0, "forget": 4.0, "retain": 6.0}, "the losses are those at the weights"


def test_sams_perturbation_has_length_rho_over_all_weights():
    w = weights(3.0, -4.0)
    seen = []
    given = Given(lambda: (seen.append(w.tolist()), 0.5 * w.square().sum())[1])
    grad, _ = gradient(SAM(given, rho=1.0), w)
    assert seen[1] == pytest.approx([3.6, -4.8]) and grad == pytest.approx([3.6, -4.8])
    assert w.tolist() == [3.0, -4.0] and len(seen) == 2, "nothing but a forget term: no third pass"


def test_sam_without_a_gradient_stands_still():
    w = weights(0.0)
    grad, _ = gradient(SAM(Given(lambda: w.square().sum(), lambda: 3 * w.sum()), rho=0.5), w)
    assert grad == [3.0] and w.tolist() == [0.0]


def test_the_weights_come_back_when_a_pass_fails():
    w, calls = weights(2.0), []

    def forget():
        calls.append(1)
        if len(calls) == 2:
            assert w.tolist() == [2.5]
            raise ZeroDivisionError
        return w.square().sum()

    with pytest.raises(ZeroDivisionError):
        gradient(SAM(Given(forget), rho=0.5), w)
    assert w.tolist() == [2.0]


def test_a_loss_without_terms_cannot_be_taken_apart():
    w = weights(1.0)

    class Whole:
        name, needs = "Whole", Needs(frozenset({"forget"}))

        def __call__(self, ctx):
            return LossTerms(w.sum())

    for wrapped in (SAM(Whole()), GRU(Whole())):
        with pytest.raises(UnfedError, match="does not tell its"):
            gradient(wrapped, w)


# --- GRU --------------------------------------------------------------------------------------------------------------


def test_gru_by_hand():
    """Gradients (2, 1) and (-1, 0) disagree: what is left of the first is (0, 1), at right angles to the second."""
    w = weights(0.0, 0.0)
    forget, retain = torch.tensor([2.0, 1.0]).double(), torch.tensor([-1.0, 0.0]).double()
    grad, sums = gradient(GRU(Given(lambda: forget @ w + 3.0, lambda: retain @ w), gamma=1.0), w)
    assert grad == [0.0, 1.0] and sums == {"loss": 3.0, "forget": 3.0, "retain": 0.0}


@pytest.mark.parametrize("shares", [(1.0,), (0.25, 0.75)])
def test_gru_leaves_gradients_that_agree_and_never_goes_against_the_retain_gradient(shares):
    g = torch.Generator().manual_seed(0)
    agreed = 0
    for _ in range(20):
        forget, retain = torch.randn(2, 5, generator=g, dtype=torch.float64)
        w = weights(*[0.0] * 5)
        linear = Given(lambda f=forget, w=w: f @ w, lambda r=retain, w=w: r @ w)
        grad, _ = gradient(GRU(linear, gamma=1.0), w, shares)
        inner = float(torch.tensor(grad, dtype=torch.float64) @ retain)
        if float(forget @ retain) >= 0:
            agreed += 1
            assert grad == pytest.approx(forget.tolist(), rel=1e-12)
        else:
            assert inner == pytest.approx(0.0, abs=1e-12)
            nearest = forget - (forget @ retain) / (retain @ retain) * retain
            assert grad == pytest.approx(nearest.tolist())
    assert 0 < agreed < 20


def test_grus_average_over_steps_by_hand():
    """gamma 0.5: after retain gradients (-4, 0) and (0, -4) the average is (-1, -2), of which (1, 2) loses itself."""
    w = weights(0.0, 0.0)
    steps = [torch.tensor([-4.0, 0.0]).double(), torch.tensor([0.0, -4.0]).double()]
    objective = GRU(Given(lambda: torch.tensor([1.0, 2.0]).double() @ w, lambda: steps[0] @ w), gamma=0.5)
    rule = gradient_rule(objective)
    assert gradient(objective, w, rule=rule)[0] == [0.0, 2.0]
    steps.pop(0)
    assert gradient(objective, w, rule=rule)[0] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert gradient(objective, w)[0] == [1.0, 0.0], "a new rule has no past"


# --- PDU --------------------------------------------------------------------------------------------------------------


def duals(method: PDU, retain: list[float], per_epoch: int = 1, before: int = 0) -> list[float]:
    w = weights(1.0)
    rule = gradient_rule(method, before, per_epoch)

    class Ctx:
        def __init__(self, loss):
            self.loss = loss

        def logits(self, split, positions):
            return torch.stack([w[0], -w[0]]).unsqueeze(0)

        def count(self, split, positions):
            return 1

        def nll(self, split):
            return self.loss * w.sum()

        def micro_share(self):
            return 1.0

    return [gradient(method, w, (Ctx(loss),), rule)[1]["dual"] for loss in retain]


def test_the_dual_variable_by_hand():
    method = PDU(alpha=2.0, retain_loss_eps=0.5, dual_step_size=4.0)
    # 2; + 4 (0.75 - 0.5) = 3; + 4 (0.5 - 0.5) = 3; + 4 (0.25 - 0.5) = 2; + 4 (-0.5) = 0; max(0, -2) = 0
    assert duals(method, [0.75, 0.5, 0.25, 0.0, 0.0, 9.0]) == [2.0, 3.0, 3.0, 2.0, 0.0, 0.0]


def test_the_dual_variable_waits_for_the_warm_up_and_moves_once_an_epoch_where_asked():
    method = PDU(alpha=1.0, retain_loss_eps=0.0, dual_step_size=1.0, dual_warmup_epochs=1)
    assert duals(method, [1.0] * 5, per_epoch=2) == [1.0, 1.0, 1.0, 2.0, 3.0]
    assert duals(method, [1.0] * 3, per_epoch=2, before=2) == [1.0, 2.0, 3.0], "the phase's epochs count"
    by_epoch = PDU(alpha=1.0, retain_loss_eps=0.0, dual_step_size=1.0, dual_update_upon="epoch")
    assert duals(by_epoch, [1.0, 3.0, 1.0, 1.0, 5.0], per_epoch=2) == [1.0, 1.0, 3.0, 3.0, 4.0]


# --- which goes around which ------------------------------------------------------------------------------------------


def test_without_its_constraint_it_descends_the_forget_term_alone():
    """A client that owns nothing to retain has no multiplier: d/dw of 3 w is 3, whatever is around PDU."""
    w = weights(1.0)
    rule = gradient_rule(PDU().forget_alone())
    grads, sums = gradient(Given(lambda: 3 * w.sum()), w, rule=rule)
    assert grads == [3.0] and sums == {"loss": 3.0, "forget": 3.0}


def test_wrappers_are_checked_before_anything_is_built():
    assert wrapper_problems("SAN", {}) == ["unknown wrapper 'SAN'; did you mean 'SAM'? (choices: EWC, GRU, SAM)"]
    assert wrapper_problems("SAM", {"rho": -1}) == ["wrapper.rho: must be a number at least 0, not -1"]
    assert wrapper_problems("GRU", {"gamma": 2}) == ["wrapper.gamma: must be a number above 0 and at most 1, not 2"]
    assert "must be a whole number at least 1, not 0.5" in wrapper_problems("EWC", {"fisher_rows": 0.5})[0]
    assert "did you mean 'rho'" in wrapper_problems("SAM", {"roh": 1})[0]
    for lone in (GradAscent(), GradDiff(alpha=0)):
        assert "needs a retain term" in misfits("GRU", lone)[0]
        assert misfits("SAM", lone) == misfits("EWC", lone) == []
    with pytest.raises(ConfigError, match="wrapper=GRU: needs a retain term, and method=GradAscent has none"):
        build_wrapper("GRU", {}, GradAscent())
    made = Proximal(build_wrapper("SAM", {"rho": 0.5}, NPO()), 0.1)
    assert made.name == "NPO+SAM+proximal" and made.needs.anchor and made.needs.reference
    assert made.inner.settings() == {"rho": 0.5}
    assert EWC(NPO(), fisher_rows=3).needs.fisher_rows == 3


# --- on a model -------------------------------------------------------------------------------------------------------


def moved(start: AdapterState) -> AdapterState:
    g = torch.Generator().manual_seed(0)
    return AdapterState({n: t + 0.05 * torch.randn(t.shape, generator=g) for n, t in start.items()})


def fit(local, examples, objective, epochs=2.0, rounds=1):
    start = moved(snapshot(local.model))
    reference = moved(start)
    restore(local.model, start)
    client = Client(local, {"c": ClientData("c", {"forget": examples[:11], "retain": examples[4:]})}, reference)
    phase = Phase("p", rounds, {"c": Work("forget", objective, epochs)})
    return client.fit(FitTask(phase, 0, 0), Broadcast(start), "c"), start


SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.5}
WRAPPED = {
    "SAM": SAM(NPO(), rho=0.1),
    "SAM_forget_only": SAM(GradAscent(), rho=0.1),
    "SAM+proximal": Proximal(SAM(NPO(retain_loss_type="KL"), rho=0.1), 5.0),
    "GRU": GRU(GradDiff()),
    "GRU+proximal": Proximal(GRU(NPO()), 5.0),
    "EWC": EWC(GradDiff(), ewc_lambda=10.0, fisher_rows=4),
    "PDU": PDU(alpha=1.0, retain_loss_eps=2.0, dual_step_size=0.5),
    "SAM_PDU": SAM(PDU(alpha=1.0, retain_loss_eps=2.0, dual_step_size=0.5), rho=0.1),
    "GRU_PDU": GRU(PDU(alpha=1.0, retain_loss_eps=2.0, dual_step_size=0.5)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_step_is_a_step_however_it_is_cut(small_local, small_examples, name):
    """1x8 equals 2x4, with an uneven last step: weights and losses."""
    ends = []
    for micro in (8, 4):
        local = small_local(per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro, **SGD)
        ends.append(fit(local, small_examples, WRAPPED[name]))
    (one, start), (two, _) = ends
    alike = [{k: v for k, v in u.metrics.items() if k != "seconds"} for u in (one, two)]
    assert alike[1] == pytest.approx(alike[0], rel=1e-4)
    for n in start:
        torch.testing.assert_close(two.adapter[n], one.adapter[n], rtol=1e-4, atol=2e-6)
    assert max(float((one.adapter[n] - start[n]).abs().max()) for n in start) > 1e-3


def test_sam_with_rho_0_is_the_objective_and_otherwise_is_not(small_local, small_examples):
    plain, _ = fit(small_local(**SGD), small_examples, NPO())
    for rho, same in ((0.0, True), (0.5, False)):
        wrapped, _ = fit(small_local(**SGD), small_examples, SAM(NPO(), rho=rho))
        gap = max(float((wrapped.adapter[n] - plain.adapter[n]).abs().max()) for n in plain.adapter)
        assert (gap < 2e-6) is same
    assert plain.metrics.keys() == wrapped.metrics.keys()


@pytest.mark.parametrize("name", ["SAM", "GRU", "EWC", "PDU"])
@pytest.mark.parametrize("given", [{"bf16": True}, {"gradient_checkpointing": True}], ids=["bf16", "checkpointing"])
def test_precision_and_checkpointing(small_local, small_examples, name, given):
    """Checkpointing changes nothing; under bfloat16 autocast the weights move much alike."""
    exact, start = fit(small_local(**SGD), small_examples, WRAPPED[name], epochs=1.0)
    other, _ = fit(small_local(**SGD, **given), small_examples, WRAPPED[name], epochs=1.0)
    way = [torch.cat([(u.adapter[n] - start[n]).flatten() for n in start]) for u in (exact, other)]
    cosine = float(torch.nn.functional.cosine_similarity(way[0], way[1], dim=0))
    assert cosine > (0.9 if "bf16" in given else 0.99999)


def test_the_same_fit_gives_the_same_bits(small_local, small_examples):
    for name in ("SAM", "GRU", "EWC", "PDU"):
        ends = []
        for _ in range(2):
            torch.rand(3)
            ends.append(fit(small_local(dropout=0.2), small_examples, WRAPPED[name])[0].adapter.digest())
        assert ends[0] == ends[1]
