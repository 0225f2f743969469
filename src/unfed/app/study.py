"""A study: base, fine-tuned, oracle and unlearned models, side by side in one table and one page."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from unfed.app.progress import console, say
from unfed.app.report import make_report, write_report
from unfed.app.rundir import run_status
from unfed.app.runs import run
from unfed.app.stages import carry_on, is_done
from unfed.base.artifacts import read_json, write_json
from unfed.config.schema import RunConfig
from unfed.evaluation.runner import EVAL_FILE, SUMMARY_FILE
from unfed.report.contents import KNOWN, Report
from unfed.report.labels import headline, label, number
from unfed.report.roles import Given
from unfed.report.verdict import verdict


@dataclass(frozen=True)
class Study:
    """The runs of a study. ``unlearn`` maps a model's name in the tables to its run.

    ``oracle`` fine-tunes on the retain rows with the partition of ``finetune``; all runs share the suite of
    evaluation. ``keep``: stages that were finished with the same configuration are not run again.
    """

    title: str
    command: str
    directory: Path
    base: RunConfig
    finetune: RunConfig
    oracle: RunConfig
    unlearn: Mapping[str, RunConfig]
    keep: bool = False


def run_study(study: Study) -> Mapping[str, Mapping[str, float]]:
    """Run every stage, print the table and example answers, write ``summary.json`` and ``report.html``."""
    stages = run_stages(study)
    places = {name: Path(c.paths.output_dir) for name, c in stages.items()}
    models = {"base": places["base"], "finetuned": places["finetuned"], "oracle": places["oracle"]}
    models |= {name: places[name] for name in study.unlearn}
    summaries = {name: read_json(place / SUMMARY_FILE) for name, place in models.items()}
    write_json(study.directory / "summary.json", summaries)
    roles = {name: name if name in KNOWN else "unlearned" for name in models}
    runs = [Given(place, name, roles[name]) for name, place in models.items()]
    # What the fine-tuned model cost stands in its own run: the evaluation beside it only scored it.
    report = make_report([Given(places["finetune"]), *runs], study.command, study.title)
    write_report(study.directory, report)
    _show(report)
    say(f"\nreport: {study.directory / 'report.html'}    numbers: {study.directory / 'summary.json'}")
    return summaries


def run_stages(study: Study) -> dict[str, RunConfig]:
    """Run every stage that is not kept, in order; the stages."""
    if not study.keep:
        _clear(study)
    stages = _stages(study)
    keep = study.keep
    for name, config in stages.items():
        # A stage that ran anew changes what the later ones look at: the adapter, the oracle's log.
        keep = _stage(name, config, keep=keep)
    return stages


def _stages(study: Study) -> dict[str, RunConfig]:
    oracle_logs = str(Path(study.oracle.paths.output_dir) / EVAL_FILE)

    def against_oracle(config: RunConfig) -> RunConfig:
        assert config.eval is not None
        return dataclasses.replace(config, eval=dataclasses.replace(config.eval, retain_logs_path=oracle_logs))

    def against_both(config: RunConfig) -> RunConfig:
        config = against_oracle(config)
        assert config.eval is not None
        logs = str(Path(after.paths.output_dir) / EVAL_FILE)
        return dataclasses.replace(config, eval=dataclasses.replace(config.eval, finetuned_logs_path=logs))

    finetune = dataclasses.replace(study.finetune, eval=None)
    manifest = str(Path(study.finetune.paths.output_dir) / "partition.json")
    oracle = dataclasses.replace(study.oracle, partition=dataclasses.replace(study.oracle.partition, manifest=manifest))
    after = against_oracle(_evaluation_of(study))
    return {
        "finetune": finetune,
        "oracle": oracle,
        "base": against_oracle(study.base),
        "finetuned": after,
        **{name: against_both(c) for name, c in study.unlearn.items()},
    }


def _evaluation_of(study: Study) -> RunConfig:
    """Evaluating the fine-tuned adapter: like the base's evaluation, with the adapter's directory as the model."""
    args = dataclasses.replace(
        study.base.model.model_args, pretrained_model_name_or_path=study.finetune.paths.output_dir, use_lora=True
    )
    paths = dataclasses.replace(study.base.paths, output_dir=str(study.directory / "eval_finetuned"))
    model = dataclasses.replace(study.base.model, model_args=args)
    return dataclasses.replace(study.base, task_name="eval_finetuned", paths=paths, model=model)


def _stage(name: str, config: RunConfig, *, keep: bool) -> bool:
    """Run a stage, or keep it where it was done with the same configuration; whether it was kept."""
    place = Path(config.paths.output_dir)
    if keep and is_done(config):
        say(f"\n== {name}: done before, kept ({place})")
        return True
    say(f"\n== {name}")
    carry_on(config, run)
    return False


def _clear(study: Study) -> None:
    """Remove the stages of an earlier run of this study; only directories that hold one."""
    for config in _stages(study).values():
        place = Path(config.paths.output_dir)
        if run_status(place) is not None and place.is_relative_to(study.directory):
            shutil.rmtree(place)


def _show(report: Report) -> None:
    table = Table(title=report.title, title_justify="left", show_edge=False)
    table.add_column("metric")
    for model in report.models:
        table.add_column(model.name, justify="right")
    for metric in headline(report.metrics):
        table.add_row(label(metric), *(number(metric, m.summary.get(metric)) for m in report.models))
    console.print()
    console.print(table)
    for answer in report.answers:
        say(f"\n{answer.split}: {answer.question}\n  truth      {answer.truth}")
        for model, text in answer.said.items():
            say(f"  {model:<10} {text}")
    say("")
    known = {m.role: m.summary for m in report.models}
    for model in report.unlearned:
        say(verdict({**known, model.name: model.summary}, model.name))
