"""RMU, PDU and every wrapper, federated with LoRA: under each server rule, and as whole runs that are resumed."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from unfed.aggregation.registry import AGGREGATORS, build_aggregator
from unfed.app.runs import run
from unfed.base.artifacts import digest_file, read_json
from unfed.base.errors import UnfedError
from unfed.base.types import ServerState
from unfed.config.schema import AggregatorConfig, MethodConfig, RecipeConfig, WrapperConfig
from unfed.federated.client import Client, ClientData
from unfed.federated.rounds import RoundsConfig, RunKeeper, run_rounds
from unfed.federated.schedule import Phase, Schedule, Work
from unfed.federated.transport import InProcess
from unfed.models.adapter import snapshot
from unfed.objectives.base import Objective
from unfed.objectives.ewc import EWC
from unfed.objectives.grad_diff import GradDiff
from unfed.objectives.gru import GRU
from unfed.objectives.nll import NLL
from unfed.objectives.npo import NPO
from unfed.objectives.pdu import PDU
from unfed.objectives.proximal import Proximal
from unfed.objectives.rmu import RMU
from unfed.objectives.sam import SAM

LAYER = r"model\.layers\.0"
OBJECTIVES: dict[str, Objective] = {
    "RMU": RMU(module_regex=LAYER),
    "PDU": PDU(alpha=1.0, retain_loss_eps=3.0, dual_step_size=0.1),
    "SAM": SAM(NPO(), rho=0.05),
    "SAM_RMU": SAM(RMU(module_regex=LAYER), rho=0.05),
    "GRU": GRU(GradDiff()),
    "EWC": EWC(NPO(), fisher_rows=2),
}


@pytest.mark.parametrize("rule", AGGREGATORS)
def test_each_unlearns_beside_other_clients_under_every_rule(small_local, small_examples, rule):
    """Two rounds: one client forgets, the other trains on what is kept; nothing is left out and the adapter moves."""
    server = build_aggregator(rule, {})

    def beside(objective: Objective) -> Objective:
        return Proximal(objective, server.client_proximal_mu) if server.client_proximal_mu > 0 else objective

    local = small_local(dropout=0.1, max_steps=1)
    start = snapshot(local.model)
    rows = {"forget": small_examples[:6], "retain": small_examples[6:12], "train": small_examples[12:]}
    for name, objective in OBJECTIVES.items():
        client = Client(local, {c: ClientData(c, rows) for c in ("client_0", "client_1")}, start)
        work = {"client_0": Work("forget", beside(objective), 1.0), "client_1": Work("train", beside(NLL()), 1.0)}
        keep = RunKeeper()
        schedule = Schedule((Phase("both", 2, work),))
        end = run_rounds(schedule, InProcess(client.fit), server, ServerState(0, start), RoundsConfig(), keep)
        assert [(r.clients, r.failures) for r in keep.records] == [(("client_0", "client_1"), {})] * 2, name
        assert end.adapter.digest() != start.digest()
        assert all(bool(t.isfinite().all()) for t in end.adapter.values())
        assert all(p.requires_grad for n, p in local.model.named_parameters() if "lora_" in n), "frozen only meanwhile"


FILES = ("adapter_model.safetensors", "partition.json", "unfed.json")


@pytest.mark.parametrize(
    ("method", "wrapper", "shown"),
    [
        (MethodConfig("RMU", {"module_regex": LAYER}), None, "RMU"),
        (MethodConfig("PDU", {"alpha": 1.0, "dual_step_size": 0.5}), None, "PDU"),
        (MethodConfig("GradDiff"), WrapperConfig("GRU"), "GradDiff+GRU"),
        (MethodConfig("NPO"), WrapperConfig("EWC", {"fisher_rows": 3}), "NPO+EWC+proximal"),
        (MethodConfig("RMU", {"module_regex": LAYER}), WrapperConfig("SAM", {"rho": 0.1}), "RMU+SAM"),
    ],
    ids=lambda v: v.name if v is not None and not isinstance(v, str) else str(v),
)
def test_a_run_that_is_cut_off_after_a_round_ends_in_the_same_bytes(from_finetuned, tmp_path, method, wrapper, shown):
    adaptive = AggregatorConfig("FedAdam", {"server_lr": 0.01})
    config = from_finetuned(
        tmp_path / "run",
        method=method,
        wrapper=wrapper,
        aggregator=AggregatorConfig("FedProx") if shown.endswith("proximal") else adaptive,
        recipe=RecipeConfig("interleaved"),
        method_args={"global_rounds": 3, "unlearn_epochs": 3},
    )
    run(config)
    directory = tmp_path / "run"
    whole = {f: digest_file(directory / f) for f in FILES}
    record = read_json(directory / "run.json")
    assert any(row[3] == f"{shown} on forget" for row in record["schedule"])
    settings = record["settings"]
    assert settings[method.name]["gamma"] == 1.0
    if wrapper is not None:
        assert settings[wrapper.name].keys() >= wrapper.params.keys() and settings[wrapper.name]
    rounds = sorted((directory / "checkpoints").glob("round_*"))
    assert len(rounds) == 2
    shutil.rmtree(rounds[-1])  # as if the process had been killed in the last round
    for name in FILES:
        (directory / name).unlink()
    torch.rand(7)
    run(dataclasses.replace(config, resume=True))
    assert {f: digest_file(directory / f) for f in FILES} == whole
    if wrapper is not None:
        with pytest.raises(UnfedError, match="wrapper"):
            run(dataclasses.replace(config, resume=True, wrapper=None))
