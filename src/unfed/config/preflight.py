"""The files and directories that a run names, looked at before anything is loaded or made."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unfed.base.errors import ConfigError, DataError, UnfedError
from unfed.config.checks import datasets
from unfed.config.schema import FEDERATED_TRAINERS, UNSET, EvalConfig, RunConfig
from unfed.data.benchmarks import splits_of
from unfed.models.source import path_problem, resolve_source
from unfed.models.spec import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:  # it brings torch, which takes seconds that a mistake should not
    from unfed.base.types import Example


def preflight(config: RunConfig) -> list[str]:
    """What is wrong on disk, each problem with its key. Nothing is written, and no network is asked."""
    found = list(dict.fromkeys(problem for check in PREFLIGHT for problem in check(config)))
    # Reading every row takes a second; it can wait until the rest is right.
    return found or _evaluation_rows(config)


def _model_files(config: RunConfig) -> Iterator[str]:
    args = config.model.model_args
    try:
        resolve_source(args, config.model.tokenizer_args)
    except UnfedError as e:
        yield str(e)


def _reference_model(config: RunConfig) -> Iterator[str]:
    if config.eval is None or not config.eval.enabled:
        return
    for key in ("reference_model_path", "gibberish_model"):
        path = getattr(config.eval, key)
        if path is not None and (problem := path_problem(path)) is not None:
            yield f"eval.{key}={path}: {problem}"


def _benchmarks(config: RunConfig) -> Iterator[str]:
    if config.eval is not None and config.eval.enabled and config.eval.suite == "lm_eval":
        from unfed.evaluation.lm_tasks import limit_problems, task_problems

        if not limit_problems(config.eval.lm_eval):
            yield from task_problems(config.eval.lm_eval)


def _robustness_models(config: RunConfig) -> Iterator[str]:
    given = config.eval.robustness if config.eval is not None and config.eval.enabled else None
    if given is None:
        return
    if given.quantize and given.quantizer == "bitsandbytes" and importlib.util.find_spec("bitsandbytes") is None:
        yield "eval.robustness.quantizer=bitsandbytes: is not installed (pip install bitsandbytes); auto goes without"
    if (path := given.oracle_path) is not None:
        key, there = f"eval.robustness.oracle_path={path}", Path(path)
        if (problem := path_problem(path)) is not None:
            yield f"{key}: {problem}"
        elif there.exists() and not any((there / name).is_file() for name in (ADAPTER_CONFIG, "config.json")):
            yield f"{key}: is neither an adapter ({ADAPTER_CONFIG}) nor a model (config.json)"
    if (path := given.add_adapter) is not None:
        missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (Path(path) / name).is_file()]
        if missing:
            yield f"eval.robustness.add_adapter={path}: must be an adapter's directory; there is no {missing[0]}"


def _data_files(config: RunConfig) -> Iterator[str]:
    from unfed.data.datasets import preflight as look

    if config.engine.name == "nvflare":  # they are at the sites, which look for themselves
        return
    sets = {(d.path, d.name): d for _, d in datasets(config)}
    try:
        found = [problem for spec in sets.values() for problem in look(spec, config.paths.data_dir)]
    except DataError as e:
        found = [str(e)]
    yield from found


def _evaluation_rows(config: RunConfig) -> list[str]:
    """The evaluation's local files, every line and column: they are read after the training, which would be wasted.

    What lies on the hub is looked at when it is there.
    """
    given, data_dir = config.eval, config.paths.data_dir
    if given is None or not given.enabled or given.suite == "lm_eval":
        return []
    from unfed.data.datasets import FICTIONAL, local_file
    from unfed.evaluation.rows import read_rows
    from unfed.evaluation.suites import SUITES

    splits = splits_of(given.suite, given.path, given.forget_split, given.holdout_split, given.limit)
    here = {}
    try:
        for name, split in splits.items():
            with contextlib.suppress(DataError):  # a file that is missing is said below, with what needs it
                if split.data.path != FICTIONAL and local_file(split.data, data_dir) is None:
                    continue
            here[name] = split
        _logs(given, read_rows(SUITES[given.suite], given.metrics, here, data_dir))
        if config.trainer is not None and config.trainer.args.get("eval_strategy") in ("round", "phase"):
            read_rows(SUITES[given.suite], given.round_metrics, here, data_dir)
    except ConfigError as e:
        return list(e.problems)
    except UnfedError as e:
        return [str(e)]
    return []


def _logs(given: EvalConfig, rows: Mapping[str, Sequence[Example]]) -> None:
    """Other models' logs: they too are read after the training. Raises ``UnfedError``."""
    if given.retain_logs_path is None and given.finetuned_logs_path is None:
        return
    from unfed.evaluation.logs import load_model_logs
    from unfed.evaluation.runner import check_finetuned_logs, check_retain_logs
    from unfed.evaluation.suites import SUITES
    from unfed.metrics.summary import RELATIVE_PARTS

    metrics = SUITES[given.suite].select(given.metrics)
    if (path := given.retain_logs_path) is not None:
        check_retain_logs(load_model_logs(path), metrics, rows)
    if (path := given.finetuned_logs_path) is not None:
        logs = load_model_logs(path, "eval.finetuned_logs_path")
        check_finetuned_logs(logs, metrics, rows)
        for name in RELATIVE_PARTS if "utility" in {m.name for m in metrics} else ():
            logs.value(name)


def _other_files(config: RunConfig) -> Iterator[str]:
    named = {
        "partition.manifest": config.partition.manifest,
        "clients.availability": config.clients.availability,
        "data.idk": config.data.idk,
        "data.alternate": config.data.alternate,
    }
    if config.eval is not None:
        named["retain_logs_path"] = config.eval.retain_logs_path
        named["eval.finetuned_logs_path"] = config.eval.finetuned_logs_path
    for key, path in named.items():
        if path not in (None, UNSET) and not Path(path).exists():
            yield f"{key}={path}: there is no such file"


def _manifest(config: RunConfig) -> Iterator[str]:
    """The target client against the partition that an earlier run wrote beside its adapter."""
    trainer, args = config.trainer, config.model.model_args
    index = trainer.method_args.target_client_idx if trainer is not None else None
    if trainer is None or trainer.handler not in FEDERATED_TRAINERS or not isinstance(index, int):
        return
    places = [Path(p) / "partition.json" for p in (args.lora_model_path, args.pretrained_model_name_or_path) if p]
    file = next((f for f in (Path(config.partition.manifest or ""), *places) if f.is_file()), None)
    if file is None:
        return
    from unfed.data.given import clients_of

    try:
        clients = len(clients_of(file))
    except UnfedError as e:
        yield str(e)
        return
    if index >= clients:
        yield f"trainer.method_args.target_client_idx={index}: {file} has {clients} clients (0 to {clients - 1})"


def _output(config: RunConfig) -> Iterator[str]:
    path = Path(config.paths.output_dir)
    if path.exists() and not path.is_dir():
        yield f"paths.output_dir={path}: is a file"
        return
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield f"paths.output_dir={path}: {there} cannot be written to"


PREFLIGHT: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    _model_files,
    _reference_model,
    _robustness_models,
    _benchmarks,
    _data_files,
    _other_files,
    _manifest,
    _output,
)
