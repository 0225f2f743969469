"""The robustness checks of an open model, as the configuration names them: run, recorded and shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from peft import PeftModel
from rich.table import Table

from unfed.app.evaluate import another_model, evaluation_splits, suite_of
from unfed.app.progress import console, say
from unfed.base.artifacts import write_json
from unfed.base.types import Example
from unfed.config.schema import RunConfig
from unfed.config.schema_eval import RobustnessConfig
from unfed.data.datasets import data_digest, place_of
from unfed.evaluation.logs import RUN_KEY
from unfed.evaluation.robustness import CannotBeDoneError, Outcome, Subject
from unfed.evaluation.robustness_prompts import Sampling, best_of_n, paraphrasing, prefixing
from unfed.evaluation.robustness_relearn import Opened, Relearning, relearning
from unfed.evaluation.robustness_weights import adding, merging, quantization
from unfed.evaluation.rows import read_rows
from unfed.evaluation.runner import EvalResult
from unfed.evaluation.suites import SUITES
from unfed.models.adapter import snapshot
from unfed.models.load import LoadedModel
from unfed.models.source import is_adapter_dir
from unfed.report.labels import METRICS, number

ROBUSTNESS_FILE = "ROBUSTNESS.json"
GROUPED_BITS = 4
Check = tuple[str, Callable[[], Outcome]]


def check_robustness(
    config: RunConfig, loaded: LoadedModel, directory: Path, evaluation: EvalResult
) -> tuple[Outcome, ...]:
    """Make every check that is on, write ROBUSTNESS.json into ``directory`` and print a table.

    ``evaluation``: the model's own, before any attempt. The model is left as it was.
    """
    assert config.eval is not None
    given = config.eval.robustness
    assert given is not None
    suite = SUITES[config.eval.suite]
    rows = read_rows(suite, given.metrics, evaluation_splits(config.eval), config.paths.data_dir)
    outcomes: list[Outcome] = []
    with console.status("robustness") as status:

        def progress(what: str, done: int, total: int) -> None:
            status.update(f"robustness: {name}: {what}: {done}/{total}")

        name = "before"
        subject = _subject(config, loaded, rows, evaluation)
        subject = replace(subject, suite=replace(subject.suite, progress=progress))
        if missing := [m for m in given.metrics if m not in evaluation.scores]:
            own = replace(subject, suite=replace(subject.suite, metrics=tuple(missing))).measure()
            subject = replace(subject, before={**subject.before, **own})
        for name, check in _checks(config, given, loaded, subject):
            status.update(f"robustness: {name}")
            try:
                outcomes.append(check())
            except CannotBeDoneError as e:
                outcomes.append(Outcome(name, left_out=str(e)))
    _write(config, loaded, directory, subject, outcomes)
    _show(given.metrics, subject, outcomes)
    say(f"robustness: {directory / ROBUSTNESS_FILE}")
    return tuple(outcomes)


def _subject(
    config: RunConfig, loaded: LoadedModel, rows: Mapping[str, Sequence[Example]], evaluation: EvalResult
) -> Subject:
    assert config.eval is not None
    assert config.eval.robustness is not None
    return Subject(
        loaded.model,
        loaded.tokenizer,
        config.model.template_args,
        replace(suite_of(config.eval), metrics=config.eval.robustness.metrics),
        rows,
        {name: score.value for name, score in evaluation.scores.items()},
        place_of(evaluation_splits(config.eval)["forget"].data, config.paths.data_dir),
    )


def _checks(config: RunConfig, given: RobustnessConfig, loaded: LoadedModel, subject: Subject) -> Iterator[Check]:
    """The checks that are on, in order: those that only ask come first."""
    if given.paraphrase:
        yield "paraphrase", partial(paraphrasing, subject)
    for k, prefix in enumerate(given.prefix, 1):
        name = "prefix" if len(given.prefix) == 1 else f"prefix_{k}"
        yield name, partial(prefixing, subject, prefix, name)
    if (sampling := given.best_of) is not None:
        yield "best_of", partial(best_of_n, subject, Sampling(**asdict(sampling), seed=config.seed))
    if given.merge:
        yield "merge", partial(merging, subject)
    for bits in given.quantize:
        group = given.group_size if bits == GROUPED_BITS else None
        yield f"quantize_{bits}bit", partial(quantization, subject, bits, group, given.quantizer)
    if (path := given.add_adapter) is not None:
        yield "add_adapter", partial(adding, subject, path)
    if (relearn := given.relearn) is not None:
        settings = Relearning(**asdict(relearn), seed=config.seed)
        yield "relearn", partial(relearning, subject, settings, _oracle(config, given, loaded))


def _oracle(config: RunConfig, given: RobustnessConfig, loaded: LoadedModel) -> Opened | None:
    """Opens the retain model beside the one under test, and lets go of it afterwards."""
    if (path := given.oracle_path) is None:
        return None
    own = config.model.model_args
    base = own.base_model_name_or_path if is_adapter_dir(path) else None
    args = replace(
        own, pretrained_model_name_or_path=path, lora_model_path=None, base_model_name_or_path=base, use_lora=False
    )
    return partial(another_model, args, loaded, "eval.robustness.oracle_path")


def _write(
    config: RunConfig, loaded: LoadedModel, directory: Path, subject: Subject, outcomes: Sequence[Outcome]
) -> None:
    digests = {"base": loaded.fingerprint}
    if isinstance(loaded.model, PeftModel):
        digests["adapter"] = snapshot(loaded.model).digest()
    run = {
        "metrics": list(subject.suite.metrics),
        "forget_rows": subject.source,
        "splits": {s: {"rows": len(rows), "digest": data_digest(rows)} for s, rows in subject.rows.items()},
        "seed": config.seed,
        "digests": digests,
    }
    checks = {outcome.check: outcome.record() for outcome in outcomes}
    write_json(directory / ROBUSTNESS_FILE, {"checks": checks, RUN_KEY: run})


def _show(metrics: Sequence[str], subject: Subject, outcomes: Sequence[Outcome]) -> None:
    """A row a check: each metric after it and its score; what was left out, and why."""
    title = "Robustness: after each attempt (in brackets its score, 1 is the best)"
    table = Table(title=title, title_justify="left", show_edge=False)
    table.add_column("check")
    for metric in metrics:
        table.add_column(METRICS.get(metric, (metric,))[0], justify="right")
    table.add_row("as it is", *(number(m, subject.before.get(m)) for m in metrics))
    for outcome in outcomes:
        if outcome.left_out is None:
            table.add_row(outcome.check, *(_cell(outcome, m) for m in metrics))
            oracle = outcome.extra.get("oracle", {})
            for label, when in (("  the oracle", "before"), ("  oracle relearned", "after")):
                if when in oracle:
                    table.add_row(label, *(number(m, oracle[when].get(m)) for m in metrics))
    console.print(table)
    for outcome in outcomes:
        if outcome.left_out is not None:
            say(f"{outcome.check}: left out: {outcome.left_out}")
        elif "leak_rate" in outcome.extra:
            say(f"{outcome.check}: leak rate {outcome.extra['leak_rate']:.3f}")
        elif outcome.why is not None:
            say(f"{outcome.check}: no score: {outcome.why}")
        if "note" in outcome.extra:
            say(f"{outcome.check}: {outcome.extra['note']}")


def _cell(outcome: Outcome, metric: str) -> str:
    if metric not in outcome.after:
        return ""
    # An attempt that was too weak has a note in place of scores: the quotient of two gains near 0 says nothing.
    score = None if "note" in outcome.extra else outcome.score.get(metric)
    return number(metric, outcome.after[metric]) + ("" if score is None else f" ({score:.2f})")
