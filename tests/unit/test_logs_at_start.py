"""Logs of other models are looked at before a model is opened, and every mistake is said once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unfed.app.evaluate import say_remarks
from unfed.base.errors import ArtifactError, ConfigError
from unfed.config.compat import resolve
from unfed.data.datasets import data_digest, load_rows
from unfed.data.spec import DatasetSpec
from unfed.evaluation.logs import load_model_logs
from unfed.evaluation.runner import EvalResult
from unfed.metrics.stats import Score

ARGV = ["eval=tofu", "dataset=fictional", "forget_split=forget25", "task_name=t", "model=tiny-lora",
        "model.model_args.pretrained_model_name_or_path=nobody/nothing"]  # fmt: skip


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as e:
        resolve([*ARGV, *overrides], "eval.yaml", files=True)
    return list(e.value.problems)


def log(directory: Path, *, limit: int | None = None, seen: int = 0) -> Path:
    """A log that says of which rows it is, with the metrics that are compared."""
    names = {"forget": "forget25_perturbed", "retain": "retain_perturbed", "holdout": "holdout25"}
    rows = {s: load_rows(DatasetSpec("fictional", n, limit=limit)) for s, n in names.items()}
    ratios = {str(k): {"score": 0.5} for k in range(len(rows["forget"]))}
    splits = {s: {"name": names[s], "rows": len(r), "digest": data_digest(r)} for s, r in rows.items()}
    entries = {
        "forget_truth_ratio": {"agg_value": 0.5, "value_by_index": ratios},
        **{name: {"agg_value": 0.5} for name in ("mia_min_k", "model_utility", "forget_fluency")},
        "_run": {"agg_value": None, "splits": splits, "forget_rows_seen": seen},
    }
    directory.mkdir(exist_ok=True)
    file = directory / "TOFU_EVAL.json"
    file.write_text(json.dumps(entries))
    return file


def test_an_unknown_metric_is_said_once():
    (one, other) = problems("eval.metrics=[forget_qualty,Mem]")
    assert "'forget_qualty'; did you mean 'forget_quality'?" in one and "'Mem'; did you mean 'mem'?" in other


def test_a_log_of_these_rows_is_taken(tmp_path: Path):
    file = log(tmp_path)
    argv = [*ARGV, f"retain_logs_path={file}", f"eval.finetuned_logs_path={file}", "eval.metrics=[privleak,utility]"]
    assert resolve(argv, "eval.yaml", files=True).eval is not None


def test_a_directory_is_answered_with_the_file_in_it(tmp_path: Path):
    log(tmp_path)
    assert problems(f"retain_logs_path={tmp_path}") == [
        f"retain_logs_path={tmp_path}: is a directory; name the file in it: TOFU_EVAL.json"
    ]
    with pytest.raises(ArtifactError, match=r"finetuned_logs_path=.*: is a directory; name the file$"):
        load_model_logs(tmp_path.parent, "eval.finetuned_logs_path")


@pytest.mark.parametrize("metric", ["forget_quality", "privleak", "priv"])
def test_a_retain_log_of_other_rows_or_of_a_model_that_saw_them_is_refused_at_once(tmp_path: Path, metric: str):
    (cut,) = problems(f"retain_logs_path={log(tmp_path, limit=5)}", f"eval.metrics=[{metric}]")
    assert "(retain_logs_path): the log is of another forget split (forget25_perturbed)" in cut
    (saw,) = problems(f"retain_logs_path={log(tmp_path, seen=42)}", f"eval.metrics=[{metric}]")
    assert "trained on 42 of the forget rows" in saw


def test_privleak_without_an_oracle_is_said(capsys: pytest.CaptureFixture[str]):
    alone = {"privleak": Score(9.75, why="the reference AUC is taken to be 0.5"), "priv": Score(None, why="no log")}
    say_remarks(EvalResult(alone, {}), ("privleak", "priv"))
    assert capsys.readouterr().err.splitlines() == [
        "no value for priv: no log",
        "privleak is no comparison with an oracle: the reference AUC is taken to be 0.5",
    ]
    say_remarks(EvalResult(alone | {"privleak": Score(9.75)}, {}), ("privleak",))
    assert capsys.readouterr().err == ""


def test_a_fine_tuned_models_log_of_other_rows_is_refused(tmp_path: Path):
    key = f"eval.finetuned_logs_path={log(tmp_path, limit=5)}"
    (problem,) = problems(key, "eval.metrics=[utility]")
    assert "(eval.finetuned_logs_path): the log is of another" in problem
    # Nothing is compared with it here.
    assert resolve([*ARGV, key, "eval.metrics=[mem]"], "eval.yaml", files=True).eval is not None
