"""A sequence of requests to forget on one model, each starting from the last, with what is left measured after each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from unfed.app import recipes, requests
from unfed.app.evaluate import suite_of
from unfed.app.probe import origin_of
from unfed.app.progress import console, say
from unfed.app.rundir import RUN_FILE, plain
from unfed.app.runs import open_model, prepared, run
from unfed.app.stages import carry_on, is_done
from unfed.base.artifacts import digest_json, read_json, write_json
from unfed.base.errors import ConfigError, UnfedError
from unfed.base.types import Example
from unfed.config.schema import EvalConfig, ForgetConfig, HistoryConfig, RunConfig
from unfed.evaluation.runner import evaluate
from unfed.models.load import LoadedModel
from unfed.report.sequence import START, Asked, Look, Scores, SequenceReport, table, write_sequence_page
from unfed.unlearning.base import Source

SEQUENCE_FILE = "sequence.json"
UTILITY = "model_utility"


@dataclass(frozen=True)
class Plan:
    """Requests by name, in order, as the runs that they would be on the model to start from. All goes below
    ``directory``; ``command`` is for the page."""

    title: str
    command: str
    directory: Path
    steps: Mapping[str, RunConfig]

    @property
    def first(self) -> RunConfig:
        """The first request's run, which starts from where the sequence does."""
        return next(iter(self.steps.values()))


@dataclass(frozen=True)
class Foreseen:
    """What is known before anything is trained: the rows of each request, who owns them, and those that none names."""

    forget: Mapping[str, tuple[Example, ...]]
    clients: Mapping[str, Mapping[str, int]]
    kept: tuple[Example, ...]


def run_sequence(plan: Plan) -> SequenceReport:
    """Run every request that is not done yet, look at the model after each, and write sequence.json and the page.

    A request is kept that was finished with the same configuration from the same model; one that was cut short goes on
    from its last round. Raises ``UnfedError``, naming the request, for one that cannot be met, before any is begun.
    """
    ahead = foresee(plan)
    old = _known(plan.directory)
    asked = [_asked(name, plan.steps[name], ahead) for name in plan.steps]
    record: dict[str, Any] = {"title": plan.title, "command": plan.command, "requests": [], "looks": []}
    record |= {"kept_rows": len(ahead.kept), "status": "running"}
    looks = [_look(plan, ahead, old, record, _start(plan))]
    keep, place = True, None
    for entry in asked:
        config = plan.steps[entry.name] if place is None else _from(plan.steps[entry.name], place)
        keep = _step(plan, config, entry, record, keep)
        place = Path(config.paths.output_dir)
        looks.append(_look(plan, ahead, old, record, (entry.name, config)))
        _show(SequenceReport(plan.title, plan.command, asked, looks))
    report = SequenceReport(plan.title, plan.command, asked, looks, _notes(plan, ahead))
    record["status"] = "finished"
    write_json(plan.directory / SEQUENCE_FILE, record)
    write_sequence_page(plan.directory / "sequence.html", report)
    return report


def foresee(plan: Plan) -> Foreseen:
    """Choose the rows of every request, one after the other, and see whether its recipe can be followed."""
    forget: dict[str, tuple[Example, ...]] = {}
    clients: dict[str, Mapping[str, int]] = {}
    gone: list[requests.Forgotten] = []
    done: list[RunConfig] = []
    kept: tuple[Example, ...] = ()
    for name, config in plan.steps.items():
        say(f"request {name}:")
        try:
            settled, before = requests.settle(replace(config, overwrite=True), gone)
            found, source = recipes.settled(settled)
            rows, partition, _, _ = prepared(found, _as_then(source, config, done), before)
        except ConfigError as e:
            raise ConfigError([f"request {name}: {p}" for p in e.problems]) from e
        except UnfedError as e:
            raise UnfedError(f"request {name}: {e}") from e
        forget[name], kept = rows.forget, rows.retain
        own = [e["id"] for e in rows.forget]
        clients[name] = {c: len(i) for c, i in partition.owners(own).items()}
        gone.append({"ids": own, "recipe": config.recipe.name if config.recipe else None})
        done.append(config)
    return Foreseen(forget, clients, kept)


def _as_then(source: Source | None, config: RunConfig, done: Sequence[RunConfig]) -> Source | None:
    """The fine-tuning as a request will find it after others: with their adapter in between. Shards that are handed on
    from one isolated request to the next are those of the model to start from."""
    handed_on = all(c.recipe is not None and c.recipe.name == "isolated" for c in (config, *done))
    return replace(source, opened=Path(done[-1].paths.output_dir)) if source and done and not handed_on else source


def _asked(name: str, config: RunConfig, ahead: Foreseen) -> Asked:
    how = [n for n in (config.recipe.name if config.recipe else "in one place", _method(config)) if n]
    where = config.paths.output_dir
    return Asked(name, requests.words(config), ", ".join(how), len(ahead.forget[name]), ahead.clients[name], where)


def _method(config: RunConfig) -> str | None:
    if config.method is None or (config.recipe is not None and not recipes.recipe_of(config).demands.method):
        return None
    return config.method.name


def _from(config: RunConfig, place: Path) -> RunConfig:
    """The run with another model to start from: the result of the request before."""
    args = replace(config.model.model_args, pretrained_model_name_or_path=str(place), lora_model_path=None)
    return replace(config, model=replace(config.model, model_args=args))


def _step(plan: Plan, config: RunConfig, entry: Asked, record: dict[str, Any], keep: bool) -> bool:
    """Meet a request, or keep it where it was met; whether it was kept. ``keep``: all before it were."""
    place = Path(config.paths.output_dir)
    known: dict[str, Any] = asdict(entry)
    record["requests"].append(known)
    kept = keep and is_done(config)
    if kept:
        say(f"\n== {entry.name}: done before, kept ({place})")
    else:
        say(f"\n== {entry.name}: {entry.what}, {entry.rows} rows")
        write_json(plan.directory / SEQUENCE_FILE, record)
        carry_on(config, run)
    known["adapter"] = read_json(place / RUN_FILE).get("adapter")
    write_json(plan.directory / SEQUENCE_FILE, record)
    return kept


def _lasting(config: RunConfig) -> dict[str, Any]:
    """A configuration without what only says how to start."""
    return {k: v for k, v in plain(config).items() if k not in {"resume", "overwrite"}}


def _adapter(config: RunConfig) -> Any:
    """The digest of the adapter that a run starts from, where that is known."""
    args = config.model.model_args
    return origin_of(args.lora_model_path or args.pretrained_model_name_or_path).get("adapter")


def _start(plan: Plan) -> tuple[str, RunConfig]:
    """The model before any request, as an evaluation of it."""
    config = plan.first
    if config.eval is not None:
        config = replace(config, eval=replace(config.eval, robustness=None))
    where = replace(config.paths, output_dir=str(plan.directory / START))
    return START, replace(
        config, mode="eval", task_name=START, paths=where, trainer=None, method=None, aggregator=None, recipe=None,
        forget=ForgetConfig(), history=HistoryConfig(), oracle=None, resume=False, overwrite=True,
    )  # fmt: skip


def _look(
    plan: Plan, ahead: Foreseen, old: Mapping[str, Any], record: dict[str, Any], at: tuple[str, RunConfig]
) -> Look:
    """Score a model of the sequence, or take over what was found before for the same adapter and rows."""
    name, config = at
    place = config if config.mode == "eval" else _from(config, Path(config.paths.output_dir))
    rows = {n: _spread(config, r) for n, r in ahead.forget.items()}
    kept = _spread(config, ahead.kept)
    ids = [[e["id"] for e in r] for r in (*rows.values(), kept)]
    given = digest_json([_adapter(place), _lasting(place) if config.mode == "eval" else plain(config.eval), ids])
    found = next((k for k in old.get("looks", ()) if k.get("given") == given and k.get("after") == name), None)
    if found is None:
        found = {"after": name, "given": given, **_scores(place, rows, kept), "utility": _utility(config)}
    record["looks"].append(found)
    write_json(plan.directory / SEQUENCE_FILE, record)
    forget = {n: Scores(**s) for n, s in found["forget"].items()}
    return Look(name, forget, Scores(**found["kept"]), found["utility"])


def _spread(config: RunConfig, rows: Sequence[Example]) -> list[Example]:
    """At most ``eval.round_limit`` rows, evenly spread over the data."""
    limit = (config.eval or EvalConfig()).round_limit
    return list(rows[:: math.ceil(len(rows) / limit)] if limit else rows)


def _scores(config: RunConfig, rows: Mapping[str, Sequence[Example]], kept: Sequence[Example]) -> dict[str, Any]:
    """The metrics ``forget_Q_A_Prob`` and ``forget_Q_A_ROUGE`` over each request's rows, and ``retain_...`` over what
    is kept."""
    loaded = open_model(config, trainable=False)
    with console.status("looking at what is forgotten"):
        found = {name: _of_rows(config, loaded, "forget", own) for name, own in rows.items()}
        return {"forget": found, "kept": _of_rows(config, loaded, "retain", kept)}


def _of_rows(config: RunConfig, loaded: LoadedModel, split: str, rows: Sequence[Example]) -> dict[str, Any]:
    metrics = (f"{split}_Q_A_Prob", f"{split}_Q_A_ROUGE")
    given = replace(config.eval or EvalConfig(), suite="tofu", metrics=metrics, finetuned_logs_path=None)
    suite = suite_of(given, config.paths.data_dir)
    result = evaluate(loaded.model, loaded.tokenizer, config.model.template_args, suite, {split: rows}).summary()
    return {"prob": result[metrics[0]], "rouge": result.get(metrics[1])}


def _utility(config: RunConfig) -> float | None:
    """Model utility, where the suite has it: of a run that is done, or by evaluating the model to start from."""
    given = config.eval
    if given is None or not given.enabled or given.suite != "tofu" or (given.metrics and UTILITY not in given.metrics):
        return None
    if config.mode == "eval":
        return run(config).summary.get(UTILITY)
    return read_json(Path(config.paths.output_dir) / RUN_FILE).get("summary", {}).get(UTILITY)


def _known(directory: Path) -> Mapping[str, Any]:
    """What an earlier start of the sequence has left."""
    file = directory / SEQUENCE_FILE
    found = read_json(file) if file.is_file() else {}
    if not isinstance(found, Mapping):
        raise ConfigError([f"--directory={directory}: {SEQUENCE_FILE} there is not one of a sequence"])
    return found


def _notes(plan: Plan, ahead: Foreseen) -> list[str]:
    limit = (plan.first.eval or EvalConfig()).round_limit
    most = f"at most {limit} of the rows of each request, and of those that are kept, evenly spread" if limit else "all"
    return [
        f"Kept are {len(ahead.kept)} rows that no request names. Scored: {most}.",
        f"The model to start from: {plan.first.model.model_args.pretrained_model_name_or_path}.",
    ]


def _show(report: SequenceReport) -> None:
    head, *rows = table(report, rouge=False)
    shown = Table(
        title="Probability of the answers (in [ ]: not asked to forget yet)", title_justify="left", show_edge=False
    )
    for n, cell in enumerate(head):
        shown.add_column(escape(cell), justify="right" if n else "left")
    for row in rows:
        shown.add_row(*map(escape, row))
    console.print(shown)
