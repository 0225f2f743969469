"""Evaluate an open model as the configuration says, and write the result files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from torch import nn

from unfed.app.progress import console, say, show_scores
from unfed.base.errors import ConfigError, DataError
from unfed.base.types import Example
from unfed.config.schema import EvalConfig, RunConfig
from unfed.data.datasets import DatasetSpec, data_digest, load_rows
from unfed.data.spec import tofu_datasets
from unfed.evaluation import general
from unfed.evaluation.retain_logs import load_retain_logs
from unfed.evaluation.runner import SUMMARY_FILE, EvalResult, evaluate, write_results
from unfed.evaluation.suites import TOFU_DEFAULT, SuiteConfig
from unfed.models.adapter import snapshot
from unfed.models.generate import Budget, Decoding
from unfed.models.load import LoadedModel, fingerprint, load_model
from unfed.models.spec import TokenizerArgs


def evaluation_rows(config: EvalConfig, data_dir: str | None) -> dict[str, list[Example]]:
    """The rows of every split of the suite. A split that cannot be had is left out, and said."""
    found: dict[str, list[Example]] = {}
    names = tofu_datasets(config.forget_split, config.holdout_split)
    if "holdout" not in names:
        say(f"evaluation: no holdout split goes with forget_split={config.forget_split}; give holdout_split=...")
    for split, name in names.items():
        spec = DatasetSpec(path=config.path, name=name, limit=config.limit)
        try:
            found[split] = load_rows(spec, data_dir)
        except DataError as e:
            if split == "forget":
                raise
            say(f"evaluation: no {split} split: {e}")
    return found


def suite_of(config: EvalConfig) -> SuiteConfig:
    """The evaluation floor's own description of what to do."""
    g = config.generation
    return SuiteConfig(
        metrics=config.metrics,
        datasets=tofu_datasets(config.forget_split, config.holdout_split),
        budget=Budget(config.max_tokens, config.batch_size),
        decoding=Decoding(
            max_new_tokens=g.max_new_tokens, do_sample=g.do_sample, temperature=g.temperature, top_p=g.top_p
        ),
        max_length=config.max_length,
        parity=config.parity,
    )


def _reference(config: RunConfig, loaded: LoadedModel) -> Callable[[], AbstractContextManager[nn.Module]] | None:
    """Opens ``eval.reference_model_path`` when it is needed, and lets go of it afterwards."""
    path = config.eval.reference_model_path if config.eval else None
    if path is None:
        return None
    args = replace(config.model.model_args, pretrained_model_name_or_path=path, lora_model_path=None, use_lora=False)

    @contextmanager
    def opened() -> Iterator[nn.Module]:
        found = load_model(args, TokenizerArgs(), trainable=False)
        if found.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
            raise ConfigError([f"eval.reference_model_path={path}: its tokenizer is another one than the model's"])
        yield found.model

    return opened


def _digests(loaded: LoadedModel) -> dict[str, str]:
    """Which model was scored."""
    if isinstance(loaded.model, PeftModel):
        return {"base": loaded.fingerprint, "adapter": snapshot(loaded.model).digest()}
    # Of a whole model, a copy to hash would cost as much memory again.
    return {"base": loaded.fingerprint, "model": fingerprint(loaded.model)}


def _benchmarks(config: EvalConfig, loaded: LoadedModel, directory: Path) -> EvalResult:
    say(f"benchmarks: {', '.join(config.lm_eval.tasks)}")
    result = general.evaluate_benchmarks(loaded.model, loaded.tokenizer, config.lm_eval)
    general.write_benchmarks(result, directory, _digests(loaded))
    for line in result.lines():
        say(line)
    say(f"{len(result.scores)} scores: {directory / general.EVAL_FILE}")
    return result


def evaluate_model(config: RunConfig, loaded: LoadedModel, directory: Path) -> EvalResult:
    """Score ``loaded`` and write TOFU_EVAL.json and TOFU_SUMMARY.json (LM_... for benchmarks) into ``directory``."""
    assert config.eval is not None
    if config.eval.suite == "lm_eval":
        return _benchmarks(config.eval, loaded, directory)
    logs = load_retain_logs(config.eval.retain_logs_path) if config.eval.retain_logs_path else None
    rows = evaluation_rows(config.eval, config.paths.data_dir)
    with console.status("evaluating") as status:

        def progress(what: str, done: int, total: int) -> None:
            status.update(f"evaluating {what}: {done}/{total}")

        suite = replace(suite_of(config.eval), progress=progress, reference=_reference(config, loaded))
        result = evaluate(loaded.model, loaded.tokenizer, config.model.template_args, suite, rows, logs)
    digests = _digests(loaded) | {f"data.{split}": data_digest(examples) for split, examples in rows.items()}
    write_results(result, directory, digests)
    for name, score in result.scores.items():
        if score.value is None and name in (config.eval.metrics or TOFU_DEFAULT):
            say(f"{name}: no value: {score.why}")
    show_scores(result.summary(), str(directory / SUMMARY_FILE))
    return result
