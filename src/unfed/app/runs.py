"""The runs: fine-tuning, unlearning, evaluation. Each builds its objects, opens the directory, and goes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from unfed.aggregation.base import Aggregator
from unfed.app import (
    build,
    cores,
    hostile,
    isolated,
    methods,
    personal,
    privacy,
    recipes,
    requests,
    second,
    server_rows,
    turnout,
)
from unfed.app.during import Listeners, RoundEvaluation
from unfed.app.evaluate import check_tokens, evaluate_model, evaluation_rows
from unfed.app.fleet import HERE, Fleet, Mission, fleet_of
from unfed.app.oracle import with_oracle
from unfed.app.outcome import advise, left_out, memory_settings, warnings_of
from unfed.app.probe import origin_of, probe_forget_loss
from unfed.app.progress import Reporter, say, show_schedule
from unfed.app.robustness import check_robustness
from unfed.app.rundir import (
    RunDir,
    open_run,
    refuse_unfinished,
    training_identity,
)
from unfed.app.saving import resumed, save_run
from unfed.app.schedules import resolved_settings
from unfed.app.source import refuse_changed
from unfed.app.tracking import tracking
from unfed.app.worker import make_client, make_local
from unfed.base.artifacts import digest_json
from unfed.base.errors import AdapterError, UnfedError
from unfed.base.types import AdapterState, ServerState
from unfed.config.schema import RunConfig
from unfed.data.partition import Partition
from unfed.evaluation.runner import EvalResult
from unfed.federated.checkpoint import Checkpoints, RoundRecord
from unfed.federated.client import Client, ClientData
from unfed.federated.own import OwnFactors
from unfed.federated.rounds import RoundsConfig, RunKeeper
from unfed.federated.transport import Transport
from unfed.models.adapter import ADAPTER_NAME, snapshot
from unfed.models.load import LoadedModel, load_model, same_base
from unfed.models.second import LEARNED
from unfed.training import advice
from unfed.training.args import loop_args
from unfed.training.loop import Local
from unfed.unlearning.base import Plan, Situation, Source

log = logging.getLogger(__name__)
SAVED = "saved: "
"""The last line of a training that has come to its end, before the directory's name."""


@dataclass(frozen=True)
class RunResult:
    """What came out of a run. ``summary`` is TOFU_SUMMARY.json's content (empty without evaluation)."""

    directory: Path
    records: tuple[RoundRecord, ...]
    summary: Mapping[str, float]
    evaluation: EvalResult | None = None


def run(config: RunConfig, fleet: Fleet | None = None) -> RunResult:
    """Run what the configuration's mode says. Raises ``UnfedError`` for everything the user can mend.

    ``fleet``: where the clients are (``None``: in this process).
    """
    try:
        fleet = fleet or fleet_of(config)
        config, before = requests.settle(config)
        config = fleet.resolved(config)
        if config.mode == "unlearn" and config.oracle == "auto":
            # A mistake of the run itself is found before its oracle is trained.
            prepared(*recipes.settled(config), before, fleet)
            config = with_oracle(config, run)
        if config.mode == "eval":
            return evaluate_only(config)
        return train(*recipes.settled(config), before, fleet)
    except torch.OutOfMemoryError as e:
        raise UnfedError(advice.out_of_memory(memory_settings(config), str(e))) from e


def evaluate_only(config: RunConfig) -> RunResult:
    """Open the model, score it, write the result files."""
    assert config.eval is not None
    rows = evaluation_rows(config.eval, config.paths.data_dir)  # a wrong row is found before the model is opened
    with open_run(config) as directory:
        loaded = open_model(config, trainable=False)
        result = evaluate_model(config, loaded, directory.path, rows)
        directory.note(summary=result.summary())
        if config.eval.robustness is not None:
            check_robustness(config, loaded, directory.path, result)
        return RunResult(directory.path, (), result.summary(), result)


def open_model(config: RunConfig, *, trainable: bool) -> LoadedModel:
    """Load the configuration's model and say how. ``AdapterError``: its adapter belongs to another base."""
    args = config.model.model_args
    if config.trainer is not None and config.trainer.args.get("use_cpu") and args.device_map is None:
        args = dataclasses.replace(args, device_map="cpu")
    recipe = recipes.recipe_of(config) if trainable and config.mode == "unlearn" else None
    on_top = recipe is not None and recipe.demands.second_adapter
    loaded = load_model(
        args,
        config.model.tokenizer_args,
        trainable=trainable and not on_top,
        seed=config.seed,
        adapter_name=LEARNED if on_top else ADAPTER_NAME,
    )
    for note in loaded.notes:
        say(note)
    _same_base(loaded)
    if recipe is not None and on_top:
        second.put_on(loaded, recipe, config.seed)
    return loaded


def _same_base(loaded: LoadedModel) -> None:
    stored = origin_of(loaded.adapter_path).get("base_fingerprint")
    if stored is not None and not same_base(stored, loaded.fingerprint):
        raise AdapterError(
            f"the adapter {loaded.adapter_path} was trained on another base model than {loaded.base} (their weights "
            "differ): name the right one in model.model_args.base_model_name_or_path"
        )


def prepared(
    config: RunConfig, source: Source | None, before: Sequence[requests.Forgotten], fleet: Fleet = HERE
) -> tuple[build.Rows, Partition, str, Situation]:
    """What can be known of a training without its model: rows, partition and where it comes from, who unlearns.

    ``config`` and ``source``: see :func:`unfed.app.recipes.settled`; ``before``: :func:`unfed.app.requests.settle`;
    ``fleet``: where the clients are. Raises ``UnfedError`` for what cannot be done.
    """
    build.refuse_unknown(config)
    if config.resume:
        Checkpoints(Path(config.paths.output_dir), training_identity(config)).check()
    else:
        refuse_unfinished(Path(config.paths.output_dir), overwrite=config.overwrite)
    methods.refuse_scope(config)
    rows, partition, where = fleet.rows(config)
    hostile.hostile_clients(config, partition.clients)
    build.refuse_few(config, len(partition.clients))
    turnout.trace_of(config, partition.client_ids)
    if config.mode == "finetune":
        return rows, partition, where, Situation((), ())
    targets = build.targets_of(config, partition, [e["id"] for e in rows.forget])
    gone = {i for request in before for i in request["ids"]}
    retain = {e["id"] for e in rows.retain}
    recipe = recipes.recipe_of(config)
    situation = recipes.situation_of(recipe, partition, retain, targets, source, gone)
    known = len(({e["id"] for e in rows.forget} | gone) & source.start_saw) if source else 0
    since = tuple(str(r["recipe"]) for r in before if r.get("recipe"))
    situation = dataclasses.replace(situation, known_at_start=known, since=since)
    recipes.refuse_unmet(config, dataclasses.replace(situation, no_lora=second.without_lora(config)))
    refuse_changed(config, recipe, source, rows)
    return rows, partition, where, situation


def train(
    config: RunConfig,
    source: Source | None = None,
    before: Sequence[requests.Forgotten] = (),
    fleet: Fleet = HERE,
) -> RunResult:
    """Fine-tune or unlearn over the schedule, save, evaluate. The arguments are those of :func:`prepared`."""
    assert config.trainer is not None
    args = loop_args(config.trainer.args)
    rows, partition, where, situation = prepared(config, source, before, fleet)
    with open_run(config) as directory:
        loaded = open_model(config, trainable=True)
        check_tokens(config, loaded)
        clients = fleet.clients(config, loaded, rows, partition)
        rule = build.server_rule(config, loaded, partition)
        local = make_local(config, loaded)
        cores.begin(directory, rule, loaded, local, clients)
        plan, notes = recipes.plan_of(config, args, situation, clients, rule, loaded)
        rule, accountant = privacy.begin(config, plan.schedule, clients, args, rule, source)
        schedule, server = server_rows.joins(config, loaded, rows, plan.schedule)
        plan = dataclasses.replace(plan, schedule=schedule)
        for note in filter(None, (local.optim_note, f"partition: {where}")):
            say(note)
        show_schedule(schedule, settings := resolved_settings(schedule, rule))
        opened = snapshot(loaded.model)
        start = plan.start or ServerState(0, opened)
        trained = isolated.limited(plan, situation, clients, start.adapter)
        trained |= {} if server is None else {server.client_id: server}
        own = personal.own_factors(config, directory.path, rule, start, clients)
        client = make_client(config, (loaded, local), trained, opened, own.store)
        inputs = {"base": loaded.fingerprint, "rows": rows.digest(), "partition": digest_json(partition.clients)}
        inputs |= {**second.inputs(loaded), **recipes.adapters_of(plan, opened), **personal.inputs(own)}
        identity = {**training_identity(config), "inputs": inputs | turnout.inputs(config, partition.client_ids)}
        checkpoints = Checkpoints(directory.path, identity, config.engine.keep_checkpoints, config.engine.keep_every)
        state, keeper = resumed(config, checkpoints, start)
        notes |= fleet.keep(directory.path, rows, partition)
        server_rows.keep(directory.path, config, rows)
        notes |= requests.note(config, rows.forget, partition, before) | hostile.note(config, partition)
        readable = clients if fleet.has_rows else {}
        notes |= {"base": loaded.base, "base_fingerprint": loaded.fingerprint}
        notes |= turnout.announce(config, rule, clients)
        notes |= probe_forget_loss(local, readable, situation.targets if readable else (), loaded)
        directory.note(schedule=schedule.table(), settings=settings, **notes)
        work = _Training(config, directory, loaded, local, clients, rule, plan, situation, own)
        with fleet.transport(Mission(config, loaded, client, rows, partition, opened, directory, clients)) as transport:
            state = _rounds(work, (client, transport, readable), state, keeper, start.adapter)
            directory.note(**fleet.measured(state.adapter, state.base_residual))
        warnings = hostile.warning(config, partition) + warnings_of(schedule, client, keeper.records)
        warnings += left_out(schedule, keeper.records, situation.targets) + personal.remind(config, situation.targets)
        seen = requests.seen_after(config, rows, loaded.adapter_path, source)
        loaded, local, adapter = _served(work, own.served(state))
        save_run(directory, loaded, local, adapter, readable, seen)
        personal.Personal(config, directory, loaded, local, adapter, readable).finish(own, state)
        directory.note(privacy=privacy.end(config, accountant, keeper.records, state, source))
        directory.note(rounds=keeper.records, warnings=warnings, adapter=adapter.digest())
        result = _evaluate_after(config, loaded, directory)
        say(f"{SAVED}{directory.path}")
        return RunResult(directory.path, tuple(keeper.records), result.summary() if result else {}, result)


@dataclass(frozen=True)
class _Training:
    """What the parts of one training have in common."""

    config: RunConfig
    directory: RunDir
    loaded: LoadedModel
    local: Local
    clients: Mapping[str, ClientData]
    rule: Aggregator
    plan: Plan
    situation: Situation
    own: OwnFactors


def _rounds(
    work: _Training,
    clients: tuple[Client, Transport, Mapping[str, ClientData]],
    state: ServerState,
    keeper: RunKeeper,
    start: AdapterState,
) -> ServerState:
    """Run the plan from ``state`` on, with progress, trackers, looks between rounds and history."""
    client, transport, readable = clients
    config, directory, schedule, args = work.config, work.directory, work.plan.schedule, work.local.args
    with tracking(args.report_to, directory.path, args.run_name or config.task_name) as track:
        reporter = Reporter(schedule, state.round, track)
        between = RoundEvaluation(config, work.loaded, schedule, readable, args.eval_strategy, track, work.own)
        client.on_step, keeper.listener = reporter.stepped, Listeners((reporter, between))
        keeper.on_save = lambda _: directory.note(rounds=keeper.records)
        keeper.history = recipes.keep_history(config, directory, work.rule, schedule, state)
        try:
            between.begin(state, directory)
            follow = isolated.runner(work.plan, start, directory.path)
            screening = build.screening(config, work.loaded, work.clients)
            rounds = RoundsConfig(config.seed, turnout.participation(config, work.clients, args), screening)
            transport = hostile.on_the_wire(config, work.clients, transport)
            return follow(transport, work.rule, state, rounds, keeper)
        except UnfedError as e:
            advise(e, schedule, len(keeper.records))
            raise
        finally:
            reporter.close()


def _served(work: _Training, state: ServerState) -> tuple[LoadedModel, Local, AdapterState]:
    """What is saved and evaluated: what was trained, or the one adapter that shards or two adapters make."""
    if work.plan.isolation is not None:
        return isolated.joined(work.plan, work.rule, work.situation, work.directory.path, (work.loaded, work.local))
    if state.base_residual is not None:
        return isolated.with_residual(work.loaded, work.local, state)
    adapter = cores.end(work.loaded, state.adapter)
    return second.finish(work.directory, work.loaded, work.local, adapter)


def _evaluate_after(config: RunConfig, loaded: LoadedModel, directory: RunDir) -> EvalResult | None:
    if config.eval is None or not config.eval.enabled:
        return None
    result = evaluate_model(config, loaded, directory.path)
    directory.note(summary=result.summary())
    return result
