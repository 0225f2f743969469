"""Logs of other models: what is wrong with them is said before a model is opened, and before a training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unfed.app.runs import run
from unfed.base.errors import ArtifactError, DataError
from unfed.config.preflight import preflight
from unfed.config.schema import EvalConfig
from unfed.data.datasets import data_digest, load_rows
from unfed.data.spec import DatasetSpec
from unfed.evaluation.logs import ModelLogs


@pytest.mark.parametrize("value", ["0.5", True, float("nan"), float("inf"), [0.5]])
def test_what_is_no_number_is_none(value: Any) -> None:
    logs = ModelLogs("log.json", {"mia_loss": {"agg_value": value}})
    with pytest.raises(ArtifactError, match=r"log\.json: mia_loss\.agg_value is not a finite number"):
        logs.value("mia_loss")


def test_an_auc_lies_between_0_and_1() -> None:
    assert ModelLogs("log.json", {"mia_loss": {"agg_value": 1}}).auc("mia_loss") == 1
    with pytest.raises(ArtifactError, match=r"mia_loss\.agg_value=1\.5 is no AUC"):
        ModelLogs("log.json", {"mia_loss": {"agg_value": 1.5}}).auc("mia_loss")


def test_a_log_is_looked_at_before_a_training(small_run: Any, tmp_path: Path) -> None:
    """Three broken retain logs, one of another holdout for ``priv``, and two broken logs of the fine-tuned model."""
    file = tmp_path / "LOG.json"
    suite = EvalConfig(path="fictional", forget_split="forget25", metrics=("forget_quality", "priv", "utility"))

    def found(content: str, key: str = "retain_logs_path") -> list[str]:
        file.write_text(content)
        return preflight(replace(small_run("finetune", tmp_path / "out"), eval=replace(suite, **{key: str(file)})))

    digests = {
        s: {"digest": data_digest(load_rows(DatasetSpec("fictional", name), None))}
        for s, name in (("forget", "forget25_perturbed"), ("holdout", "holdout25"))
    }
    count = len(load_rows(DatasetSpec("fictional", "forget25_perturbed"), None))
    ratios = {"value_by_index": {str(i): {"score": 0.5} for i in range(count)}, "agg_value": 0.5}
    good = {"forget_truth_ratio": ratios, "_run": {"splits": digests}}
    assert found(json.dumps(good)) == []
    assert found(json.dumps(good | {"forget_Q_A_ROUGE": [1]})) == []  # nothing to compare the answers with
    for content, said in (
        (json.dumps(good)[:60], "retain_logs_path="),
        (json.dumps(good | {"forget_truth_ratio": ratios | {"value_by_index": [1]}}), "row -> "),
        (json.dumps(good | {"_run": {"splits": digests | {"holdout": {"digest": "x"}}}}), "another holdout split"),
    ):
        (problem,) = found(content)
        assert str(file) in problem and said in problem
    numbers = {name: {"agg_value": 0.5} for name in ("model_utility", "forget_fluency")}
    key = "finetuned_logs_path"
    assert found(json.dumps(numbers), key) == []
    (problem,) = found(json.dumps(numbers | {"model_utility": {"agg_value": "high"}}), key)
    assert f"{file}: model_utility.agg_value is not a finite number (eval.finetuned_logs_path)" in problem
    (problem,) = found(json.dumps(numbers | {"_run": {"splits": {"retain": {"digest": "x"}}}}), key)
    assert "another retain split" in problem


def test_an_answer_without_a_token_is_found_before_a_training(small_run: Any, tmp_path: Path) -> None:
    suite = EvalConfig(path="fictional", forget_split="forget25", metrics=("forget_Q_A_Prob",), max_length=5)
    wrong = replace(small_run("finetune", tmp_path / "out"), eval=suite)
    with pytest.raises(DataError, match=r"forget25_perturbed.*column 'answer': max_length=5 leaves.*eval\.max_length"):
        run(wrong)
    assert not (tmp_path / "out").exists()
