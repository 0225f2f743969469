"""The guide to robust rules: its commands run, its sweeps compose, and its tables are the code's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from unfed.aggregation.robust_registry import ROBUST_RULES
from unfed.cli import fed_train, sweep
from unfed.config import schema
from unfed.config.sweep_runs import checked
from unfed.data.fictional import split_rows
from unfed.federated.hostile import ATTACKS

PAGES = ("docs/robust.md", "docs/robust.zh-CN.md")
BASE = "model.model_args.pretrained_model_name_or_path"
PROGRAMS = {"train": fed_train.finetune, "unlearn": fed_train.unlearn}


@pytest.fixture
def page(repo_root: Path) -> str:
    return (repo_root / PAGES[0]).read_text(encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    lines = "".join(re.findall(r"^```bash\n(.*?)^```", page, flags=re.M | re.S)).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines]


def test_its_commands_run(page, small_base, tmp_path, monkeypatch):
    """On a tiny model, with 16 rows (three of them the server's), one step a client."""
    rows = {"full": [*split_rows("retain90")[:12], *split_rows("forget10")[:4]]}
    rows |= {"retain90": rows["full"][:12], "forget10": rows["full"][12:]}
    (tmp_path / "tofu").mkdir()
    for name, found in rows.items():
        (tmp_path / "tofu" / f"{name}.json").write_text("".join(json.dumps(r) + "\n" for r in found), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNFED_DATA_DIR", str(tmp_path))
    short = ["eval.enabled=false", "trainer.args.max_steps=1", "trainer.args.report_to=none"]
    short += ["trainer.method_args.global_rounds=1", "forget_split=forget10"]
    for program, *argv in (c for c in commands(page) if c[0] in PROGRAMS):
        given = [w.replace("robust.root=100", "robust.root=3") for w in argv]
        given += [] if any(w.startswith(BASE) for w in given) else [f"{BASE}={small_base}"]
        given += ["retain_split=retain90"] if program == "unlearn" else []
        assert PROGRAMS[program]([*given, *short]) == 0, argv
    last = json.loads(Path("saves/unlearn/trusted_unlearn/run.json").read_text(encoding="utf-8"))
    assert last["rounds"][-1]["notes"]["fltrust"]
    assert len(json.loads(Path("saves/finetune/TRUST/server_rows.json").read_text(encoding="utf-8"))["rows"]) == 3


def test_its_sweeps_are_checked_without_a_mistake(page, small_base, tmp_path, monkeypatch):
    """The first and the last combination of each; the number of runs is that of the study."""

    def ends_only(composer, combinations):
        every = list(combinations)
        first, last = checked(composer, [every[0], every[-1]])
        return [*[first] * (len(every) - 1), last]

    started: dict[str, int] = {}
    monkeypatch.setattr("unfed.config.sweep_runs.checked", ends_only)
    monkeypatch.setattr(sweep, "_carry_out", lambda _, runs, *rest: started.setdefault(name, len(runs)) and 0)
    monkeypatch.chdir(tmp_path)
    for _, *argv in (c for c in commands(page) if c[0] == "sweep"):
        name = argv[1]
        assert sweep.sweep([*argv, f"{BASE}={small_base}"]) == 0
    rules, attacks = len(ROBUST_RULES) + 1, len(ATTACKS)
    assert started["hostile_5"] + started["hostile_5_trust"] == rules * attacks * 3
    assert sum(n for name, n in started.items() if name.startswith("hostile_10")) == rules * attacks * 3
    assert started["hostile_5_labels"] == (rules - 1) * 3


@pytest.mark.parametrize("name", PAGES)
def test_its_tables_name_every_rule_and_every_attack(name, repo_root):
    text = (repo_root / name).read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[`(\w+)`\]", text, flags=re.M)) == set(ROBUST_RULES) <= set(schema.ROBUST)
    assert {*ATTACKS, "label_flip"} <= set(re.findall(r"^\| `(\w+)` \|", text, flags=re.M))
