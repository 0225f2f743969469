"""What a run's schedule is made of: objectives with their settings, and the ingredients of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unfed.aggregation.adapters.fedit import FedIT
from unfed.aggregation.base import Aggregator, WeightedMean
from unfed.app.build import is_federated
from unfed.app.methods import unlearning_objective
from unfed.app.progress import say
from unfed.base.params import Hyperparameters
from unfed.config.schema import RunConfig
from unfed.federated.client import ClientData
from unfed.federated.schedule import Schedule
from unfed.models.adapter import lora_scaling, snapshot
from unfed.models.load import LoadedModel
from unfed.objectives.base import Objective
from unfed.objectives.nll import NLL
from unfed.objectives.proximal import Proximal
from unfed.objectives.pruning import Pruning
from unfed.objectives.retain import WithRetain
from unfed.objectives.wrapper import Wrapper, layers
from unfed.training.args import LoopArgs
from unfed.unlearning.base import Ingredients, Situation
from unfed.unlearning.finetune import finetune


def finetune_schedule(
    config: RunConfig, args: LoopArgs, clients: Mapping[str, ClientData], rule: Aggregator
) -> Schedule:
    """The order of work of a fine-tuning."""
    assert config.trainer is not None
    owners = [c for c, d in clients.items() if d.splits["train"]]
    rounds = config.trainer.method_args.global_rounds if is_federated(config) else 1
    return finetune(owners, _plain(rule), args.num_train_epochs, rounds)


def ingredients_of(
    config: RunConfig, args: LoopArgs, situation: Situation, rule: Aggregator, loaded: LoadedModel
) -> Ingredients:
    """What a recipe makes its plan from. FedProx's proximal term goes around every client's objective. A fine-tuning
    has no method: its ``forget`` is plain training, too."""
    assert config.trainer is not None
    given = config.trainer.method_args
    plain = _plain(rule)
    return Ingredients(
        situation=situation,
        forget=plain if config.mode == "finetune" else _proximal(unlearning_objective(config), rule),
        retain=plain,
        unlearn_epochs=given.unlearn_epochs if given.unlearn_epochs is not None else args.num_train_epochs,
        local_epochs=args.num_train_epochs,
        global_rounds=given.global_rounds if is_federated(config) else 0,
        start=snapshot(loaded.model),
        scaling=lora_scaling(loaded.model),
        seed=config.seed,
    )


def alone(schedule: Schedule, clients: Mapping[str, ClientData]) -> Schedule:
    """The schedule with the retain term left out (``alpha=0``) where a client that unlearns has no rows to retain.

    That is so when all that it owns is to be forgotten. Others' rows never go to a client, so it unlearns without.
    """
    phases, said = [], []
    for phase in schedule.phases:
        work = dict(phase.work)
        for client, own in phase.work.items():
            if own.rows == "forget" and "retain" in own.objective.needs.splits and not clients[client].splits["retain"]:
                work[client] = replace(own, objective=_without_retain(own.objective))
                said.append(client)
        phases.append(replace(phase, work=work))
    for client in dict.fromkeys(said):
        say(f"{client} owns nothing that is to be retained: it unlearns without the method's retain term")
    return Schedule(tuple(phases)) if said else schedule


def _without_retain(objective: Objective) -> Objective:
    """As it is where it has no such term of its own to leave out: the rows are then found missing. A wrapper that tells
    the two terms apart (GRU) goes with it."""
    if isinstance(objective, Wrapper) and "retain" in objective.splits:
        return _without_retain(objective.inner)
    if isinstance(objective, Proximal | Wrapper):
        return replace(objective, inner=_without_retain(objective.inner))
    return objective.forget_alone() if isinstance(objective, WithRetain) else objective


def resolved_settings(schedule: Schedule, rule: Aggregator) -> dict[str, dict[str, Any]]:
    """Every hyperparameter that acts in the run, by the name of its objective or rule, defaults filled in.

    A client whose settings differ from those found before has an entry of its own (``NPO of client_1``).
    """
    found: dict[str, dict[str, Any]] = {}
    for client, work in (w for phase in schedule.phases for w in phase.work.items()):
        parts = [part for part in layers(work.objective) if not isinstance(part, Proximal | Pruning)]  # a rule's
        filters = rule.filters if isinstance(rule, WeightedMean) else ()
        for part in (*reversed(parts), rule, *filters):
            if isinstance(part, Hyperparameters):
                name = part.title if isinstance(part, Wrapper) else part.name
                if found.setdefault(name, part.settings()) != part.settings():
                    found[f"{name} of {client}"] = part.settings()
    adapters = rule.adapters
    if adapters.name != FedIT.title or adapters.ranks:
        ranks = {"ranks": dict(adapters.ranks)} if adapters.ranks else {}
        found[f"adapters {adapters.name}"] = adapters.settings() | ranks
    return found


def _plain(rule: Aggregator) -> Objective:
    """Plain training, in which HetLoRA's clients give ranks up."""
    pruning = rule.adapters.pruning
    return _proximal(NLL() if pruning is None else Pruning(NLL(), *pruning), rule)


def _proximal(objective: Objective, rule: Aggregator) -> Objective:
    """With what the server's rule adds to every client's loss."""
    return Proximal(objective, rule.client_proximal_mu) if rule.client_proximal_mu > 0 else objective
