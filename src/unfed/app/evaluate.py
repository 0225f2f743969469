"""Evaluate an open model as the configuration says, and write the result files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from peft import PeftModel
from torch import nn

from unfed.app.progress import console, say, show_scores
from unfed.app.rundir import seen_rows
from unfed.base.errors import ConfigError, DataError
from unfed.base.types import Example
from unfed.config.schema import EvalConfig, RunConfig
from unfed.data.benchmarks import EvaluationSplit, Layout, splits_of
from unfed.data.datasets import data_digest, load_rows, place_of
from unfed.evaluation import general
from unfed.evaluation.cache import EvidenceCache
from unfed.evaluation.collect import encode_column
from unfed.evaluation.logs import load_model_logs
from unfed.evaluation.rows import needed_columns, read_rows
from unfed.evaluation.runner import EvalResult, evaluate, write_results
from unfed.evaluation.scoring import Pass
from unfed.evaluation.suites import SUITES, SuiteConfig
from unfed.models.adapter import snapshot
from unfed.models.digest import model_digest
from unfed.models.generate import Budget, Decoding
from unfed.models.load import LoadedModel, fingerprint, load_model
from unfed.models.spec import ModelArgs, TokenizerArgs


def evaluation_splits(config: EvalConfig) -> dict[str, EvaluationSplit]:
    """The splits of the configured suite."""
    return splits_of(config.suite, config.path, config.forget_split, config.holdout_split, config.limit)


def evaluation_rows(config: EvalConfig, data_dir: str | None) -> dict[str, list[Example]]:
    """The rows of every split that a wanted metric looks at. A forget split may have no holdout; that is said."""
    if config.suite == "lm_eval":
        return {}
    splits, suite = evaluation_splits(config), SUITES[config.suite]
    if "holdout" not in splits and "holdout" in needed_columns(suite, config.metrics):
        say(f"evaluation: no holdout split goes with forget_split={config.forget_split}; give holdout_split=...")
    return read_rows(suite, config.metrics, splits, data_dir)


def suite_of(config: EvalConfig, data_dir: str | None = None) -> SuiteConfig:
    """The evaluation floor's own description of what to do; rows that are shown as examples are read."""
    g = config.generation
    splits = evaluation_splits(config)
    asked = needed_columns(SUITES[config.suite], config.metrics)
    logs = config.finetuned_logs_path
    return SuiteConfig(
        metrics=config.metrics,
        suite=SUITES[config.suite],
        datasets={s: e.data.full_name for s, e in splits.items()},
        layouts={s: _with_shots(e, data_dir) for s, e in splits.items() if s in asked},
        budget=Budget(config.max_tokens, config.batch_size),
        decoding=Decoding(
            max_new_tokens=g.max_new_tokens, do_sample=g.do_sample, temperature=g.temperature, top_p=g.top_p
        ),
        max_length=config.max_length,
        parity=config.parity,
        finetuned_logs=load_model_logs(logs, "eval.finetuned_logs_path") if logs else None,
        classifier=config.gibberish_model,
    )


def _with_shots(split: EvaluationSplit, data_dir: str | None) -> Layout:
    if split.shots is None:
        return split.layout
    rows = load_rows(split.shots, data_dir)
    return replace(split.layout, shots=tuple((str(r["question"]), str(r["answer"])) for r in rows))


def _reference(config: RunConfig, loaded: LoadedModel) -> Callable[[], AbstractContextManager[nn.Module]] | None:
    """Opens ``eval.reference_model_path`` when it is needed, and lets go of it afterwards."""
    path = config.eval.reference_model_path if config.eval else None
    if path is None:
        return None
    args = replace(config.model.model_args, pretrained_model_name_or_path=path, lora_model_path=None, use_lora=False)
    return partial(another_model, args, loaded, "eval.reference_model_path")


@contextmanager
def another_model(args: ModelArgs, loaded: LoadedModel, key: str) -> Iterator[nn.Module]:
    """A model opened beside ``loaded``, for a ``with`` block; ``ConfigError`` naming ``key`` for another tokenizer."""
    found = load_model(args, TokenizerArgs(), trainable=False)
    if found.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        path = args.pretrained_model_name_or_path
        raise ConfigError([f"{key}={path}: its tokenizer is another one than the model's"])
    yield found.model


def _cache(config: EvalConfig, loaded: LoadedModel) -> EvidenceCache | None:
    offloaded = any(p.device.type == "meta" for p in loaded.model.parameters())
    # What is offloaded or packed cannot be digested bit for bit.
    if config.cache_dir is None or offloaded or getattr(loaded.model, "is_quantized", False):
        return None
    digest = model_digest(loaded.model, loaded.tokenizer)
    judged_by_base = config.reference_model_path is None
    return EvidenceCache(Path(config.cache_dir), digest.model, digest.base if judged_by_base else None)


def _benchmarks(config: EvalConfig, loaded: LoadedModel, directory: Path) -> EvalResult:
    say(f"benchmarks: {', '.join(config.lm_eval.tasks)}")
    result = general.evaluate_benchmarks(loaded.model, loaded.tokenizer, config.lm_eval)
    general.write_benchmarks(result, directory, digests_of(loaded))
    for line in result.lines():
        say(line)
    say(f"{len(result.scores)} scores: {directory / general.EVAL_FILE}")
    return result


def evaluate_model(
    config: RunConfig, loaded: LoadedModel, directory: Path, rows: Mapping[str, Sequence[Example]] | None = None
) -> EvalResult:
    """Score ``loaded`` and write the suite's result files into ``directory``; ``rows`` where they were read before."""
    given = config.eval
    assert given is not None
    if given.suite == "lm_eval":
        return _benchmarks(given, loaded, directory)
    logs = load_model_logs(given.retain_logs_path) if given.retain_logs_path else None
    if logs is not None and isinstance(loaded.model, PeftModel):
        logs.check_base(loaded.fingerprint)
    rows = evaluation_rows(given, config.paths.data_dir) if rows is None else rows
    suite = suite_of(given, config.paths.data_dir)
    _tokenise(config, loaded, suite, rows)
    with console.status("evaluating") as status:

        def progress(what: str, done: int, total: int) -> None:
            status.update(f"evaluating {what}: {done}/{total}")

        cache = _cache(given, loaded)
        suite = replace(suite, progress=progress, reference=_reference(config, loaded), cache=cache)
        result = evaluate(loaded.model, loaded.tokenizer, config.model.template_args, suite, rows, logs)
    seen = seen_rows(loaded.adapter_path)
    forgotten = sum(row["id"] in seen for row in rows.get("forget", ())) if seen else None
    write_results(result, directory, {**digests_of(loaded), **_data_digests(rows)}, forgotten)
    if cache is not None and (read := cache.tally["read"]):
        passes = read + cache.tally["made"]
        say(f"{read} of {passes} passes over answers were read from {cache.directory} (eval.cache_dir=null keeps none)")
    say_remarks(result, given.metrics or result.suite.default)
    show_scores(result.summary(), str(directory / result.suite.summary_file))
    return result


def say_remarks(result: EvalResult, wanted: Sequence[str]) -> None:
    """Why wanted metrics have no value, and what privleak was compared with where that is no oracle."""
    gaps: dict[str, list[str]] = {}
    for name, score in result.scores.items():
        if score.value is None and name in wanted:
            gaps.setdefault(str(score.why), []).append(name)
    for why, names in gaps.items():
        say(f"no value for {', '.join(names)}: {why}")
    leak = result.scores.get("privleak")
    if leak is not None and leak.value is not None and leak.why is not None and "privleak" in wanted:
        say(f"privleak is no comparison with an oracle: {leak.why}")


def check_tokens(config: RunConfig, loaded: LoadedModel) -> None:
    """Tokenise what the evaluation will score, before anything is trained; the tokens are kept.

    Raises ``DataError`` naming the file and the column of which template and ``eval.max_length`` leave no token.
    """
    given, data_dir = config.eval, config.paths.data_dir
    if given is None or not given.enabled or given.suite == "lm_eval":
        return
    suite = suite_of(given, data_dir)
    _tokenise(config, loaded, suite, read_rows(suite.suite, given.metrics, evaluation_splits(given), data_dir))


def _tokenise(
    config: RunConfig, loaded: LoadedModel, suite: SuiteConfig, rows: Mapping[str, Sequence[Example]]
) -> None:
    given, data_dir = config.eval, config.paths.data_dir
    assert given is not None
    splits = evaluation_splits(given)
    how = Pass(
        loaded.model, loaded.tokenizer, config.model.template_args, max_length=given.max_length, layouts=suite.layouts
    )
    columns = dict.fromkeys(c for m in suite.suite.select(given.metrics) for c in m.rule.columns)
    for split, column in columns:
        if split not in rows:
            continue
        try:
            encode_column(how, rows[split], split, column)
        except DataError as e:
            where = place_of(splits[split].data, data_dir)
            raise DataError(f"{where}, column {column!r}: {e} (eval.max_length, model.template_args)") from e


def digests_of(loaded: LoadedModel) -> dict[str, str]:
    """What a result file says about the model that it is of."""
    if isinstance(loaded.model, PeftModel):
        return {"base": loaded.fingerprint, "adapter": snapshot(loaded.model).digest()}
    return {"base": loaded.fingerprint, "model": fingerprint(loaded.model)}


def _data_digests(rows: Mapping[str, Sequence[Example]]) -> dict[str, str]:
    return {f"data.{split}": data_digest(examples) for split, examples in rows.items()}
