"""``clients.*`` in whole runs: stragglers, fixed work, control variates, and a resumption that meets them again."""

from __future__ import annotations

import dataclasses

import pytest

from unfed.app.runs import run
from unfed.app.turnout import estimate
from unfed.base.artifacts import digest_file, read_json
from unfed.base.errors import UnfedError
from unfed.config.schema import AggregatorConfig
from unfed.config.schema_clients import ClientsConfig
from unfed.federated.rounds import RunKeeper

SLOW = ClientsConfig(
    number=3, oversample=1.3, local_steps=3, speed={"client_3": 0.2}, speed_spread=0.4, speed_jitter=0.4, dropout=0.2,
    deadline=6.0,
)  # fmt: skip


def config_of(small_run, directory, **changes):
    shape = {"num_clients": 5, "global_rounds": 4}
    given = {"aggregator": AggregatorConfig("Scaffold"), "clients": SLOW} | changes
    return small_run("finetune", directory, method_args=shape, **given)


def rounds_of(directory):
    return [
        (r["clients"], r["failures"], r["simulated_seconds"], r["bytes_down"], r["bytes_up"], r["adapter_after"])
        for r in read_json(directory / "run.json")["rounds"]
    ]


@pytest.fixture(scope="module")
def whole(small_run, tmp_path_factory):
    return run(config_of(small_run, tmp_path_factory.mktemp("whole") / "run"))


def test_a_run_with_stragglers_and_control_variates(whole):
    reasons = " ".join(f for r in whole.records for f in r.failures.values())
    assert "missed the deadline" in reasons and "dropped out" in reasons
    for record in whole.records:
        assert 1 <= len(record.clients) <= 3 and len(record.clients) + len(record.failures) == 4
        assert set(record.metrics) == set(record.clients)
        assert all(m["steps"] == 3 and m["seconds"] > 0 and m["loss"] > 0 for m in record.metrics.values())
        assert record.bytes_up == sum(m["bytes_up"] for m in record.metrics.values())
        assert record.simulated_seconds is not None and 0 < record.simulated_seconds <= 6.0
    found = read_json(whole.directory / "run.json")
    assert found["round_mean"] == {
        "sentence": "clients.oversample: a round's mean leans to fast clients; no weights make up for that",
        "leans": True,
    }
    assert found["settings"]["Scaffold"] == {"weighting": "uniform", "server_lr": 1.0}


def test_it_resumes_to_the_same_bytes(whole, small_run, tmp_path, monkeypatch):
    save = RunKeeper.save

    def killed(self, state):
        save(self, state)
        if state.round == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunKeeper, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config_of(small_run, tmp_path / "run"))
    monkeypatch.setattr(RunKeeper, "save", save)
    again = run(dataclasses.replace(config_of(small_run, tmp_path / "run"), resume=True))
    assert rounds_of(again.directory) == rounds_of(whole.directory)
    weights = "adapter_model.safetensors"
    assert digest_file(again.directory / weights) == digest_file(whole.directory / weights)


def test_a_trace_that_changed_is_another_run(small_run, tmp_path):
    file = tmp_path / "there.csv"
    file.write_text("client,1,2\n" + "".join(f"client_{i},1,{i % 2}\n" for i in range(5)))
    clients = ClientsConfig(sampling="trace", availability=str(file))
    fednova = AggregatorConfig("FedNova")
    result = run(config_of(small_run, tmp_path / "run", clients=clients, aggregator=fednova))
    assert [len(r.clients) for r in result.records] == [5, 2, 5, 2]
    file.write_text(file.read_text().replace("client_0,1,0", "client_0,1,1"))
    with pytest.raises(UnfedError, match=r"another configuration: inputs.availability"):
        run(
            dataclasses.replace(
                config_of(small_run, tmp_path / "run", clients=clients, aggregator=fednova), resume=True
            )
        )
    wrong = ClientsConfig(speed={"klient_1": 2.0})
    with pytest.raises(UnfedError, match=r"clients.speed.klient_1: no such client; did you mean 'client_1'"):
        run(config_of(small_run, tmp_path / "wrong", clients=wrong))


@pytest.mark.parametrize(
    ("clients", "weighting", "said", "leans"),
    [
        (ClientsConfig(), "examples", "a ratio estimate of the mean over all examples", False),
        (ClientsConfig(), "uniform", "unbiased estimate of the mean over clients, not over examples", False),
        (
            ClientsConfig(sampling="by_size"),
            "uniform",
            "weighted equally: an unbiased estimate of the mean over all",
            False,
        ),
        (
            ClientsConfig(sampling="by_size"),
            "examples",
            "their size counts twice; set aggregator.weighting=uniform",
            True,
        ),
        (ClientsConfig(deadline=3.0), "examples", "leans to fast clients and to those with few rows", True),
        (ClientsConfig(sampling="trace"), "examples", "leans to clients that are there more often", True),
    ],
)
def test_what_the_mean_of_a_round_estimates(small_run, tmp_path, clients, weighting, said, leans):
    found = estimate(config_of(small_run, tmp_path, clients=clients), weighting, [4, 5, 6, 5], 2)
    assert found is not None and said in found.sentence and found.leans == leans


def test_a_client_too_large_for_its_share(small_run, tmp_path):
    given = config_of(small_run, tmp_path, clients=ClientsConfig(sampling="by_size"))
    found = estimate(given, "uniform", [20, 1, 1, 1], 2)
    assert found is not None and found.leans and "1 of 4 clients own more than" in found.sentence
    assert estimate(given, "uniform", [4, 5, 6, 5], 4) is None
