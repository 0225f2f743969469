"""``experiment=eval/robustness`` from the command line's words to ROBUSTNESS.json."""

import json

import pytest

from unfed.app.runs import run
from unfed.config.compat import resolve
from unfed.models.load import fingerprint, load_model
from unfed.models.spec import ModelArgs, TokenizerArgs

METRICS = {"forget_Q_A_Prob", "forget_Q_A_ROUGE", "extraction_strength"}


@pytest.fixture(scope="module")
def data_root(small_data, tmp_path_factory):
    """The forget rows under the name that an evaluation reads, without paraphrased questions."""
    root = tmp_path_factory.mktemp("robustness_data")
    (root / "tofu").mkdir()
    rows = (small_data / "tofu" / "forget01.json").read_text(encoding="utf-8")
    (root / "tofu" / "forget01_perturbed.json").write_text(rows, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def check(finetuned, data_root, tmp_path_factory):
    def start(*given):
        output = tmp_path_factory.mktemp("robustness") / "run"
        argv = [
            "experiment=eval/robustness", "model=tiny-lora", "task_name=t", f"paths.output_dir={output}",
            f"model.model_args.pretrained_model_name_or_path={finetuned}", f"paths.data_dir={data_root}",
            "forget_split=forget01", "eval.metrics=[forget_Q_A_Prob,forget_Q_A_ROUGE]",
            "eval.generation.max_new_tokens=8", *given,
        ]  # fmt: skip
        result = run(resolve(argv, "eval.yaml", files=True))
        return result, json.loads((output / "ROBUSTNESS.json").read_text(encoding="utf-8"))

    return start


def test_every_check_from_the_command_line(check, finetuned, small_base, capsys):
    result, record = check(
        f"eval.robustness.oracle_path={small_base}",
        f"eval.robustness.add_adapter={finetuned}",
        "eval.robustness.best_of.n=2",
        "eval.robustness.relearn.batch_size=2",
    )
    checks = record["checks"]
    assert list(checks) == [
        "paraphrase", "prefix", "best_of", "merge", "quantize_8bit", "quantize_4bit", "add_adapter", "relearn"
    ]  # fmt: skip
    # A file without the column: left out, and the file and the column are named.
    assert list(checks["paraphrase"]) == ["left_out"]
    for word in ("forget01_perturbed.json", "'paraphrased_question'"):
        assert word in checks["paraphrase"]["left_out"]
    done = {n: c for n, c in checks.items() if n != "paraphrase"}
    for name, found in done.items():
        assert set(found["after"]) == (METRICS if name != "best_of" else {"forget_Q_A_ROUGE"})
        assert set(found["score"]) == set(found["after"])
        assert found["did"].endswith((".", "count."))
        # What was measured before is the evaluation's own number, wherever that has the metric.
        for metric in set(found["before"]) & set(result.summary):
            assert found["before"][metric] == result.summary[metric]
    assert done["relearn"]["settings"] == {"learning_rate": 2e-4, "epochs": 1.0, "batch_size": 2, "seed": 0}
    assert done["relearn"]["oracle"]["before"]["forget_Q_A_Prob"] < done["relearn"]["before"]["forget_Q_A_Prob"]
    assert done["merge"]["after"]["forget_Q_A_Prob"] == pytest.approx(result.summary["forget_Q_A_Prob"], abs=1e-4)
    assert "simulated" in done["quantize_4bit"]["did"]
    loaded = load_model(ModelArgs(str(finetuned)), TokenizerArgs(), trainable=False)
    assert record["_run"]["digests"]["base"] == loaded.fingerprint
    assert loaded.fingerprint == fingerprint(
        load_model(ModelArgs(str(small_base)), TokenizerArgs(), trainable=False).model
    )
    assert record["_run"]["splits"]["forget"]["rows"] == 6
    assert (result.directory / "TOFU_EVAL.json").is_file()
    said = capsys.readouterr().err
    assert "paraphrase: left out" in said
    assert "best_of: leak rate" in said
    assert "quantize_4bit" in said


def test_checks_are_switched_off_one_by_one(check, capsys):
    _, record = check(
        "eval.robustness.paraphrase=false", "eval.robustness.prefix=[]", "eval.robustness.best_of=null",
        "eval.robustness.quantize=[]", "eval.robustness.merge=false", "eval.robustness.metrics=[extraction_strength]",
    )  # fmt: skip
    assert list(record["checks"]) == ["relearn"]
    assert set(record["checks"]["relearn"]["after"]) == {"extraction_strength"}
    assert "oracle_path" in record["checks"]["relearn"]["why"]
    assert record["checks"]["relearn"]["score"] == {}
    assert "relearn: no score" in capsys.readouterr().err


def test_without_the_checks_there_is_no_record(check):
    with pytest.raises(FileNotFoundError):
        check("eval.robustness=null")
