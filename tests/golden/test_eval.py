"""The TOFU evaluation against OpenUnlearning's own numbers (commit d3d7cf9), example by example."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unfed.base.types import Example
from unfed.data.benchmarks import tofu_splits
from unfed.data.chat import Template
from unfed.data.datasets import DatasetSpec, load_rows
from unfed.evaluation.logs import RUN_KEY, load_model_logs
from unfed.evaluation.runner import EvalResult, evaluate
from unfed.evaluation.suites import SuiteConfig
from unfed.evaluation.tofu import TOFU
from unfed.models.generate import Budget

MODELS = ("tiny", "tiny_retain")
EVERY = tuple(m for m in TOFU.metrics if m != "forget_Q_A_gibberish")  # that one asks a model of the hub
WHOLE = ("real_authors", "world_facts")
TEMPLATE = Template(system_prompt="You are a helpful assistant.")
EXACT = 1e-7
STATISTIC = 1e-9
AGGREGATE = {"extraction_strength": EXACT, "forget_quality": STATISTIC, "privleak": STATISTIC,
             "mia_loss": STATISTIC, "mia_min_k": STATISTIC}  # fmt: skip
OURS_ONLY = {
    "exact_memorization", "mia_zlib", "mia_min_k_plus_plus", "mia_reference", "mia_gradnorm", "mem", "priv",
    "forget_Q_A_PARA_ROUGE", "forget_Q_A_PERT_ROUGE", "retain_Q_A_PARA_ROUGE", "retain_Q_A_PERT_ROUGE",
    "retain_extraction_strength", "forget_fluency", "utility", "agg",
}  # fmt: skip
"""Metrics without a golden value; the unit tests have worked examples of them."""
WITH_OTHERS = {"priv", "mia_reference", "forget_fluency", "utility", "agg"}
OF_FORGET = OURS_ONLY - WITH_OTHERS - {m for m in OURS_ONLY if m.startswith("retain")}
"""Those of the forget rows that need neither another model nor a log with all attacks."""
FORGET_SCORES = ("forget_Q_A_Prob", "forget_quality", "extraction_strength", "privleak", "mia_loss")


def golden(shared_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((shared_dir / "golden" / "eval" / f"{name}.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def rows(shared_dir: Path) -> dict[str, Sequence[Example]]:
    return {
        split: load_rows(DatasetSpec("locuslab/TOFU", name, limit=None if split in WHOLE else 40), shared_dir / "data")
        for split, name in ((s, e.data.name) for s, e in tofu_splits("locuslab/TOFU").items())
    }


def run(
    shared_dir: Path, name: str, rows: Mapping[str, Sequence[Example]], budget: Budget, metrics: Sequence[str]
) -> EvalResult:
    path = shared_dir / "golden" / "models" / name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    logs = load_model_logs(shared_dir / "golden" / "eval" / "tiny_retain.json") if name == "tiny" else None
    suite = SuiteConfig(metrics=tuple(metrics), budget=budget)
    return evaluate(model, AutoTokenizer.from_pretrained(path), TEMPLATE, suite, rows, logs)


@pytest.fixture(scope="module")
def results(shared_dir: Path, rows: dict[str, Sequence[Example]]) -> dict[str, dict[str, Any]]:
    """The whole suite, once for each model, at batch size 32."""
    budget = Budget(max_tokens=1 << 20, batch_size=32)
    return {n: run(shared_dir, n, rows, budget, EVERY).to_eval_json() for n in MODELS}


def tolerance(metric: str, key: str) -> dict[str, Any]:
    if key == "avg_loss" or metric == "mia_loss":
        return {"rel": 0, "abs": 1e-4}
    if key == "prob":
        return {"rel": 0, "abs": 2e-5}
    if metric.lower().endswith("truth_ratio"):
        return {"rel": 5e-5, "abs": 0}
    return {"rel": 0, "abs": 1e-5 if metric == "mia_min_k" else EXACT}


def compare_rows(metric: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> int:
    """Compare every number and text of ``value_by_index``; returns how many numbers were compared."""
    assert list(mine) == list(theirs)
    compared = 0
    for index, row in theirs.items():
        for key, value in row.items():
            if key in ("min_margin", "n_new_tokens", "new_token_ids"):
                continue
            assert key in mine[index], (metric, index, key)
            if isinstance(value, str):
                assert mine[index][key] == value, (metric, index, key)
                continue
            assert mine[index][key] == pytest.approx(value, **tolerance(metric, key)), (metric, index, key)
            compared += len(value) if isinstance(value, list) else 1
    return compared


def compare(metric: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> int:
    compared = 0
    if theirs["agg_value"] is None:
        assert mine["agg_value"] is None
        assert mine["why"]
    else:
        assert mine["agg_value"] == pytest.approx(theirs["agg_value"], rel=0, abs=AGGREGATE.get(metric, 1e-5)), metric
        compared = 1
    for side in ("forget", "holdout"):
        if side in theirs:
            compared += compare_rows(metric, mine[side]["value_by_index"], theirs[side]["value_by_index"])
            slack = 1e-4 if metric == "mia_loss" else 1e-5
            assert mine[side]["agg_value"] == pytest.approx(theirs[side]["agg_value"], rel=0, abs=slack)
    if "value_by_index" in theirs:
        compared += compare_rows(metric, mine["value_by_index"], theirs["value_by_index"])
    return compared


@pytest.mark.parametrize("name", MODELS)
def test_every_metric_of_every_example(name: str, shared_dir: Path, results: dict[str, dict[str, Any]]) -> None:
    theirs = golden(shared_dir, name)
    mine = results[name]
    assert set(mine) == set(theirs) | OURS_ONLY | {RUN_KEY}
    assert sum(compare(metric, mine[metric], theirs[metric]) for metric in theirs) > 4000


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_does_not_matter(
    batch_size: int, shared_dir: Path, rows: dict[str, Sequence[Example]], results: dict[str, dict[str, Any]]
) -> None:
    theirs, whole = golden(shared_dir, "tiny"), results["tiny"]
    few = {split: rows[split] for split in ("forget", "holdout")}
    mine = run(shared_dir, "tiny", few, Budget(1 << 20, batch_size), (*FORGET_SCORES, *OF_FORGET)).to_eval_json()
    assert {*FORGET_SCORES, "forget_truth_ratio", "mia_min_k", *OF_FORGET} <= set(mine)
    for metric in set(mine) & set(theirs):
        compare(metric, mine[metric], theirs[metric])
    for metric in OF_FORGET:
        assert mine[metric]["agg_value"] == pytest.approx(whole[metric]["agg_value"], rel=0, abs=STATISTIC)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_does_not_matter_for_anything(
    batch_size: int, name: str, shared_dir: Path, rows: dict[str, Sequence[Example]]
) -> None:
    theirs = golden(shared_dir, name)
    mine = run(shared_dir, name, rows, Budget(1 << 20, batch_size), EVERY).to_eval_json()
    for metric in theirs:
        compare(metric, mine[metric], theirs[metric])


def test_our_own_log_serves_as_the_retain_log(results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """The file that an oracle's evaluation writes gives the same numbers as the reference's file."""
    file = tmp_path / "TOFU_EVAL.json"
    file.write_text(json.dumps(results["tiny_retain"]))
    logs = load_model_logs(file)
    assert len(logs.truth_ratios()) == 40
    assert logs.value("mia_min_k") == pytest.approx(results["tiny_retain"]["mia_min_k"]["agg_value"])
