"""``unfed sweep`` and ``unfed tune-rank`` from the command line, with real runs of a very small model."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from unfed.cli import sweep, tune_rank

BASE = "model.model_args.pretrained_model_name_or_path"
SMALL = (
    "model=tiny-lora", "trainer.args.max_steps=1", "trainer.method_args.global_rounds=1", "eval.limit=2",
    "eval.metrics=[forget_Q_A_Prob,retain_Q_A_Prob]",
)  # fmt: skip


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows(name: str) -> list[dict[str, str]]:
    with Path("saves/sweep", name, "sweep.csv").open(encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_a_sweep_of_two_stages_ends_in_rows_a_table_and_a_page(small_base, capsys):
    first = " ".join(["experiment=finetune/quickstart", *SMALL, "eval.enabled=false", f"{BASE}={small_base}"])
    command = ["--name", "ours", "--finetune", first, "experiment=unlearn/quickstart", *SMALL, "method=NPO",
               "seed=0,1", "model.model_args.lora_config.r=2"]  # fmt: skip
    assert sweep.sweep(command) == 0
    said = capsys.readouterr().out
    assert "2 of 2 runs finished (0 were done before)" in said
    assert re.search(r" │ +2 │ ", said), "both seeds stand in one line"
    place = Path("saves/sweep/ours")
    assert sorted(p.name for p in (place / "finetune").iterdir()) == ["seed-0", "seed-1"]
    assert [r["run"] for r in rows("ours")] == ["seed-0", "seed-1"]
    assert all(
        float(r["forget_Q_A_Prob"]) > 0 and int(r["bytes"]) > 0 and r["status"] == "finished" for r in rows("ours")
    )
    record = json.loads((place / "seed-1" / "run.json").read_text(encoding="utf-8"))
    assert record["forget_loss_agrees"] is True, "it began with the adapter of its own seed"
    assert "seed-1" in (place / "report.html").read_text(encoding="utf-8")
    before = {f: f.stat().st_mtime_ns for f in place.glob("*/run.json")}
    assert sweep.sweep(command) == 0
    assert "2 of 2 runs finished (2 were done before)" in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in place.glob("*/run.json")} == before


def test_mistakes_are_told_before_anything_is_made(capsys):
    assert sweep.sweep(["method=NPOO,NPO", "seed=0,x", *SMALL]) == 2
    said = capsys.readouterr().err
    assert "method=NPOO" in said and "seed=x" in said
    assert sweep.sweep(["seed=0,1", "--maximize", "model_utility"]) == 2
    assert "give --optuna" in capsys.readouterr().err
    assert sweep.sweep(["seed=0,1", "--finetune-keys", "seed"]) == 2
    assert tune_rank.tune_rank([]) == 2
    assert "there is no target" in capsys.readouterr().err
    assert tune_rank.tune_rank(["--target", "model_utility>=0.5", "model.model_args.lora_config.r=8"]) == 2
    assert "--ranks" in capsys.readouterr().err
    assert tune_rank.tune_rank(["--target", "model_utilty>=0.5"]) == 2  # before the tiny model is trained
    assert "model_utilty: the runs do not measure this" in capsys.readouterr().err
    assert not Path("saves").exists()


def test_a_search_runs(small_base, capsys):
    pytest.importorskip("optuna")
    found = ["--optuna", "2", "--maximize", "retain_Q_A_Prob", "method=NPO,GradDiff", *SMALL,
             "trainer.args.learning_rate=tag(log,interval(1e-4,1e-2))", "experiment=unlearn/quickstart",
             f"{BASE}={small_base}", "--name", "found"]  # fmt: skip
    assert sweep.sweep(found) == 0
    assert "best: method=" in capsys.readouterr().out
    proposed = json.loads(Path("saves/sweep/found/search.json").read_text(encoding="utf-8"))["proposals"]
    assert [r["trainer.args.learning_rate"] for r in rows("found")] == [
        p["trainer.args.learning_rate"] for p in proposed
    ]


def test_a_ladder_on_the_quickstarts_people(small_base, capsys, monkeypatch):
    monkeypatch.setattr("unfed.app.tiny_base.tiny_base", lambda *_, **__: small_base)
    command = ["--ranks", "1,2", "--modules", "q,v", "--target", "retain_Q_A_Prob>=2*finetuned", *SMALL[1:]]
    assert tune_rank.tune_rank(command) == 1
    said = capsys.readouterr().out
    assert "No step meets retain_Q_A_Prob>=2*finetuned" in said and "lora_config.r=" in said
    stored = json.loads(Path("saves/tune_rank/default/tune_rank.json").read_text(encoding="utf-8"))
    assert [(s["rank"], s["modules"], s["met"]) for s in stored["steps"]] == [
        (1, ["q_proj", "v_proj"], False), (2, ["q_proj", "v_proj"], False),
    ]  # fmt: skip
    for step in stored["steps"]:
        shape = json.loads(Path(step["directory"], "adapter_config.json").read_text(encoding="utf-8"))
        assert shape["r"] == step["rank"] and shape["lora_alpha"] == 2 * step["rank"]
        assert step["bytes_per_round"] == step["finetune_bytes"], "one round: what was planned is what was sent"
    easy = [*command[:5], "forget_Q_A_Prob>=0", *SMALL[1:], "--name", "easy"]
    assert tune_rank.tune_rank(easy) == 0
    assert "Rank 1 on q_proj,v_proj meets" in capsys.readouterr().out
