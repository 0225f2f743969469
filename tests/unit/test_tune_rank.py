"""The ladder of ranks: targets are read, a step is taken only while they are missed, and the nearest one is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from unfed.app.rundir import open_run
from unfed.app.sweep import Ledger
from unfed.app.targets import Target, known_metrics, read_target
from unfed.app.tune_rank import LADDER, climb, nearest_step, overrides_of, step_values, steps_of
from unfed.base.artifacts import write_json
from unfed.base.errors import ConfigError, UnfedError
from unfed.cli import tune_rank
from unfed.config.sweep_runs import SweepRun

LORA = "model.model_args.lora_config"


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("model_utility>=0.55", Target("model_utility", True, 0.55)),
        ("forget_Q_A_Prob <= 3e-1", Target("forget_Q_A_Prob", False, 0.3)),
        ("model_utility>=0.95*finetuned", Target("model_utility", True, 0.95, "finetuned")),
        ("forget_Q_A_Prob<=oracle", Target("forget_Q_A_Prob", False, 1.0, "oracle")),
        ("privleak>=-10", Target("privleak", True, -10.0)),
    ],
)
def test_a_target_is_read(text, target):
    assert read_target(text) == target
    assert read_target(str(target)) == target


@pytest.mark.parametrize("text", ["model_utility", "a=1", "a>=", "a>=1*base", "a>=1.2.3", "a>=0.5 finetuned"])
def test_what_is_no_target_is_refused(text):
    with pytest.raises(ConfigError, match="--target"):
        read_target(text)


def test_what_a_target_misses_is_a_share_of_its_bound():
    at_least, at_most = Target("u", True, 0.8), Target("f", False, 0.5, "oracle")
    assert at_least.shortfall(0.6, 0.8) == pytest.approx(0.25)
    assert at_least.shortfall(0.8, 0.8) == 0
    assert at_most.bound({"oracle": {"f": 0.4}}) == pytest.approx(0.2)
    assert at_most.shortfall(0.3, 0.2) == pytest.approx(0.5)
    assert at_most.bound({"oracle": {}}) is None and math.isinf(at_most.shortfall(0.3, None))
    assert at_most.needs_oracle and Target("privleak", False, 1).needs_oracle and not at_least.needs_oracle


def test_metrics_that_are_not_measured_are_refused(small_run, tmp_path):
    from unfed.config.schema import EvalConfig

    config = small_run("unlearn", tmp_path / "u", eval=EvalConfig(metrics=("model_utility",)))
    known_metrics(config, ["model_utility", "bytes"], ("bytes",))
    with pytest.raises(ConfigError, match=r"model_utilty.*'model_utility'"):
        known_metrics(config, ["model_utilty"])
    with pytest.raises(ConfigError, match="no evaluation"):
        known_metrics(small_run("unlearn", tmp_path / "v"), ["model_utility"])


def test_the_ladder_goes_up_and_may_be_another():
    assert [rank for rank, _ in LADDER] == [4, 8, 16, 16, 32, 64]
    assert step_values(4, ("q_proj",)) == {
        f"{LORA}.r": "4", f"{LORA}.lora_alpha": "8", f"{LORA}.target_modules": "[q_proj]",
    }  # fmt: skip

    def ladder(*argv):
        return tune_rank._ladder(tune_rank._parser().parse_args(argv))

    assert ladder() == list(LADDER)
    assert ladder("--ranks", "2,4", "--modules", "q,v", "--modules", "all") == [
        (2, ("q_proj", "v_proj")), (4, ("q_proj", "v_proj")), (2, None), (4, None),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="'x' should be a whole number"):
        ladder("--ranks", "2,x")
    with pytest.raises(ConfigError, match="'q v' is no module"):
        ladder("--modules", "q v")


# --- climbing --------------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(small_run, small_base, tmp_path):
    """Three steps of ranks 1, 2 and 4 on q and v of the small model."""
    from dataclasses import replace

    from unfed.models.spec import LoraArgs

    made = []
    for rank in (1, 2, 4):
        lora = LoraArgs(r=rank, target_modules=("q_proj", "v_proj"))
        first = small_run("finetune", tmp_path / "finetune" / f"r-{rank}", model_args={"lora_config": lora})
        args = {"pretrained_model_name_or_path": first.paths.output_dir}
        second = small_run("unlearn", tmp_path / f"r-{rank}", model_args=args)
        second = replace(second, oracle=None)
        made.append(SweepRun(f"r-{rank}", step_values(rank, ("q_proj", "v_proj")), second, first))
    return steps_of(made)


def scoring(utility, broken=()):
    """A start function: the unlearned utility is ``utility`` of the directory's name, the fine-tuned one 0.8."""
    ran = []

    def start(config):
        place = Path(config.paths.output_dir)
        ran.append(str(place.relative_to(place.parents[1])))
        with open_run(config) as run:
            (place / "begun").touch()
            if place.name in broken and config.mode == "unlearn":
                raise UnfedError("diverged")
            run.note(rounds=[{"round": 1, "phase": "p", "seconds": 1.5, "bytes_up": 1, "bytes_down": 1}])
            value = 0.8 if config.mode == "finetune" else utility[place.name]
            write_json(place / "TOFU_SUMMARY.json", {"model_utility": value, "forget_Q_A_Prob": 0.1})

    return start, ran


def test_the_plan_of_a_step(steps):
    """Two layers, hidden 32: q and v are 32 x 32 each, so an adapter of rank r has r * 64 numbers for each of them."""
    assert [s.trainable_parameters for s in steps] == [2 * 2 * r * 64 for r in (1, 2, 4)]
    assert [s.bytes_per_round for s in steps] == [s.trainable_parameters * 4 * 2 * 3 for s in steps], "three clients"
    assert steps[1].rank == 2 and steps[1].modules == ("q_proj", "v_proj")


def test_the_first_step_that_meets_every_target_is_the_last(steps, tmp_path):
    start, ran = scoring({"r-1": 0.3, "r-2": 0.6, "r-4": 0.9})
    targets = (read_target("model_utility>=0.5*finetuned"), read_target("forget_Q_A_Prob<=0.3"))
    tried = climb(steps, targets, Ledger(tmp_path, "unfed tune-rank"), start)
    assert [t.met for t in tried] == [False, True], "half of 0.8 is 0.4"
    assert len(ran) == 4 and not any(name.endswith("r-4") for name in ran)
    assert tried[0].shortfall == pytest.approx(0.25)
    assert tried[1].seconds == 3
    stored = json.loads((tmp_path / "tune_rank.json").read_text(encoding="utf-8"))
    assert stored["met"] and stored["nearest"]["overrides"] == overrides_of(tried[1])
    assert stored["nearest"]["overrides"][0] == f"{LORA}.r=2"
    assert [s["met"] for s in stored["steps"]] == [False, True]
    again, ran = scoring({})
    assert [t.met for t in climb(steps, targets, Ledger(tmp_path, ""), again)] == [False, True]
    assert ran == [], "steps that are done are kept"


def test_when_none_meets_it_the_nearest_is_named_and_a_broken_step_is_passed(steps, tmp_path, capsys):
    start, _ = scoring({"r-2": 0.7, "r-4": 0.5}, broken=("r-1",))
    targets = (read_target("model_utility>=1"),)
    tried = climb(steps, targets, Ledger(tmp_path, ""), start)
    assert [t.row.status for t in tried] == ["failed", "finished", "finished"]
    assert nearest_step(tried) is tried[1]
    assert tune_rank._show(tried, targets, tmp_path) == 1
    said = capsys.readouterr().out
    assert "No step meets model_utility>=1. Rank 2 on q_proj,v_proj came nearest" in said
    assert "model_utility is 0.7, and should be at least 1" in said
    assert "failed: r-1: diverged" in said


def test_the_oracle_of_a_target_is_that_of_the_step(steps, tmp_path, monkeypatch):
    asked = []

    def logs(config, start):
        asked.append(config.task_name)
        write_json(tmp_path / "oracle" / "TOFU_SUMMARY.json", {"forget_Q_A_Prob": 0.05})
        return tmp_path / "oracle" / "TOFU_EVAL.json"

    monkeypatch.setattr("unfed.app.tune_rank.oracle_logs", logs)
    start, _ = scoring(dict.fromkeys(("r-1", "r-2", "r-4"), 0.5))
    tried = climb(steps[:1], (read_target("forget_Q_A_Prob<=oracle"),), Ledger(tmp_path, ""), start)
    assert asked == ["r-1"]
    assert tried[0].bounds == (0.05,) and tried[0].shortfall == pytest.approx(1.0)
