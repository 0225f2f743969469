"""Objectives on a transformers model: known losses and gradient norms, and gradient accumulation.

The known values come from the public OpenUnlearning code (float32, CPU), see the shared golden README.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from unfed.base.types import IGNORE_INDEX, Batch, Split
from unfed.models.adapter import snapshot
from unfed.objectives.base import Counted, Objective, Positions, StepContext
from unfed.objectives.nll import NLL
from unfed.objectives.proximal import Proximal
from unfed.objectives.registry import UNLEARNING_METHODS, build_objective
from unfed.objectives.tokens import kl_divergence
from unfed.training.batches import totals_of
from unfed.training.context import Companions, ModelContext, Reference

CASES = (
    "GradAscent",
    "GradDiff_NLL",
    "GradDiff_KL__ref_tiny_ref",
    "NPO_NLL__ref_tiny_ref",
    "NPO_KL__ref_tiny_ref",
    "NPO_NLL__ref_self",
    "SimNPO",
    "UNDIAL__ref_tiny_ref",
)


def labelled_positions(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the labelled tokens of ``labels`` ``(B, T)`` are predicted.

    Returns ``(rows, positions, targets)``, each ``(N,)`` int64 and ordered by row, then position:
    ``logits[rows, positions]`` predicts ``targets``. A label at position 0 has no prediction.
    """
    rows, positions = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows, positions, labels[rows, positions + 1]


def target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of ``targets`` ``(N,)`` under ``logits`` ``(N, V)``: ``(N,)``, at least float32."""
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def sum_by_row(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Sums of ``values`` ``(N,)`` over the entries of each row: ``(num_rows,)``; 0 for a row without any."""
    return values.new_zeros(num_rows).index_add(0, rows, values)


class PlainContext:
    """A ``StepContext`` straight over two models, any dtype; ``whole`` holds the whole step's batches."""

    def __init__(
        self,
        policy: LlamaForCausalLM,
        reference: LlamaForCausalLM,
        batches: Mapping[Split, Batch],
        whole: Mapping[Split, Batch] | None = None,
        origin: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.policy, self.reference, self.batches = policy, reference, batches
        self.whole = whole or batches
        self.origin = origin or {}
        self._logits: dict[Split, Tensor] = {}

    def _everywhere(self, split: Split) -> Tensor:
        if split not in self._logits:
            batch = self.batches[split]
            self._logits[split] = self.policy(batch.input_ids, attention_mask=batch.attention_mask).logits
        return self._logits[split]

    def _at(self, logits: Tensor, split: Split, positions: Positions) -> Tensor:
        rows, where, _ = labelled_positions(self.batches[split].labels)
        return logits if positions == "all" else logits[rows, where]

    def logits(self, split: Split, positions: Positions = "answer") -> Tensor:
        return self._at(self._everywhere(split), split, positions)

    def labels(self, split: Split) -> Tensor:
        return labelled_positions(self.batches[split].labels)[2]

    def label_mask(self, split: Split) -> Tensor:
        return self.batches[split].labels != IGNORE_INDEX

    def reference_logits(self, split: Split, positions: Positions = "answer") -> Tensor:
        batch = self.batches[split]
        with torch.no_grad():
            logits = self.reference(batch.input_ids, attention_mask=batch.attention_mask).logits
        return self._at(logits, split, positions)

    def count(self, split: Split, counted: Counted) -> int:
        batch = self.whole[split]
        return {"answer": int(batch.num_label_tokens.sum()), "all": batch.labels.numel(), "examples": len(batch)}[
            counted
        ]

    def count_after(self, split: Split, skipped: int) -> int:
        return int((self.whole[split].num_label_tokens - skipped).clamp(min=0).sum())

    def token_logps(self, split: Split) -> Tensor:
        return target_logps(self.logits(split), self.labels(split))

    def row(self, split: Split) -> Tensor:
        return labelled_positions(self.batches[split].labels)[0]

    def logps(self, split: Split) -> Tensor:
        return sum_by_row(self.token_logps(split), self.row(split), len(self.batches[split]))

    def num_tokens(self, split: Split) -> Tensor:
        return self.batches[split].num_label_tokens

    def reference_logps(self, split: Split) -> Tensor:
        values = target_logps(self.reference_logits(split), self.labels(split))
        return sum_by_row(values, self.row(split), len(self.batches[split]))

    def token_mean(self, split: Split, values: Tensor) -> Tensor:
        return values.sum() / self.whole[split].num_label_tokens.sum()

    def example_mean(self, split: Split, values: Tensor) -> Tensor:
        return values.sum() / len(self.whole[split])

    def nll(self, split: Split) -> Tensor:
        return self.token_mean(split, -self.logps(split))

    def kl(self, split: Split, positions: Positions = "answer") -> Tensor:
        values = kl_divergence(self.reference_logits(split, positions), self.logits(split, positions))
        return values.sum() / self.count(split, positions)

    def hidden(self, split: Split, module: str) -> Tensor:
        return self._hidden(self.policy, split, module)

    def reference_hidden(self, split: Split, module: str) -> Tensor:
        with torch.no_grad():
            return self._hidden(self.reference, split, module)

    def _hidden(self, model: LlamaForCausalLM, split: Split, module: str) -> Tensor:
        batch, seen = self.batches[split], []
        (found,) = (m for n, m in model.named_modules() if n and re.fullmatch(module, n))
        handle = found.register_forward_hook(lambda _m, _a, output: seen.append(output))
        model(batch.input_ids, attention_mask=batch.attention_mask)
        handle.remove()
        return seen[0]

    def adapter_distance_sq(self) -> Tensor:
        parameters = self.policy.named_parameters()
        return torch.stack([(p - self.origin[n]).square().sum() for n, p in parameters]).sum()

    def tail_norm(self) -> Tensor:
        raise NotImplementedError

    def micro_share(self) -> float:
        mine, whole = next((len(self.batches[s]), len(self.whole[s])) for s in self.batches)
        return mine / whole


def production_context(
    policy: LlamaForCausalLM, other: LlamaForCausalLM, batches: Mapping[Split, Batch]
) -> ModelContext:
    """The context that training uses; ``other`` becomes a set of weights on the policy's own model."""
    reference = Reference(policy, snapshot(other))
    for split, batch in batches.items():
        reference.prepare(split, [batch])
    return ModelContext(policy, batches, totals_of([batches]), "forget", Companions(reference))


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> dict[str, Any]:
    folder = shared_dir / "golden" / "losses"
    tensors = load_file(folder / "tiny_batch.safetensors")
    splits: tuple[Split, ...] = ("forget", "retain", "alternate")
    return json.loads((folder / "tiny_losses.json").read_text()) | {
        "batches": {
            s: Batch(
                tensors[f"{s}.input_ids"],
                tensors[f"{s}.attention_mask"],
                tensors[f"{s}.labels"],
                tuple(f"{s}/{i}" for i in range(len(tensors[f"{s}.labels"]))),
            )
            for s in splits
        }
    }


@pytest.fixture(scope="module")
def golden_models(shared_dir: Path) -> dict[str, LlamaForCausalLM]:
    folder = shared_dir / "golden" / "models"
    return {n: LlamaForCausalLM.from_pretrained(folder / n, dtype=torch.float32).eval() for n in ("tiny", "tiny_ref")}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_agree_with_openunlearning(
    case: str, golden: dict[str, Any], golden_models: dict[str, LlamaForCausalLM]
) -> None:
    known = golden["cases"][case]
    objective = build_objective(known["trainer"], {**known["method_args"], **parity_of(known["trainer"])})
    policy = golden_models["tiny"]
    reference = golden_models["tiny_ref"] if known["ref_model"] == "tiny_ref" else policy
    policy.zero_grad(set_to_none=True)

    terms = objective(production_context(policy, reference, golden["batches"]))
    terms.total.backward()

    assert terms.total.item() == pytest.approx(known["loss"], rel=1e-5)
    if "retain_loss" in known:
        if known["method_args"]["alpha"] > 0:
            assert terms.parts["retain"].item() == pytest.approx(known["retain_loss"], rel=1e-5)
        assert terms.parts["forget"].item() == pytest.approx(known["forget_loss_derived"], rel=1e-5)
    norms = {n: p.grad.norm().item() for n, p in policy.named_parameters() if p.grad is not None}
    for name, norm in known["grad_norm"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-4), name
    total = sum(n**2 for n in norms.values()) ** 0.5
    assert total == pytest.approx(known["grad_norm_total"], rel=1e-4)


def test_rmu_on_the_golden_model_is_openunlearnings_formula(
    golden: dict[str, Any], golden_models: dict[str, LlamaForCausalLM]
) -> None:
    """Written out from hidden states in full-parameter mode: the formula, defect included, and its gradient."""
    policy, reference = golden_models["tiny"], golden_models["tiny_ref"]
    torch.manual_seed(0)
    vector = torch.rand(1, 1, 64)
    vector = vector / vector.norm() * 2.0

    def loss(states: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        sums = ((states - target).square() * mask.unsqueeze(-1)).mean(dim=2).sum(dim=1)
        return (sums / mask.sum(dim=1, keepdim=True)).mean()

    def states(model: LlamaForCausalLM, split: Split) -> Tensor:
        b = golden["batches"][split]
        return model(b.input_ids, attention_mask=b.attention_mask, output_hidden_states=True).hidden_states[1]

    masks = {s: golden["batches"][s].labels != IGNORE_INDEX for s in ("forget", "retain")}
    with torch.no_grad():
        target = states(reference, "retain")
    parts = (
        loss(states(policy, "forget"), vector, masks["forget"]),
        loss(states(policy, "retain"), target, masks["retain"]),
    )
    parameters = dict(policy.named_parameters())
    grads = torch.autograd.grad(parts[0] + 3.0 * parts[1], list(parameters.values()), allow_unused=True)

    given = MODULE | {"alpha": 3.0, "parity": "openunlearning"}
    objective = replace(build_objective("RMU", given), control_vec=tuple(vector.flatten().tolist()))
    policy.zero_grad(set_to_none=True)
    terms = objective(production_context(policy, reference, golden["batches"]))
    terms.total.backward()
    assert terms.parts["forget"].item() == pytest.approx(parts[0].item(), rel=1e-5)
    assert terms.parts["retain"].item() == pytest.approx(parts[1].item(), rel=1e-5)
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        assert (parameter.grad is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)
    honest = replace(objective, parity=None)(production_context(policy, reference, golden["batches"]))
    assert abs(honest.parts["forget"].item() / parts[0].item() - 1) > 1e-3, "the paper's mean is another number"


def parity_of(method: str) -> dict[str, str]:
    return {} if method == "GradAscent" else {"parity": "openunlearning"}


def test_sequence_log_likelihoods_agree_with_openunlearning(
    golden: dict[str, Any], golden_models: dict[str, LlamaForCausalLM]
) -> None:
    ctx = production_context(golden_models["tiny"], golden_models["tiny_ref"], golden["batches"])
    with torch.no_grad():
        for split, nll in golden["sum_nll"].items():
            mean = -ctx.logps(split) / ctx.num_tokens(split)
            torch.testing.assert_close(mean, torch.tensor(nll) / ctx.num_tokens(split), rtol=0, atol=1e-4)
            assert ctx.nll(split).item() == pytest.approx(golden["mean_loss"][split], rel=1e-5)
        for split, nll in golden["sum_nll_ref_tiny_ref"].items():
            mean = -ctx.reference_logps(split) / ctx.num_tokens(split)
            torch.testing.assert_close(mean, torch.tensor(nll) / ctx.num_tokens(split), rtol=0, atol=1e-4)


def test_dpo_follows_from_the_known_sequence_log_likelihoods(
    golden: dict[str, Any], golden_models: dict[str, LlamaForCausalLM]
) -> None:
    """No known DPO loss exists; its four log-likelihoods do, from the same code."""
    now, before = golden["sum_nll"], golden["sum_nll_ref_tiny_ref"]
    beta, pairs = 0.1, []
    for row in range(4):
        chosen, rejected = (before[s][row] - now[s][row] for s in ("alternate", "forget"))
        pairs.append(2 / beta * math.log1p(math.exp(-beta * (chosen - rejected))))
    objective = build_objective("DPO", {"beta": beta, "gamma": 2.0, "alpha": 0.5})
    with torch.no_grad():
        terms = objective(production_context(golden_models["tiny"], golden_models["tiny_ref"], golden["batches"]))
    forget, retain = sum(pairs) / 4, golden["mean_loss"]["retain"]
    assert terms.parts["forget"].item() == pytest.approx(forget, rel=1e-5)
    assert terms.total.item() == pytest.approx(2.0 * forget + 0.5 * retain, rel=1e-5)


@pytest.mark.parametrize("shift", [0, 1])
def test_pdu_counts_the_positions_that_predict_the_answer_and_by_parity_those_that_hold_it(
    golden: dict[str, Any], golden_models: dict[str, LlamaForCausalLM], shift: int
) -> None:
    """OpenUnlearning masks the logits with the labels as they stand, so its mean lies one position further right."""
    policy, batch = golden_models["tiny"], golden["batches"]["forget"]
    with torch.no_grad():
        logits = policy(batch.input_ids, attention_mask=batch.attention_mask).logits
    spread = (logits.max(dim=-1).values - logits.mean(dim=-1)).square()
    labelled = batch.labels != IGNORE_INDEX
    mean = spread[:, : spread.shape[1] - shift][labelled[:, shift:]].mean()
    objective = build_objective("PDU", {"parity": None if shift else "openunlearning"})
    with torch.no_grad():
        terms = objective(production_context(policy, golden_models["tiny_ref"], golden["batches"]))
    assert terms.parts["forget"].item() == pytest.approx(mean.item(), rel=1e-5)


def test_undial_ignores_padding_unless_parity(
    golden: dict[str, Any], golden_models: dict[str, LlamaForCausalLM]
) -> None:
    """By default the answers' tokens count alone; by parity every position, and one token stands in for no label."""
    batches = golden["batches"]
    losses = {}
    for parity in (None, "openunlearning"):
        objective = build_objective("UNDIAL", {"parity": parity})
        for name, given in (("narrow", batches), ("wide", {s: padded(b, 7) for s, b in batches.items()})):
            with torch.no_grad():
                terms = objective(production_context(golden_models["tiny"], golden_models["tiny_ref"], given))
            losses[parity, name] = terms.total.item()
    assert losses[None, "wide"] == pytest.approx(losses[None, "narrow"], rel=1e-5)
    assert abs(losses["openunlearning", "wide"] / losses["openunlearning", "narrow"] - 1) > 0.001


def test_default_kl_ignores_padding_and_parity_kl_does_not(
    golden: dict[str, Any], golden_models: dict[str, LlamaForCausalLM]
) -> None:
    """Why parity is a switch: OpenUnlearning's KL changes when a batch is padded further."""
    batches = golden["batches"]
    wider = {s: padded(b, 7) for s, b in batches.items()}
    losses = {}
    for parity in (None, "openunlearning"):
        objective = build_objective("GradDiff", {"retain_loss_type": "KL", "parity": parity})
        for name, given in (("narrow", batches), ("wide", wider)):
            with torch.no_grad():
                terms = objective(production_context(golden_models["tiny"], golden_models["tiny_ref"], given))
            losses[parity, name] = terms.parts["retain"].item()
    assert losses[None, "wide"] == pytest.approx(losses[None, "narrow"], rel=1e-5)
    assert abs(losses["openunlearning", "wide"] / losses["openunlearning", "narrow"] - 1) > 0.01


def padded(batch: Batch, extra: int) -> Batch:
    def grow(tensor: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, extra), value=value)

    return Batch(grow(batch.input_ids, 0), grow(batch.attention_mask, 0), grow(batch.labels, -100), batch.example_ids)


@pytest.fixture(scope="module")
def tiny_random() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Policy and reference with random weights, in float64: nothing shared is needed."""
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(config).double().eval())
    return models[0], models[1]


def random_batch(seed: int) -> Batch:
    """Eight rows whose numbers of labelled tokens differ, right padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 37, (8, 12), generator=generator)
    length = torch.randint(6, 13, (8, 1), generator=generator)
    prompt = torch.randint(1, 5, (8, 1), generator=generator)
    at = torch.arange(12)
    mask = (at < length).long()
    labels = torch.where((at >= prompt) & (mask == 1), ids, -100)
    return Batch(ids * mask, mask, labels, tuple(str(i) for i in range(8)))


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    cut = slice(start, stop)
    return Batch(batch.input_ids[cut], batch.attention_mask[cut], batch.labels[cut], batch.example_ids[cut])


MODULE = {"module_regex": r"model\.layers\.0"}
OBJECTIVES: list[Objective] = [
    NLL(),
    *(build_objective(name, MODULE if name == "RMU" else {}) for name in UNLEARNING_METHODS),
    build_objective("RMU", MODULE | {"retain_loss_type": "KL"}),
    build_objective("PDU", {"parity": "openunlearning"}),
    build_objective("NPO", {"retain_loss_type": "KL"}),
    build_objective("GradDiff", {"retain_loss_type": "KL", "parity": "openunlearning"}),
    build_objective("UNDIAL", {"alpha": 0.5, "parity": "openunlearning"}),
    build_objective("CEU", {"ignore_first_n_answer_tokens": 4, "alpha": 1.0}),
    *(build_objective("FLAT", {"divergence": d}) for d in ("KL", "JS", "Pearson")),
    Proximal(build_objective("NPO", {"alpha": 0.5}), mu=0.3),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_micro_batches_add_up_to_the_step(
    objective: Objective, tiny_random: tuple[LlamaForCausalLM, LlamaForCausalLM]
) -> None:
    """1x8 equals 2x4 equals 8x1, in loss, parts and gradient, though rows have unequal token counts."""
    policy, reference = tiny_random
    whole = {split: random_batch(i) for i, split in enumerate(sorted(objective.needs.splits))}
    origin = {n: p.detach() + 0.01 for n, p in policy.named_parameters()}
    results = []
    for size in (8, 4, 1):
        policy.zero_grad(set_to_none=True)
        loss, parts = 0.0, {}
        for start in range(0, 8, size):
            micro = {s: rows_of(b, start, start + size) for s, b in whole.items()}
            ctx: StepContext = PlainContext(policy, reference, micro, whole, origin)
            terms = objective(ctx)
            terms.total.backward()
            loss += terms.total.item()
            for key, value in terms.parts.items():
                assert not value.requires_grad
                parts[key] = parts.get(key, 0.0) + value.item()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        results.append((loss, parts, gradient))
    for loss, parts, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-12)
        assert parts == pytest.approx(results[0][1], rel=1e-12)
        torch.testing.assert_close(gradient, results[0][2], rtol=1e-9, atol=1e-12)
    assert float(results[0][2].norm()) > 1e-3


def test_nll_is_the_loss_of_transformers(tiny_random: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    policy, reference = tiny_random
    batch = random_batch(3)
    with torch.no_grad():
        known = policy(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        ours = NLL()(PlainContext(policy, reference, {"train": batch})).total
    assert ours.item() == pytest.approx(known.item(), rel=1e-6)
