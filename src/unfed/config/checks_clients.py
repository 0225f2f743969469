"""``clients.*``: numbers within their limits, and settings that go together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from unfed.config.schema import FEDERATED_TRAINERS, RunConfig
from unfed.config.schema_clients import ClientsConfig

SLOWEST, WIDEST = 1e-9, 10
"""Limits of speeds and of their logarithms' spread, within which no simulated time is 0 or infinite."""


def client_settings(config: RunConfig) -> Iterator[str]:
    """What is wrong with ``clients.*``."""
    given, trainer = config.clients, config.trainer
    if trainer is not None and trainer.handler not in FEDERATED_TRAINERS:
        usual = ClientsConfig()
        names = [n for n in usual.__dataclass_fields__ if getattr(given, n) != getattr(usual, n)]
        yield from (f"clients.{n}: trainer={trainer.handler} works in one place; leave it out" for n in names)
        return
    yield from _limits(given)
    yield from _sampling(config)
    rule, privacy = config.aggregator.name if config.aggregator is not None else "", config.privacy
    scaffold = rule == "Scaffold"
    if privacy is not None and (scaffold or (rule == "FedNova" and privacy.name == "central")):
        what = "sends control variates that the noise does not cover" if scaffold else "weights clients unequally"
        yield f"aggregator={rule}: {what}, so that privacy={privacy.name} would not hold; use aggregator=FedAvg"
    if scaffold and trainer is not None and trainer.args.get("fp16"):
        what = "corrects gradients, which fp16's loss scaling would spoil; use trainer.args.bf16=true"
        yield f"aggregator=Scaffold: {what}"


def _limits(given: ClientsConfig) -> Iterator[str]:
    speeds = given.speed if isinstance(given.speed, Mapping) else {"": given.speed}
    limits = (
        ("number", given.number is None or given.number >= 1, "at least 1"),
        ("oversample", 1 <= given.oversample < math.inf, "at least 1 (1 invites no more than are needed)"),
        ("local_steps", given.local_steps is None or given.local_steps >= 1, "at least 1"),
        ("speed", all(SLOWEST <= s <= 1 / SLOWEST for s in speeds.values()), "from 1e-9 to 1e9"),
        ("speed_spread", 0 <= given.speed_spread <= WIDEST, f"from 0 to {WIDEST}"),
        ("speed_jitter", 0 <= given.speed_jitter <= WIDEST, f"from 0 to {WIDEST}"),
        ("dropout", 0 <= given.dropout < 1, "at least 0 and below 1"),
        ("deadline", given.deadline is None or 0 < given.deadline < math.inf, "above 0, and finite"),
    )
    yield from (f"clients.{n}={getattr(given, n)}: must be {what}" for n, ok, what in limits if not ok)


def _sampling(config: RunConfig) -> Iterator[str]:
    given = config.clients
    if given.sampling == "trace" and given.availability is None:
        yield "clients.sampling=trace: needs clients.availability=FILE, a JSON or CSV file of client x round"
    if given.sampling != "trace" and given.availability is not None:
        what = f"is not looked at with clients.sampling={given.sampling}; set clients.sampling=trace"
        yield f"clients.availability={given.availability}: {what}"
    if config.trainer is None or given.number is None:
        return
    shape = config.trainer.method_args
    if shape.fraction_fit != 1.0:
        share = f"trainer.method_args.fraction_fit={shape.fraction_fit}"
        yield f"clients.number={given.number} and {share}: give one of them"
    if shape.num_clients is not None and given.number > shape.num_clients:
        yield f"clients.number={given.number}: must be at most num_clients ({shape.num_clients})"
    if given.number < shape.min_clients:
        yield f"clients.number={given.number}: is less than trainer.method_args.min_clients ({shape.min_clients})"
