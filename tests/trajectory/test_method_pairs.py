"""Every method under every aggregation rule and recipe, with LoRA: two clients of a step each."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from unfed.aggregation.registry import AGGREGATORS, build_aggregator
from unfed.app.schedules import _proximal
from unfed.base.types import AdapterState, ServerState
from unfed.data.chat import Template, encode_rows
from unfed.data.refusals import alternate_answers
from unfed.federated.client import Client, ClientData
from unfed.federated.rounds import RoundsConfig, RunKeeper, run_rounds
from unfed.federated.transport import InProcess
from unfed.models.adapter import snapshot
from unfed.models.load import load_model
from unfed.models.spec import LoraArgs, ModelArgs, TokenizerArgs
from unfed.objectives.nll import NLL
from unfed.objectives.registry import UNLEARNING_METHODS, build_objective
from unfed.training.args import loop_args
from unfed.training.batches import Collation, totals_of
from unfed.training.context import Companions, ModelContext, Reference
from unfed.training.loop import Local
from unfed.unlearning.base import Ingredients, Situation
from unfed.unlearning.interleaved import Interleaved
from unfed.unlearning.local_then_recover import LocalThenRecover

ARGS = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}

GIVEN = {"RMU": {"module_regex": "model.layers.0"}}  # the default is a block that the small model does not have


@pytest.fixture(scope="module")
def world(make_base, tmp_path_factory):
    """A model of one layer, an adapter that is not zero, and two clients, the first with forget rows."""
    base = make_base(tmp_path_factory.mktemp("pairs") / "base", layers=1, hidden=16)
    shape = LoraArgs(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=("q_proj", "v_proj"))
    loaded = load_model(ModelArgs(str(base), use_lora=True, lora_config=shape), TokenizerArgs(), trainable=True)
    local = Local(loaded.model, loop_args({"report_to": "none", **ARGS}), Collation(loaded.tokenizer.pad_token_id), 0)
    rows = [{"id": str(n), "question": f"What is {n}?", "answer": f"{n} is the number {n * n}."} for n in range(8)]
    right, other = (encode_rows(loaded.tokenizer, Template(), found) for found in (rows, alternate_answers(rows, 0)))
    splits = {"forget": right[:4], "alternate": other[:4], "retain": right[4:6], "train": right[4:6]}
    clients = {"a": ClientData("a", splits), "b": ClientData("b", {"train": right[6:]})}
    g = torch.Generator().manual_seed(0)
    start = AdapterState({n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in snapshot(loaded.model).items()})
    return local, clients, start


def shown_passes(repo_root: Path) -> dict[str, tuple[str, str]]:
    """The columns ``passes`` and ``reference`` of the guide's table."""
    lines = (repo_root / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    found = (re.fullmatch(r"\| `(\w+)` \|.*\| (\d) \| (\w+) \|", line) for line in lines)
    return {m[1]: (m[2], m[3]) for m in found if m is not None}


@pytest.mark.parametrize("method", UNLEARNING_METHODS)
def test_the_guide_counts_the_passes_of_a_step(world, method, repo_root):
    local, clients, start = world
    objective, passes = build_objective(method, GIVEN.get(method, {})), Counter()
    batches = {s: local.collation.batch(clients["a"].splits[s][:2]) for s in sorted(objective.needs.splits)}
    reference = Reference(local.model, start)
    hook = local.model.get_base_model().model.register_forward_hook(
        lambda *_: passes.update(["policy" if torch.is_grad_enabled() else "reference"])
    )
    try:
        for split in objective.needs.splits - {"retain"} if objective.needs.reference else ():
            reference.prepare(split, [batches[split]])
        once = passes.pop("reference", 0)
        driver = next(iter(batches))
        ctx = ModelContext(local.model, batches, totals_of([batches]), driver, Companions(reference))
        objective(ctx).total.backward()
    finally:
        hook.remove()
        local.model.zero_grad(set_to_none=True)
    said = (str(passes["policy"]), "once" if once else str(passes["reference"]))
    assert shown_passes(repo_root)[method] == said


@pytest.mark.parametrize("method", UNLEARNING_METHODS)
def test_a_method_under_every_rule(world, method):
    local, clients, start = world
    ends = {}
    for name in AGGREGATORS:
        rule = build_aggregator(name, {}, lora_scaling=2.0, probe_seed=0)
        forget, retain = _proximal(build_objective(method, GIVEN.get(method, {})), rule), _proximal(NLL(), rule)
        given = Ingredients(Situation(("a",), ("a", "b")), forget, retain, 1.0, 1.0, 1)
        for recipe in (LocalThenRecover, Interleaved):
            schedule = recipe().plan(given).schedule
            client, keeper = Client(local, clients, start), RunKeeper()
            state = run_rounds(schedule, InProcess(client.fit), rule, ServerState(0, start), RoundsConfig(0), keeper)
            records = keeper.records
            assert [r.phase for r in records] == [p.name for p in schedule.phases]
            assert not any(r.failures for r in records) and "forget" in records[0].metrics["a"]
            assert records[0].metrics["a"]["finite"] == 1.0
            moved = {start.digest(), *(r.adapter_after for r in records)}
            assert len(moved) == 1 + len(records), "every round moved the adapter"
            assert all(bool(t.isfinite().all()) for t in state.adapter.values())
            ends[name, recipe] = records[0].adapter_after
    unlearned = {end for (name, recipe), end in ends.items() if recipe is LocalThenRecover and name != "FedProx"}
    assert len(unlearned) == 1, "what the target unlearned is adopted, whatever the rule"
    assert len({end for (_, recipe), end in ends.items() if recipe is Interleaved}) > 3, "here the rule acts on it"
