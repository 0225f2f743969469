"""Sweeps: what a command line expands to, what is checked beforehand, what is kept, and what becomes of failures."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unfed.app import runs as real
from unfed.app.rundir import open_run
from unfed.app.stages import carry_on, is_done
from unfed.app.sweep import Ledger, over_seeds, run_sweep
from unfed.base.artifacts import read_json, write_json
from unfed.base.errors import ConfigError, UnfedError
from unfed.config.schema import EvalConfig
from unfed.config.sweep import Span, corners, read_sweep, run_name
from unfed.config.sweep_runs import Composer, FineTuning, checked
from unfed.federated.checkpoint import Checkpoints

UNLEARN = "unlearn-lora.yaml"
LORA = "model.model_args.lora_config.r"
BASE = "model.model_args.pretrained_model_name_or_path"


def grid(*overrides: str) -> list[dict[str, str]]:
    return [dict(v) for v in read_sweep(overrides, UNLEARN).grid]


def test_a_grid_is_every_combination_in_hydras_grammar():
    found = grid("method=NPO,GradDiff", "task=x", "seed=range(0,3)", f"++{LORA}=choice(8,16)")
    assert len(found) == 2 * 3 * 2
    assert found[0] == {"method": "NPO", "seed": "0", LORA: "8"}
    assert found[1] == {"method": "NPO", "seed": "0", LORA: "16"}, "the last key changes fastest"
    assert {tuple(v.values()) for v in found} == {
        (m, s, r) for m in ("NPO", "GradDiff") for s in "012" for r in ("8", "16")
    }


def test_lists_are_values_and_the_same_value_twice_is_one_run():
    assert grid("a.b=[q,v],[q]", "seed=0,0") == [{"a.b": "[q,v]", "seed": "0"}, {"a.b": "[q]", "seed": "0"}]


def test_what_cannot_be_swept_is_said_all_at_once():
    wrong = ["a={", "lr=interval(1,2)", "task_name=a,b", "paths.output_dir=x", "seed=0,1", "seed=2,3", "m=glob(*)"]
    with pytest.raises(ConfigError) as e:
        read_sweep(wrong, UNLEARN)
    said = "\n".join(e.value.problems)
    for words in (
        "a={: cannot be read",
        "--optuna",
        "task_name: each run",
        "--name names",
        "seed: swept twice",
        "m=glob",
    ):
        assert words in said
    with pytest.raises(ConfigError, match="nothing is swept"):
        read_sweep(["seed=0"], UNLEARN)


def test_a_search_reads_intervals_and_checks_their_ends():
    space = read_sweep(
        ["lr=tag(log,interval(1e-4,1e-2))", "r=int(interval(2,8))", "e=range(1,8,3)", "method=NPO,GradDiff,SimNPO"],
        UNLEARN, searched=True,
    ).space  # fmt: skip
    assert space["lr"] == Span(1e-4, 1e-2, log=True)
    assert space["r"] == Span(2, 8, integer=True)
    assert space["e"] == Span(1, 7, integer=True, step=3), "1, 4, 7"
    found = corners(space)
    assert [v["method"] for v in found] == ["NPO", "GradDiff", "SimNPO"]
    assert {v["r"] for v in found} == {"2", "8"} and {v["lr"] for v in found} == {"0.0001", "0.01"}
    with pytest.raises(ConfigError, match="lower to a higher"):
        read_sweep(["lr=tag(log,interval(0,1))"], UNLEARN, searched=True)


def test_a_name_says_the_values():
    assert run_name({"method": "NPO", LORA: "8", "seed": "0"}) == "method-NPO_r-8_seed-0"
    assert run_name({"a.r": "1", "b.r": "2"}) == "a.r-1_b.r-2"
    assert run_name({"a.m": "[q_proj,v_proj]"}) == "m-q_proj+v_proj"


VALUES = st.text(st.sampled_from("ab1.-+,[]/ '_"), min_size=1, max_size=8)


@given(st.lists(VALUES, min_size=2, max_size=6, unique=True))
def test_other_values_have_other_names_that_a_directory_may_have(values):
    names = {run_name({"k": v}) for v in values}
    assert len(names) == len(values)
    assert all("/" not in n and " " not in n and n not in {".", ".."} for n in names)


# --- checking --------------------------------------------------------------------------------------------------------


@pytest.fixture
def composer(tmp_path, small_base, small_data, monkeypatch):
    """Makes a composer of unlearning runs on the small model, with a fine-tuning if there are keys for it."""
    monkeypatch.setenv("UNFED_DATA_DIR", str(small_data))
    shared = ["model=tiny-lora", "trainer.args.report_to=none", "eval.enabled=false", "trainer.args.max_steps=1"]

    def make(*overrides, keys=None, fixed=()):
        argv = [*shared, "forget_split=forget01", "retain_split=retain99", *fixed, *overrides]
        argv += [] if keys is not None else [f"{BASE}={small_base}"]
        first = (
            FineTuning((*shared, f"{BASE}={small_base}", "forget_split=forget01"), keys) if keys is not None else None
        )
        return Composer(tmp_path / "sweep", read_sweep(argv, UNLEARN), UNLEARN, first)

    return make


def runs_of(composer):
    return checked(composer, composer.sweep.grid)


def test_all_mistakes_of_all_runs_are_found_before_the_first_starts(composer):
    with pytest.raises(ConfigError) as e:
        runs_of(composer("method=NPOO,NPO,GradDiff", "aggregator=FedAvgg,FedAvg", "method.gamma=-1"))
    said = e.value.problems
    assert any("method=NPOO" in p and "'NPO'" in p and "in 2 of 6 runs" in p for p in said)
    assert any("FedAvgg" in p and "in 3 of 6 runs" in p for p in said)
    assert len(said) == len(set(said))


def test_each_run_has_its_own_directory_and_values(composer, tmp_path):
    runs = runs_of(composer("method=NPO,GradDiff", "seed=0,1"))
    assert [r.name for r in runs] == [f"method-{m}_seed-{s}" for m in ("NPO", "GradDiff") for s in (0, 1)]
    for run in runs:
        assert Path(run.config.paths.output_dir) == tmp_path / "sweep" / run.name
        assert run.config.method and run.config.method.name == run.values["method"]
        assert run.config.seed == int(run.values["seed"])


def test_two_stages_share_a_fine_tuning_for_each_of_its_values(composer, tmp_path):
    runs = runs_of(composer("method=NPO,GradDiff", "seed=1", f"{LORA}=choice(2,4)", keys=(LORA,)))
    first = {r.finetune.paths.output_dir for r in runs}
    assert len(runs) == 4
    assert first == {str(tmp_path / "sweep" / "finetune" / f"r-{r}") for r in (2, 4)}
    for run in runs:
        assert run.config.model.model_args.pretrained_model_name_or_path == run.finetune.paths.output_dir
        assert run.finetune.mode == "finetune"
        assert run.finetune.model.model_args.lora_config.r == int(run.values[LORA])


def test_two_stages_refuse_what_contradicts_them(composer):
    with pytest.raises(ConfigError, match=r"--finetune-keys sed.*'seed'"):
        composer("seed=0,1", keys=("sed",))
    with pytest.raises(ConfigError, match="--finetune makes the adapter"):
        composer("seed=0,1", keys=(), fixed=[f"{BASE}=x"])
    with pytest.raises(ConfigError, match=r"--finetune: .*lora_config\.r") as e:
        runs_of(composer(f"{LORA}=x,4", keys=(LORA,)))
    assert "in 1 of 2 runs" in str(e.value)


# --- running ---------------------------------------------------------------------------------------------------------


class Pretend:
    """A start function that trains nothing; ``breaks`` says, by the run's name, what it raises instead."""

    def __init__(self, breaks=None):
        self.breaks, self.ran = dict(breaks or {}), []

    def __call__(self, config):
        place = Path(config.paths.output_dir)
        self.ran.append(place.name)
        with open_run(config) as made:
            (place / "begun").touch()
            if place.name in self.breaks:
                raise self.breaks[place.name]
            seconds = 2.0 * (1 + config.seed)
            made.note(rounds=[{"round": 1, "phase": "unlearn", "seconds": seconds, "bytes_up": 3, "bytes_down": 4}])
            if config.mode == "unlearn":
                scores = {"forget_Q_A_Prob": 0.1 * (1 + config.seed), "model_utility": 0.5, "forget_quality": 0.001}
                write_json(place / "TOFU_SUMMARY.json", scores)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "sweep", "unfed sweep method=...")


def rows_of(ledger):
    with (ledger.directory / "sweep.csv").open(encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_a_row_for_each_run_with_numbers_and_reasons(composer, ledger):
    runs = runs_of(composer("method=NPO,GradDiff", "seed=0,1"))
    start = Pretend({"method-NPO_seed-1": UnfedError("too little memory"), "method-GradDiff_seed-0": ValueError("bug")})
    run_sweep(runs, ledger, start)
    assert start.ran == [r.name for r in runs], "the sweep goes on after a failure"
    first, second, third, fourth = rows_of(ledger)
    assert (first["status"], first["exit_code"], first["reason"], first["bytes"], first["rounds"]) == (
        "finished", "0", "", "7", "1",
    )  # fmt: skip
    assert float(first["seconds"]) == 2 and float(fourth["seconds"]) == 4
    assert float(first["forget_quality_log10_p"]) == pytest.approx(-3)
    assert (second["status"], second["exit_code"], second["reason"]) == ("failed", "2", "too little memory")
    assert (third["exit_code"], third["reason"]) == ("1", "ValueError: bug")
    assert (fourth["method"], fourth["seed"]) == ("GradDiff", "1")
    nested = json.loads((ledger.directory / "sweep.json").read_text(encoding="utf-8"))
    assert [r["values"] for r in nested["runs"]] == [dict(r.values) for r in runs]


def test_called_again_only_what_is_not_done_runs(composer, ledger):
    runs = runs_of(composer("method=NPO,GradDiff", "seed=0,1"))
    killed = Pretend({"method-GradDiff_seed-0": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run_sweep(runs, ledger, killed)
    assert len(rows_of(ledger)) == 2, "what was done before the kill stands in the files"
    again = Pretend()
    rows = run_sweep(runs, ledger, again)
    assert again.ran == ["method-GradDiff_seed-0", "method-GradDiff_seed-1"]
    assert [r.kept for r in rows] == [True, True, False, False]
    third = Pretend()
    run_sweep(runs, ledger, third)
    assert third.ran == []
    assert len(rows_of(ledger)) == 4


def test_other_settings_are_another_run(composer, ledger):
    run_sweep(runs_of(composer("seed=0,1")), ledger, Pretend())
    start = Pretend()
    run_sweep(runs_of(composer("seed=0,1", "trainer.args.learning_rate=0.5")), ledger, start)
    assert start.ran == ["seed-0", "seed-1"]
    assert (ledger.directory / "seed-0.1").is_dir(), "set aside, not lost"


def test_a_fine_tuning_is_made_once_and_again_only_if_it_changed(composer, ledger):
    runs = runs_of(composer("method=NPO,GradDiff", f"{LORA}=2,4", keys=(LORA,)))
    start = Pretend()
    rows = run_sweep(runs, ledger, start)
    assert start.ran == ["r-2", "method-NPO_r-2", "r-4", "method-NPO_r-4", "method-GradDiff_r-2", "method-GradDiff_r-4"]
    assert {r.finetune_cost.seconds for r in rows} == {2.0}
    again = Pretend()
    run_sweep(runs, ledger, again)
    assert again.ran == []
    place = Path(runs[0].finetune.paths.output_dir)
    record = read_json(place / "run.json")
    write_json(place / "run.json", record | {"ended": "9999-01-01T00:00:00Z"})
    assert not is_done(runs[0].config), "it was made from an adapter that is no longer there"
    assert is_done(runs[1].config)


def test_a_broken_fine_tuning_stands_in_the_rows_of_its_runs(composer, ledger):
    runs = runs_of(composer("method=NPO,GradDiff", f"{LORA}=2,4", keys=(LORA,)))
    rows = run_sweep(runs, ledger, Pretend({"r-2": UnfedError("no")}))
    assert [(r.status, r.reason) for r in rows] == [("failed", "fine-tuning: no"), ("finished", "")] * 2


def test_what_a_run_settles_itself_is_no_difference(small_run, tmp_path):
    """oracle=auto ends in a path, and a recipe that trains again takes over the fine-tuning's settings."""
    config = small_run("unlearn", tmp_path / "u", oracle="auto", eval=EvalConfig())

    def settles(given):
        made = replace(given, oracle=None, eval=replace(given.eval, retain_logs_path="oracle/TOFU_EVAL.json"))
        with open_run(made):
            pass

    carry_on(config, settles)
    assert is_done(config)
    assert not is_done(replace(config, eval=replace(config.eval, limit=3)))
    assert not is_done(replace(config, oracle=None))


def test_a_run_that_cannot_be_gone_on_with_is_started_anew(small_run, tmp_path):
    config = small_run("finetune", tmp_path / "f")
    (tmp_path / "f" / "checkpoints" / "round_00001").mkdir(parents=True)
    write_json(tmp_path / "f" / "run.json", {"status": "failed"})
    taken = []
    carry_on(config, taken.append)
    assert (taken[0].resume, taken[0].overwrite) == (True, False), "a torn checkpoint is for the run to say"
    write_json(tmp_path / "f" / "run.json", {"status": "finished"})
    carry_on(config, taken.append)
    assert (taken[1].resume, taken[1].overwrite) == (False, True)


def test_a_run_that_was_killed_goes_on_from_its_last_round(small_run, tmp_path, monkeypatch):
    config = small_run("finetune", tmp_path / "killed", args={"max_steps": 1})
    save = Checkpoints.save

    def killed(self, state, records):
        save(self, state, records)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(Checkpoints, "save", killed)
        carry_on(config, real.run)
    began = read_json(tmp_path / "killed" / "run.json")["started"]
    assert not is_done(config)
    carry_on(config, real.run)
    record = read_json(tmp_path / "killed" / "run.json")
    assert record["started"] == began and "resumed" in record and len(record["rounds"]) == 2
    assert is_done(config) and not (tmp_path / "killed.1").exists()


def test_the_table_has_a_line_for_what_differs_in_its_seed_alone(composer, ledger):
    rows = run_sweep(runs_of(composer("method=NPO,GradDiff", "seed=0,1,2")), ledger, Pretend())
    head, body, notes = over_seeds(rows, ledger)
    assert [line[:2] for line in body] == [["method=NPO", "3"], ["method=GradDiff", "3"]]
    shown = dict(zip(head, body[0], strict=True))
    assert shown["forget probability"] == "0.200\n[0.100, 0.300]", "median of 0.1, 0.2, 0.3"
    assert shown["seconds"] == "4.0\n[2.0, 6.0]"
    assert shown["forget quality (log10 p)"].startswith("-3.00")
    assert notes == []
    with (ledger.directory / "compare.csv").open(encoding="utf-8") as f:
        assert {r["n"] for r in csv.DictReader(f)} == {"3"}
