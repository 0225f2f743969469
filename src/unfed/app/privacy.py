"""Differential privacy in a run: who is protected by what, what it costs, and what is recorded and said of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from unfed.aggregation.base import Aggregator, WeightedMean
from unfed.aggregation.central import Central, CentralNoise, Clipping
from unfed.aggregation.privacy import CentralPrivacy, ExamplePrivacy, Privacy, build_privacy
from unfed.app.progress import say
from unfed.app.source import made_by
from unfed.app.turnout import participation
from unfed.base.artifacts import RUN_FILE, read_json
from unfed.base.errors import ConfigError
from unfed.base.types import ServerState
from unfed.config.schema import RunConfig
from unfed.federated.accounting import Spent
from unfed.federated.checkpoint import RoundRecord
from unfed.federated.client import ClientData
from unfed.federated.ledger import Accountant, composed, worst
from unfed.federated.schedule import Schedule
from unfed.training.args import LoopArgs
from unfed.unlearning.base import Source


def privacy_of(config: RunConfig) -> Privacy | None:
    """The kind of privacy that the configuration asks for."""
    return build_privacy(config.privacy.name, config.privacy.params) if config.privacy is not None else None


def earlier_of(config: RunConfig, source: Source | None) -> Mapping[str, Any] | None:
    """The privacy record of the run that made the adapter to go on from or to be forgotten in; empty where no run did,
    ``None`` where it trained without privacy. A recipe that trains again from the base is no exception: what the
    fine-tuning released of the rows that stay is out."""
    place, record = made_by(config)
    if source is not None:
        place, record = source.adapter, read_json(source.adapter / RUN_FILE)
    if place is None or record.get("mode") not in {"finetune", "unlearn"}:
        return {}
    found = record.get("privacy")
    return found if isinstance(found, Mapping) and found.get("kind") else None


def protected(rule: WeightedMean, accountant: Accountant) -> WeightedMean:
    """The server's rule with clipping before its mean and noise after it, where privacy is central."""
    if not isinstance(accountant.settings, CentralPrivacy):
        return rule
    if not rule.adapters.linear:
        raise ConfigError(
            [
                (
                    f"aggregator.adapter={rule.adapters.name}: is no mean of the clients' tensors, so the noise of "
                    "privacy=central would not hold; use fedit, ffa or rolora"
                )
            ]
        )
    expected = tuple(float(len(names)) for names in accountant.selected())
    central = Central(accountant.settings, expected, accountant.seed)
    return replace(rule, filters=(Clipping(central), *rule.filters), noise=CentralNoise(central))


def record_of(accountant: Accountant, records: Sequence[RoundRecord], state: ServerState) -> dict[str, Any]:
    """What ``run.json`` says under ``privacy``. An infinite epsilon is ``None``."""
    settings, mine = accountant.settings, accountant.done(records)
    own = accountant.cost(mine)
    body: dict[str, Any] = {"kind": settings.kind, "unit": settings.unit, "units": accountant.units}
    body |= {**settings.settings(), **_figures(own), **_noise(accountant, state)}
    ledger, earlier = mine, accountant.earlier
    if earlier and earlier.get("unit") == settings.unit and (earlier["kind"] == settings.kind):
        ledger = composed(mine, earlier)
        body["with_earlier"] = _figures(worst(ledger, own.delta))
    body["earlier"] = (
        None if earlier is None else {k: earlier.get(k) for k in ("kind", "epsilon", "delta")} if earlier else {}
    )
    body["releases"] = {who: [r.record() for r in releases] for who, releases in ledger.items()}
    body["says"] = sentences(body)
    return body


def _figures(cost: Spent) -> dict[str, Any]:
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in
              (("epsilon", cost.epsilon), ("epsilon_rdp", cost.rdp), ("epsilon_pld", cost.pld))}  # fmt: skip
    return {**finite, "delta": cost.delta, "neighbours": cost.neighbours}


def _noise(accountant: Accountant, state: ServerState) -> dict[str, float]:
    """The bound that came last, and the standard deviation of the noise under it on one value of what is released: of
    the global adapter, of a client's update, or of a step's gradient."""
    settings = accountant.settings
    std = settings.noise_multiplier * settings.clip
    if isinstance(settings, CentralPrivacy):
        expected = [float(len(names)) for names in accountant.selected()]
        last = expected[min(state.round, len(expected)) - 1]
        bound = Central(settings, expected, accountant.seed).bound(state)
        return {"clip_last": bound, "noise_std": settings.update_multiplier(last) * bound / last}
    divisor = accountant.args.step_size() if isinstance(settings, ExamplePrivacy) else 1
    return {"clip_last": settings.clip, "noise_std": std / divisor}


def headline(record: Mapping[str, Any]) -> str:
    """One line: epsilon, delta and whom they protect."""
    return f"privacy={record['kind']}: {_bound(record)} for every {record['unit']}"


def _bound(figures: Mapping[str, Any]) -> str:
    if figures.get("epsilon") is None:
        return "no bound on epsilon, for there is no noise"
    parts = [f"{name} {figures[key]:.3g}" for name, key in (("RDP", "epsilon_rdp"), ("PLD", "epsilon_pld"))
             if figures.get(key) is not None]  # fmt: skip
    return f"epsilon {figures['epsilon']:.3g} at delta {figures['delta']:.3g} ({', '.join(parts)})"


def sentences(record: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the number."""
    found = [headline(record) + "."]
    if record["neighbours"] == "replace":
        found.append(f"Data sets are told apart that differ in the data of one {record['unit']}.")
    else:
        found.append(f"Data sets are told apart that differ by one {record['unit']} more or less.")
    if not record["secure_noise"]:
        found.append("The noise was drawn from the run's seed: the bound holds against nobody who knows that.")
    if record["earlier"] is None:
        found.append("The adapter that this run began with was trained without privacy, which this does not mend.")
    elif record.get("with_earlier"):
        found.append(f"With the runs before it on the same adapter: {_bound(record['with_earlier'])}.")
    elif record["earlier"]:
        found.append(
            f"The runs before it were protected otherwise (privacy={record['earlier']['kind']}); no common bound."
        )
    if record["delta"] > 1e-3:
        found.append(
            f"A delta of {record['delta']:.3g} is large: set privacy.delta well below one over the {record['unit']}s."
        )
    return found


def begin(
    config: RunConfig,
    schedule: Schedule,
    clients: Mapping[str, ClientData],
    args: LoopArgs,
    rule: Aggregator,
    source: Source | None,
) -> tuple[Aggregator, Accountant | None]:
    """The server's rule as privacy has it, and who counts what is released; says what the whole run will cost."""
    settings = privacy_of(config)
    if settings is None:
        return rule, None
    accountant = Accountant(
        settings, schedule, participation(config, clients, args), clients, args, config.seed, earlier_of(config, source)
    )
    cost = accountant.cost(accountant.planned(), pld=False)
    figures = {"kind": settings.kind, "unit": settings.unit, **_figures(cost)}
    say(f"{headline(figures)}, over the whole run, before any earlier one")
    if not settings.secure_noise:
        say("privacy: the noise is drawn from the run's seed; privacy.secure_noise=true for one that nobody can repeat")
    assert isinstance(rule, WeightedMean)
    return protected(rule, accountant), accountant


def end(
    config: RunConfig,
    accountant: Accountant | None,
    records: Sequence[RoundRecord],
    state: ServerState,
    source: Source | None,
) -> dict[str, Any] | None:
    """What ``run.json`` says, said as well; ``None`` where neither this run nor the one before it has privacy."""
    if accountant is not None:
        record = record_of(accountant, records, state)
        for sentence in record["says"]:
            say(sentence)
        return record
    earlier = earlier_of(config, source)
    if not earlier or not records:
        return None
    text = f"The adapter that this run began with was trained with privacy={earlier['kind']}; this run was not."
    say(f"WARNING: {text} What it takes from its rows is not covered")
    return {"kind": None, "earlier": {k: earlier.get(k) for k in ("kind", "epsilon", "delta")}, "says": [text]}
