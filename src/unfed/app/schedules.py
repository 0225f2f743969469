"""What a run's schedule is made of: objectives with their settings, and the ingredients of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unfed.aggregation.base import Aggregator
from unfed.app.build import is_federated
from unfed.app.methods import unlearning_objective
from unfed.base.params import Hyperparameters
from unfed.config.schema import RunConfig
from unfed.federated.client import ClientData
from unfed.federated.schedule import Schedule
from unfed.models.adapter import lora_scaling, snapshot
from unfed.models.load import LoadedModel
from unfed.objectives.base import Objective
from unfed.objectives.nll import NLL
from unfed.objectives.proximal import Proximal
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
    return finetune(owners, _proximal(NLL(), rule), args.num_train_epochs, rounds)


def ingredients_of(
    config: RunConfig, args: LoopArgs, situation: Situation, rule: Aggregator, loaded: LoadedModel
) -> Ingredients:
    """What a recipe makes its plan from. FedProx's proximal term goes around every client's objective. A fine-tuning
    has no method: its ``forget`` is plain training, too."""
    assert config.trainer is not None
    given = config.trainer.method_args
    plain = _proximal(NLL(), rule)
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


def resolved_settings(schedule: Schedule, rule: Aggregator) -> dict[str, dict[str, Any]]:
    """Every hyperparameter that acts in the run, by the name of its objective or rule, defaults filled in."""
    found: dict[str, dict[str, Any]] = {}
    for work in (w for phase in schedule.phases for w in phase.work.values()):
        parts = [part for part in layers(work.objective) if not isinstance(part, Proximal)]  # its mu is the rule's
        for part in (*reversed(parts), rule):
            if isinstance(part, Hyperparameters):
                found[part.title if isinstance(part, Wrapper) else part.name] = part.settings()
    return found


def _proximal(objective: Objective, rule: Aggregator) -> Objective:
    return Proximal(objective, rule.client_proximal_mu) if rule.client_proximal_mu > 0 else objective
