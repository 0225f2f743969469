"""``unfed quickstart`` at a size for tests: every stage runs, and what a reader is promised is there."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from unfed.app import study as study_module
from unfed.app.rundir import plain
from unfed.app.tiny_base import tiny_base
from unfed.base.artifacts import write_json
from unfed.cli import study
from unfed.config.schema import RunConfig
from unfed.report.verdict import verdict


@pytest.fixture(scope="module")
def small_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quickstart") / "qs"
    base = tiny_base(directory.parent / "base", size="test")
    overrides = ["trainer.method_args.global_rounds=1", "eval.generation.max_new_tokens=8", "trainer.args.max_steps=3"]
    assert study._run(study.QUICKSTART, directory, overrides, lambda _: str(base)) == 0
    return directory


def test_summary_has_the_promised_models_and_names(small_quickstart: Path) -> None:
    summary = json.loads((small_quickstart / "summary.json").read_text())
    assert list(summary) == ["base", "finetuned", "oracle", "unlearned"]
    for scores in summary.values():
        assert {"forget_Q_A_Prob", "retain_Q_A_Prob", "forget_Q_A_ROUGE", "model_utility"} <= scores.keys()
    assert "forget_quality" in summary["unlearned"], "the oracle's log reached the unlearned model's evaluation"


def test_oracle_never_saw_the_forget_rows(small_quickstart: Path) -> None:
    """Same partition file, and the target client trained on fewer rows."""
    runs = {n: json.loads((small_quickstart / n / "run.json").read_text()) for n in ("finetune", "oracle")}
    assert (small_quickstart / "finetune" / "partition.json").read_bytes() == (
        small_quickstart / "oracle" / "partition.json"
    ).read_bytes()
    assert runs["oracle"]["rounds"][0]["num_examples"] == 126
    assert runs["finetune"]["rounds"][0]["num_examples"] == 168


def test_report_is_one_page_that_loads_nothing(small_quickstart: Path) -> None:
    html = (small_quickstart / "report.html").read_text()
    assert (
        html.count("data:image/png;base64,") == 6
    )  # what goes, what stays, the scatter, Mem and its like, the losses, who owns what
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", html)
    assert "<script" not in html
    for words in ("forget probability", "oracle", "What the models say", "What it cost"):
        assert words in html
    with (small_quickstart / "report.csv").open() as f:
        rounds = {row["name"]: row["rounds"] for row in csv.DictReader(f)}
    assert rounds == {"base": "", "finetuned": "1", "oracle": "1", "unlearned": "2"}, "of the runs that trained"
    assert (small_quickstart / "report.png").read_bytes().startswith(b"\x89PNG")


def test_verdict_in_words() -> None:
    """before 0.9, oracle 0.3: forgetting all of the difference is 0.6."""

    def scores(forget: float, retain: float) -> dict[str, float]:
        return {"forget_Q_A_Prob": forget, "retain_Q_A_Prob": retain}

    known = {"finetuned": scores(0.9, 0.8), "oracle": scores(0.3, 0.8)}
    assert " forgot: the probability of the answers to forget fell from" in verdict(
        known | {"u": scores(0.32, 0.8)}, "u"
    )
    assert "hardly forgot" in verdict(known | {"u": scores(0.85, 0.8)}, "u")
    assert "a part" in verdict(known | {"u": scores(0.6, 0.8)}, "u")
    assert "more than it had to" in verdict(known | {"u": scores(0.05, 0.4)}, "u")
    assert "kept 50%" in verdict(known | {"u": scores(0.05, 0.4)}, "u")
    level = {"finetuned": scores(0.2, 0.8), "oracle": scores(0.2, 0.8), "u": scores(0.199, 0.8)}
    assert "next to nothing to forget" in verdict(level, "u")
    assert "not enough" in verdict(known | {"u": {}}, "u")


def test_a_wrong_override_builds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.quickstart(["--directory", str(tmp_path / "q"), "trainer.args.learning_rat=1"]) == 2
    assert "learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_a_stage_that_ran_anew_makes_the_later_ones_run_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An evaluation's own configuration does not name what the fine-tuning was."""
    ran: list[str] = []

    def pretend(config: RunConfig) -> None:
        place = Path(config.paths.output_dir)
        ran.append(place.name)
        write_json(place / "run.json", {"status": "finished", "config": plain(config)})

    monkeypatch.setattr(study_module, "run", pretend)

    def stages(rate: float) -> list[str]:
        ran.clear()
        configs = study._configs(study.REAL, tmp_path, "base", [f"trainer.args.learning_rate={rate}"])
        made = study_module.Study(
            title="", command="", directory=tmp_path, keep=True, base=configs["base"], finetune=configs["finetune"],
            oracle=configs["oracle"], unlearn={"NPO": configs["NPO"]},
        )  # fmt: skip
        study_module.run_stages(made)
        return list(ran)

    everything = ["finetune", "oracle", "eval_base", "eval_finetuned", "unlearn_NPO"]
    assert stages(1e-3) == everything
    assert stages(1e-3) == []
    assert stages(2e-3) == everything
