"""The oracle of an unlearning run: the model that fine-tuning would have made without the forget rows.

It is trained as the fine-tuned adapter was (the configuration in that run's ``run.json``): the same base, partition,
seeds and schedule, and the same rows but those to forget. It is trained once, under a name made of all that decides it,
and evaluated with the unlearning run's own suite; the result is what ``retain_logs_path`` stands for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from unfed.app.build import forget_rows
from unfed.app.evaluate import evaluation_rows
from unfed.app.probe import origin_of
from unfed.app.progress import say
from unfed.app.requests import settle
from unfed.app.rundir import PARTITION_FILE, RUN_FILE, plain, run_status, seen_rows, training_identity
from unfed.app.server_rows import server_ids
from unfed.app.source import made_by, source_directory
from unfed.app.stages import Start, carry_on
from unfed.base.artifacts import digest_file, digest_json, read_json
from unfed.base.errors import ArtifactError, ConfigError, UnfedError
from unfed.config.preflight import preflight
from unfed.config.schema import EvalConfig, HistoryConfig, PersonaliseConfig, RunConfig
from unfed.config.shape import validate
from unfed.data.datasets import load_rows
from unfed.evaluation.suites import SUITES

RELATIVE = frozenset({"utility", "agg"})
"""Metrics that compare with the fine-tuned model."""


def with_oracle(config: RunConfig, start: Start) -> RunConfig:
    """``config`` with the logs of its oracle, trained and evaluated where that was not done before.

    Where a metric is relative to the fine-tuned model, that is evaluated as well. Raises ``UnfedError`` where the
    adapter does not say how it was made.
    """
    if config.eval is None or not config.eval.enabled or config.eval.suite not in SUITES:
        raise ConfigError(["oracle=auto: there is no evaluation that would compare with it (eval, eval.enabled)"])
    given = replace(config.eval, retain_logs_path=str(oracle_logs(config, start)))
    if RELATIVE & set(given.metrics) and given.finetuned_logs_path is None:
        source = finetuned_run(config)
        logs = _evaluated(config, source, source.parent / f"{source.name}_eval", given.retain_logs_path, start)
        given = replace(given, finetuned_logs_path=str(logs))
    return replace(config, eval=given, oracle=None)


def oracle_logs(config: RunConfig, start: Start) -> Path:
    """The result file of the oracle of an unlearning run; made where it is not there."""
    oracle = oracle_config(config)
    place = Path(oracle.paths.output_dir)
    if run_status(place) == "finished":
        say(f"oracle: trained before ({place})")
    else:
        say(f"oracle: training the model that never saw the forget rows ({place})")
        carry_on(oracle, start)
    return _evaluated(config, place, place, None, start)


def oracle_config(config: RunConfig) -> RunConfig:
    """The fine-tuning that leaves out the forget rows of the unlearning run ``config``, and all rows that the model
    which it starts from has forgotten before."""
    if config.mode != "unlearn":
        raise ConfigError([f"oracle: a run with mode={config.mode} has none; it belongs to an unlearning run"])
    config, before = settle(config)
    source = finetuned_run(config)
    made = _configuration(source)
    assert made.data.train is not None
    rows = {row["id"] for row in forget_rows(config)} | {i for request in before for i in request["ids"]}
    _check_rows(config, made, source, rows)
    manifest = source / PARTITION_FILE
    oracle = replace(
        made,
        data=replace(made.data, exclude_ids=tuple(sorted(rows | set(made.data.exclude_ids)))),
        partition=replace(made.partition, manifest=str(manifest)) if manifest.is_file() else made.partition,
        trainer=made.trainer and replace(made.trainer, args={**made.trainer.args, "eval_strategy": "no"}),
        eval=None,
        oracle=None,
        history=HistoryConfig(),
        personalise=PersonaliseConfig(),
        resume=False,
        overwrite=False,
    )
    parts = [training_identity(oracle), sorted(rows), digest_file(manifest) if manifest.is_file() else None]
    name = f"{source.name}_{digest_json([*parts, origin_of(source).get('base_fingerprint')]).rpartition(':')[2][:12]}"
    place = Path(config.paths.root_dir) / "saves" / "oracle" / name
    oracle = replace(oracle, task_name=name, paths=replace(made.paths, output_dir=str(place)))
    problems = preflight(oracle)
    if problems:
        raise ConfigError([f"oracle (as {source / RUN_FILE} has it): {p}" for p in problems])
    return oracle


def _check_rows(config: RunConfig, made: RunConfig, source: Path, forget: set[str]) -> None:
    """Refuse a fine-tuning that leaving out the ``forget`` rows would not turn into the model that never saw them."""
    assert made.data.train is not None
    assert config.data.forget is not None
    known = {row["id"] for row in load_rows(made.data.train, made.paths.data_dir)} - server_ids(source)
    if not forget & known:
        raise UnfedError(
            f"oracle: none of the {len(forget)} rows of data.forget ({config.data.forget.name}) was among the rows "
            f"that {source} was fine-tuned on ({made.data.train.name}): there is nothing to leave out"
        )
    args = made.model.model_args
    before = set().union(*(seen_rows(p) for p in (args.lora_model_path, args.pretrained_model_name_or_path)))
    if forget & before:
        raise UnfedError(
            f"oracle: {source} went on from a model that was trained on {len(forget & before)} of the forget rows, so "
            "it would never be without them: train and evaluate the oracle yourself, and give its result file as "
            "retain_logs_path"
        )
    trained = seen_rows(str(source))
    if trained and known | before != trained:
        raise UnfedError(
            f"oracle: data.train ({made.data.train.name}) is no longer what {source} was fine-tuned on: "
            f"{len((known | before) - trained)} rows are new and {len(trained - known - before)} are gone"
        )


def finetuned_run(config: RunConfig) -> Path:
    """The directory of the fine-tuning that the run's adapter comes from, through the unlearning runs in between."""
    place = source_directory(config) or made_by(config)[0]
    if place is not None:
        return place
    args = config.model.model_args
    named = args.lora_model_path or args.pretrained_model_name_or_path
    raise UnfedError(
        f"oracle=auto: {named} has no {RUN_FILE} that says how it was trained, so its oracle cannot be trained in the "
        "same way: fine-tune with Unfed, or train a model without the forget rows yourself (unfed train with "
        "train_split=retain90), evaluate it, and give its result file as retain_logs_path"
    )


def _configuration(source: Path) -> RunConfig:
    """The configuration of a finished fine-tuning."""
    stored = _record(source).get("config")
    made, problems = validate(stored) if isinstance(stored, dict) else (None, ["it holds no configuration"])
    if made is None or problems:
        raise ArtifactError(
            f"oracle: {source / RUN_FILE} cannot be read as a run of this version: {'; '.join(problems)}"
        )
    if made.mode != "finetune":
        raise UnfedError(
            f"oracle=auto: {source} was made by mode={made.mode}, and the fine-tuning that it goes back to is not "
            "there, so its oracle cannot be trained in the same way: train and evaluate it yourself, without all rows "
            "that were ever to be forgotten, and give its result file as retain_logs_path"
        )
    return made


def _evaluated(config: RunConfig, model: Path, below: Path, retain_logs: str | None, start: Start) -> Path:
    """The result file of ``model`` under the suite of ``config``; evaluated where that was not done before."""
    assert config.eval is not None
    suite = replace(config.eval, retain_logs_path=retain_logs, finetuned_logs_path=None)
    name = digest_json([_settings(suite), _asked_of(config, suite), _record(model).get("adapter")])
    place = below / f"eval_{name.rpartition(':')[2][:12]}"
    file = place / SUITES[suite.suite].eval_file
    if run_status(place) == "finished" and file.is_file():
        return file
    args = replace(config.model.model_args, pretrained_model_name_or_path=str(model), lora_model_path=None)
    say(f"evaluating {model}")
    start(
        replace(
            config,
            mode="eval",
            task_name=place.name,
            model=replace(config.model, model_args=args),
            paths=replace(config.paths, output_dir=str(place)),
            trainer=None,
            method=None,
            aggregator=None,
            eval=suite,
            oracle=None,
            resume=False,
            overwrite=True,
        )
    )
    return file


def _settings(suite: EvalConfig) -> dict[str, Any]:
    """What decides the numbers: not where things are kept, nor how they are batched."""
    passing = {"cache_dir", "batch_size", "max_tokens", "round_metrics", "round_limit", "enabled"}
    return {k: v for k, v in plain(suite).items() if k not in passing}


def _asked_of(config: RunConfig, suite: EvalConfig) -> dict[str, Any]:
    """The rows of an evaluation, and how a model is opened and asked, whichever model it is."""
    own = {"pretrained_model_name_or_path", "lora_model_path", "base_model_name_or_path", "use_lora", "lora_config"}
    how = plain(config.model)
    how["model_args"] = {k: v for k, v in how["model_args"].items() if k not in own}
    # Whole rows: the ids cover the question and the right answer alone.
    rows = {s: digest_json(found) for s, found in evaluation_rows(suite, config.paths.data_dir).items()}
    return {"model": how, "rows": rows, "seed": config.seed if suite.generation.do_sample else None}


def _record(place: Path) -> dict[str, Any]:
    found = read_json(place / RUN_FILE)
    return found if isinstance(found, dict) else {}
