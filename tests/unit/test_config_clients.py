"""Mistakes in ``clients.*`` are named before anything is loaded."""

from __future__ import annotations

import pytest

from unfed.base.errors import ConfigError
from unfed.config.compat import resolve

ALWAYS = ["model=tiny-lora", "task_name=x"]


def problems(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve([*ALWAYS, *overrides], "train-lora")
    return "\n".join(caught.value.problems)


def test_speeds_by_client_and_the_defaults():
    assert resolve(ALWAYS, "train-lora").clients == type(resolve(ALWAYS, "train-lora").clients)()
    found = resolve([*ALWAYS, "clients.speed={client_0:0.5,client_2:4}", "clients.deadline=30"], "train-lora").clients
    assert found.speed == {"client_0": 0.5, "client_2": 4.0} and found.deadline == 30.0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("clients.sampling=by_sise", "clients.sampling=by_sise: no such choice; did you mean 'by_size'"),
        ("clients.dedline=3", "clients.dedline: no such setting; did you mean 'deadline'"),
        ("clients=defualt", "clients=defualt: no such clients; did you mean 'default'"),
        ("clients.min_clients=2", "clients.min_clients: no such setting; it is trainer.method_args.min_clients"),
        ("clients.weighting=uniform", "clients.weighting: no such setting; it is aggregator.weighting"),
        ("clients.oversample=0.5", "clients.oversample=0.5: must be at least 1"),
        ("clients.dropout=1.0", "clients.dropout=1.0: must be at least 0 and below 1"),
        ("clients.speed={client_0:0}", "clients.speed={'client_0': 0.0}: must be from 1e-9 to 1e9"),
        ("clients.speed=1e-320", "must be from 1e-9 to 1e9"),
        ("clients.speed_spread=1e308", "clients.speed_spread=1e+308: must be from 0 to 10"),
        ("clients.speed_jitter=90", "clients.speed_jitter=90.0: must be from 0 to 10"),
        ("clients.deadline=0", "clients.deadline=0.0: must be above 0, and finite"),
        ("clients.local_steps=0", "clients.local_steps=0: must be at least 1"),
        ("clients.number=9", "clients.number=9: must be at most num_clients (3)"),
        ("clients.sampling=trace", "needs clients.availability=FILE, a JSON or CSV file of client x round"),
        ("clients.availability=x.csv", "clients.availability=x.csv: is not looked at with clients.sampling=uniform"),
    ],
)
def test_one_message_names_the_key(override, said):
    assert said in problems(override)


def test_settings_that_do_not_go_together():
    found = problems("clients.number=2", "trainer.method_args.fraction_fit=0.5", "trainer.method_args.min_clients=3")
    assert "clients.number=2 and trainer.method_args.fraction_fit=0.5: give one of them" in found
    assert "clients.number=2: is less than trainer.method_args.min_clients (3)" in found
    fp16 = problems("aggregator=Scaffold", "trainer.args.fp16=true")
    assert "aggregator=Scaffold: corrects gradients, which fp16's loss scaling would spoil" in fp16
    private = problems("aggregator=Scaffold", "privacy=local")
    assert "sends control variates that the noise does not cover, so that privacy=local would not hold" in private
    alone = problems("trainer=finetune", "aggregator=null", "clients.deadline=3")
    assert "clients.deadline: trainer=finetune works in one place; leave it out" in alone
    assert "aggregator=Scaffold with aggregator.adapter=rolora: is not defined" in problems(
        "aggregator=Scaffold", "+aggregator.adapter=rolora"
    )


def test_a_trace_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"clients.availability=.*gone.csv: there is no such file"):
        resolve(
            [*ALWAYS, "clients.sampling=trace", f"clients.availability={tmp_path / 'gone.csv'}"],
            "train-lora",
            files=True,
        )
