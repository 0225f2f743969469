"""A recipe in a run: where its facts come from, what it asks for and promises, and what it will cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any

from unfed.aggregation.adapters.fedit import FedIT
from unfed.aggregation.base import Aggregator
from unfed.aggregation.registry import ADAPTER
from unfed.app import build, ranks
from unfed.app.progress import say
from unfed.app.rundir import PARTITION_FILE, RunDir
from unfed.app.schedules import alone, finetune_schedule, ingredients_of
from unfed.app.source import made_by, read_source, source_directory
from unfed.app.turnout import with_local_steps
from unfed.base.artifacts import digest_json
from unfed.base.errors import ConfigError, UnfedError
from unfed.base.types import AdapterState, ServerState, Split
from unfed.config.schema import FEDERATED_TRAINERS, RunConfig
from unfed.data.partition import Partition
from unfed.federated.client import ClientData
from unfed.federated.history import HISTORY_DIR, HistorySettings
from unfed.federated.history_writer import HistoryWriter
from unfed.federated.schedule import Schedule
from unfed.models.load import LoadedModel
from unfed.training.args import LoopArgs
from unfed.unlearning.base import Ingredients, Plan, Recipe, Situation, Source, unmet
from unfed.unlearning.cost import Cost, cost_of
from unfed.unlearning.isolated import Isolated
from unfed.unlearning.registry import build_recipe

FROM_THE_FINE_TUNING = ("global_rounds", "fraction_fit", "min_clients", "lr_schedule")
"""Settings of ``trainer.method_args`` that a replay takes from there."""
OF_THIS_RUN = ("report_to", "run_name", "logging_steps", "dataloader_num_workers", "eval_strategy", "use_cpu")
"""Settings of ``trainer.args`` that change no weight: a replay keeps its own."""


def recipe_of(config: RunConfig) -> Recipe:
    """The recipe of an unlearning run (in one place: the only one that needs no clients)."""
    given = config.recipe
    return build_recipe(given.name, given.params) if given is not None else build_recipe("local_then_recover", {})


def settled(config: RunConfig) -> tuple[RunConfig, Source | None]:
    """The configuration that the recipe really runs, and the fine-tuning that it goes back to.

    A recipe that trains again (``Demands.replay``) takes over that run's model, seed, data, training settings,
    partition, aggregator and privacy; output, evaluation and what is to be forgotten stay this run's own. Left out are
    the forget rows, and what ``config`` leaves out already: what was forgotten before
    (:func:`unfed.app.requests.settle`).
    """
    place = source_directory(config) if config.mode == "unlearn" else None
    if place is None:
        return config, None
    source, made = read_source(place)
    opened, recipe = made_by(config)[0], recipe_of(config)
    source = replace(source, opened=opened if opened != place else None)
    if recipe.demands.source and made.recipe is not None and recipe.name != made.recipe.name:
        raise UnfedError(
            f"recipe={recipe.name}: {place} was fine-tuned in isolated shards; use recipe=isolated (exact), or "
            "recipe=local_then_recover"
        )
    if config.recipe is None or not recipe.demands.replay:
        return config, source
    assert config.trainer is not None
    if made.mode != "finetune" or made.trainer is None or made.data.train is None:
        raise UnfedError(f"recipe={config.recipe.name}: {place} is not a fine-tuning that can be run again")
    if made.trainer.handler not in FEDERATED_TRAINERS:
        raise UnfedError(f"recipe={config.recipe.name}: {place} was trained in one place, without clients")
    _refuse_other_privacy(config, made, place)
    own = {k: v for k, v in config.trainer.args.items() if k in OF_THIS_RUN}
    theirs = {k: v for k, v in made.trainer.args.items() if k not in OF_THIS_RUN}
    taken = {name: getattr(made.trainer.method_args, name) for name in FROM_THE_FINE_TUNING}
    trainer = replace(
        config.trainer,
        args={**theirs, **own},
        method_args=replace(config.trainer.method_args, num_clients=None, unlearn_epochs=None, **taken),
    )
    manifest = str(place / PARTITION_FILE)
    gone = build.left_out(config) | {e["id"] for e in build.forget_rows(config)} | set(made.data.exclude_ids)
    data = replace(config.data, retain=made.data.train, exclude=made.data.exclude, exclude_ids=tuple(sorted(gone)))
    return (
        replace(
            config,
            model=replace(config.model, model_args=made.model.model_args, template_args=made.model.template_args),
            seed=made.seed,
            trainer=trainer,
            aggregator=made.aggregator,
            privacy=made.privacy,
            robust=made.robust,
            hostile=made.hostile,
            wire=made.wire,
            collator=made.collator,
            clients=made.clients,
            partition=replace(made.partition, manifest=manifest),
            data=data,
        ),
        source,
    )


def _refuse_other_privacy(config: RunConfig, made: RunConfig, place: Path) -> None:
    if config.privacy is None or config.privacy == made.privacy or config.recipe is None:
        return
    theirs = f"privacy={made.privacy.name} and its settings" if made.privacy is not None else "no privacy"
    key = f"privacy={config.privacy.name}"
    raise ConfigError(
        [f"{key}: recipe={config.recipe.name} trains as {place} was trained, with {theirs}; leave privacy out"]
    )


def situation_of(
    recipe: Recipe,
    partition: Partition,
    retain: AbstractSet[str],
    targets: Sequence[str],
    source: Source | None,
    before: AbstractSet[str] = frozenset(),
) -> Situation:
    """Who is to forget and who is to keep; ``retain`` are the ids of the rows that stay, ``before`` of those that were
    forgotten earlier. A recipe that trains again from the fine-tuning's own start or rounds has to leave out those as
    well, so that their owners are targets of it."""
    retainers = _owning(partition, retain)
    earlier = _owning(partition, before)
    if recipe.demands.replay:
        targets = [c for c in partition.clients if c in {*targets, *earlier}]
    return Situation(tuple(targets), retainers, source, earlier)


def _owning(partition: Partition, rows: AbstractSet[str]) -> tuple[str, ...]:
    return tuple(c for c, ids in partition.clients.items() if not rows.isdisjoint(ids))


def refuse_unmet(config: RunConfig, situation: Situation) -> None:
    """Raise ``ConfigError`` with every reason why the recipe cannot be followed."""
    recipe, given = recipe_of(config), config.aggregator
    problems = unmet(recipe, situation)
    adapter = given.params.get(ADAPTER, FedIT.title) if given is not None else FedIT.title
    if recipe.demands.factors and adapter != FedIT.title:
        problems.append(
            f"recipe={recipe.name} with aggregator.adapter={adapter}: it works on factors that are averaged apart and "
            "all train in every round; use aggregator.adapter=fedit, or recipe=local_then_recover"
        )
    if recipe.name == "rollback" and given is not None and given.name == "Scaffold":
        problems.append(
            "recipe=rollback of a fine-tuning with aggregator=Scaffold: it would go on from the server's control "
            "variate of that round, whose clients' own are not kept; use recipe=retrain (exact as well)"
        )
    if problems:
        raise ConfigError(problems)


def announce(recipe: Recipe, plan: Plan, given: Ingredients, cost: Cost) -> dict[str, Any]:
    """Say what the recipe needs, costs and promises; the same for ``run.json``."""
    source, promise = given.situation.source, recipe.promise_for(given.situation)
    needs = [f"history={kind}" for kind in sorted(recipe.demands.history)]
    needs += ["the run directory of the fine-tuning"] if recipe.demands.source else []
    if recipe.demands.lora:
        needs.append("a learned LoRA adapter" + (", which stays as it is" if recipe.demands.second_adapter else ""))
    needs += [f"the forget rows, at {', '.join(given.targets)}"] if _asks_targets(plan) else []
    compared = ""
    if source is not None and source.client_steps:
        compared = ": " + cost.against(Cost(len(source.participants), source.client_steps, source.nbytes))
    say(f"recipe {recipe.name} needs: {'; '.join(needs) or 'nothing of the fine-tuning'}")
    say(f"  costs: {cost.words()}{compared}")
    say(f"  promises ({promise.kind}): {promise.text}")
    return {
        "name": recipe.name,
        "settings": recipe.settings(),
        "needs": needs,
        "cost": cost,
        "promise": promise,
        "targets": given.targets,
    }


def _asks_targets(plan: Plan) -> bool:
    return any(w.rows == "forget" for phase in plan.schedule.phases for w in phase.work.values())


def with_proxy(config: RunConfig, rows: build.Rows, clients: Mapping[str, ClientData]) -> dict[str, ClientData]:
    """The clients with split ``proxy``, where the recipe asks for one; how many rows it leaves out is said.

    Raises ``ConfigError`` when it leaves none.
    """
    kept = recipe_of(config).proxy_rows(rows.forget, rows.retain) if config.mode == "unlearn" else None
    if kept is None:
        return dict(clients)
    out = len(rows.retain) - len(kept)
    say(
        f"proxy rows: {out} of {len(rows.retain)} retain rows are near the forget rows and left out of the distillation"
    )
    if not kept:
        near = "recipe.similarity: every retain row is near the forget rows, so there is nothing to distil on"
        raise ConfigError([f"{near}; raise it, or use recipe=subtract"])
    return {
        c: replace(d, splits={**d.splits, "proxy": [e for e in d.splits["train"] if e.example_id in kept]})
        for c, d in clients.items()
    }


def expected_cost(plan: Plan, clients: Mapping[str, ClientData], args: LoopArgs, adapter_bytes: int) -> Cost:
    """Of a plan, with every client in every round."""
    rows: dict[str, dict[Split, int]] = {
        c: {s: len(found) for s, found in d.splits.items()} for c, d in clients.items()
    }
    return cost_of(plan.schedule, plan.start.round if plan.start else 0, rows, args.step_size(), adapter_bytes)


def plan_of(
    config: RunConfig,
    args: LoopArgs,
    situation: Situation,
    clients: Mapping[str, ClientData],
    rule: Aggregator,
    loaded: LoadedModel,
) -> tuple[Plan, dict[str, Any]]:
    """The order of work, and what is to be recorded of it."""
    steps = config.clients.local_steps
    if config.mode == "finetune" and config.recipe is None:
        return Plan(with_local_steps(finetune_schedule(config, args, clients, rule), steps)), {}
    recipe, given = recipe_of(config), ingredients_of(config, args, situation, rule, loaded)
    given = replace(
        given,
        proxied=tuple(c for c, d in clients.items() if d.splits.get("proxy")),
        rows={c: tuple(dict.fromkeys(e.example_id for e in d.splits["train"])) for c, d in clients.items()},
    )
    if config.mode == "finetune":
        assert isinstance(recipe, Isolated)
        plan = recipe.first(given)
        return replace(plan, schedule=with_local_steps(plan.schedule, steps)), {}
    plan = recipe.plan(given)
    ranks.refuse_own_rules(plan.schedule, rule)
    plan = replace(plan, schedule=with_local_steps(plan.schedule, steps))
    if config.forget.given:  # a forget_split is chosen by hand, and a method that cannot do with it is refused
        plan = replace(plan, schedule=alone(plan.schedule, clients))
    cost = expected_cost(plan, clients, args, given.start.nbytes)
    source = situation.source
    notes = {"recipe": announce(recipe, plan, given, cost)}
    if source is not None:
        notes |= {"source": str(source.directory.absolute()), "source_adapter": source.result}
    return plan, notes


def adapters_of(plan: Plan, opened: AdapterState) -> dict[str, str]:
    """Digests of the adapters that a plan works with: a resumed run must have the same."""
    if plan.start is not None:
        return {"adapter": plan.start.adapter.digest(), "opened": opened.digest()}
    if plan.isolation is not None:
        shards = [[s.index, s.rows] for s in (*plan.isolation.again, *plan.isolation.kept)]
        return {"adapter": opened.digest(), "shards": digest_json(shards)}
    return {"adapter": opened.digest()}


def keep_history(
    config: RunConfig, directory: RunDir, rule: Aggregator, schedule: Schedule, state: ServerState
) -> HistoryWriter | None:
    """The keeper of what ``history=`` asks for, with its size said; ``None`` for nothing."""
    settings = HistorySettings(config.history.keep, config.history.every)
    if not settings.keep:
        return None
    clients = len({c for phase in schedule.phases for c in phase.work})
    size = settings.nbytes(clients, schedule.num_rounds, state.adapter, len(rule.init(state.adapter)))
    say(f"history: keeps {', '.join(settings.keep)}, about {size / 1e6:.1f} MB, in {directory.path / HISTORY_DIR}")
    history = HistoryWriter(directory.path, settings, rule)
    history.begin(state)
    return history
