"""The oracle of an unlearning run: what fine-tuning makes without the forget rows, once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from unfed.app import oracle as oracles
from unfed.app.runs import run
from unfed.base.artifacts import read_json, read_tensors
from unfed.base.errors import ArtifactError, ConfigError, UnfedError
from unfed.config.schema import DatasetConfig, EvalConfig
from unfed.config.schema_eval import GenerationConfig

METRICS = ("forget_quality", "forget_Q_A_Prob", "utility")


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_run, small_base):
    """A fine-tuned adapter, and data with what the evaluation looks at."""
    root = tmp_path_factory.mktemp("oracle")
    data = root / "data" / "tofu"
    data.mkdir(parents=True)

    def row(n: int) -> dict:
        words = ["red", "old", "wet", "big", "raw", "shy"]
        return {
            "question": f"Who is person {n}?", "answer": f"person {n} is {words[n % 6]} and {words[n // 6]}.",
            "paraphrased_answer": f"{words[n % 6]} and {words[n // 6]} is person {n}.",
            "perturbed_answer": [f"person {n} is {words[(n + k) % 6]} and {words[k]}." for k in (1, 2)],
        }  # fmt: skip

    rows = [row(n) for n in range(24)]
    sets = {
        "full": rows, "forget25": rows[:6], "retain75": rows[6:], "forget25_perturbed": rows[:6],
        "retain_perturbed": rows[6:12], "real_authors_perturbed": rows[12:16], "world_facts_perturbed": rows[16:20],
        "holdout25": [row(n) for n in range(24, 30)],
    }  # fmt: skip
    for name, own in sets.items():
        (data / f"{name}.json").write_text("".join(json.dumps(r) + "\n" for r in own))

    def config(mode: str, output: Path, **given):
        names = {"train": "full", "forget": "forget25"} if mode == "finetune" else {
            "forget": "forget25", "retain": "retain75"}  # fmt: skip
        made = small_run(mode, output, **given)
        specs = {k: DatasetConfig("locuslab/TOFU", v, max_length=96) for k, v in names.items()}
        return replace(
            made,
            data=replace(made.data, **specs),
            paths=replace(made.paths, root_dir=str(root), data_dir=str(root / "data")),
        )

    tuned = root / "tuned"
    run(config("finetune", tuned))
    suite = EvalConfig(
        forget_split="forget25", metrics=METRICS, generation=GenerationConfig(max_new_tokens=6), max_length=96
    )

    def unlearn(output: Path, **given):
        args = {"pretrained_model_name_or_path": str(tuned)} | given.pop("model_args", {})
        return replace(config("unlearn", output, model_args=args, **given), eval=suite, oracle="auto")

    return root, tuned, config, unlearn


def test_it_is_what_fine_tuning_makes_without_the_rows(world, tmp_path):
    """Bit for bit: the same partition, seeds and schedule, the forget rows taken out of the file by hand."""
    root, tuned, config, unlearn = world
    found = run(unlearn(root / "unlearned"))
    assert found.summary["forget_quality"] > 0
    record = read_json(root / "unlearned" / "run.json")["config"]
    log = Path(record["eval"]["retain_logs_path"])
    place = log.parents[1]
    assert place.parent == root / "saves" / "oracle" and record["oracle"] is None
    assert read_json(log)["_run"]["forget_rows_seen"] == 0
    assert read_json(Path(record["eval"]["finetuned_logs_path"]))["_run"]["forget_rows_seen"] == 6

    by_hand = config("finetune", tmp_path / "by_hand")
    by_hand = replace(
        by_hand,
        data=replace(by_hand.data, train=DatasetConfig("locuslab/TOFU", "retain75", max_length=96)),
        partition=replace(by_hand.partition, manifest=str(tuned / "partition.json")),
    )
    run(by_hand)
    one, other = (read_tensors(d / "adapter_model.safetensors") for d in (place, tmp_path / "by_hand"))
    assert one.digest() == other.digest()
    assert one.digest() != read_tensors(tuned / "adapter_model.safetensors").digest()


def test_it_is_trained_once(world, monkeypatch):
    root, _, _, unlearn = world
    first = oracles.oracle_logs(unlearn(root / "a"), run)

    def never(config):
        raise AssertionError(f"{config.mode} ran again")

    assert oracles.oracle_logs(unlearn(root / "b", method_args={"unlearn_epochs": 3}), never) == first
    other = unlearn(root / "c")
    other = replace(other, data=replace(other.data, forget=DatasetConfig("locuslab/TOFU", "forget25", limit=3)))
    with pytest.raises(AssertionError, match="finetune ran again"):
        oracles.oracle_logs(other, never)  # other rows to forget: another oracle
    suite = unlearn(root / "d")
    suite = replace(suite, eval=replace(suite.eval, metrics=("forget_quality", "extraction_strength")))
    with pytest.raises(AssertionError, match="eval ran again"):
        oracles.oracle_logs(suite, never)


def test_one_that_was_cut_short_goes_on(world, monkeypatch):
    root, _, _, unlearn = world
    given = unlearn(root / "e")
    given = replace(given, data=replace(given.data, forget=DatasetConfig("locuslab/TOFU", "forget25", limit=2)))
    asked = []

    def killed(config):
        asked.append(config.resume)
        (Path(config.paths.output_dir) / "checkpoints" / "round_00001").mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        oracles.oracle_logs(given, killed)
    shutil.rmtree(Path(oracles.oracle_config(given).paths.output_dir))
    with pytest.raises(KeyboardInterrupt):
        oracles.oracle_logs(given, killed)
    with pytest.raises((KeyboardInterrupt, FileExistsError)):
        oracles.oracle_logs(given, killed)
    assert asked == [False, False, True]


def test_what_cannot_have_one_is_told(world, small_base, tmp_path):
    _, tuned, _, unlearn = world
    with pytest.raises(UnfedError, match=r"has no run\.json that says how it was trained.*retain_logs_path"):
        run(unlearn(tmp_path / "x", model_args={"pretrained_model_name_or_path": str(small_base)}))
    strange = unlearn(tmp_path / "y")
    (Path(strange.paths.data_dir) / "tofu" / "other.json").write_text('{"question": "Q?", "answer": "A."}\n')
    strange = replace(strange, data=replace(strange.data, forget=DatasetConfig("locuslab/TOFU", "other")))
    with pytest.raises(UnfedError, match=r"none of the 1 rows of data\.forget .other. was among the rows"):
        oracles.oracle_config(strange)
    with pytest.raises(ConfigError, match="no evaluation that would compare"):
        run(replace(unlearn(tmp_path / "z"), eval=None))
    broken = tmp_path / "tuned"
    shutil.copytree(tuned, broken)
    (broken / "run.json").write_text('{"config": {"mode": "finetune"}}')
    with pytest.raises(ArtifactError, match="cannot be read as a run of this version"):
        oracles.oracle_config(unlearn(tmp_path / "v", model_args={"pretrained_model_name_or_path": str(broken)}))
    assert not (tmp_path / "x").exists() and not (tmp_path / "z").exists()


def test_a_log_of_a_model_that_saw_the_rows_is_no_oracle(world, tmp_path):
    _, tuned, _, unlearn = world
    given = unlearn(tmp_path / "u")
    logs = oracles._evaluated(given, tuned, tmp_path, None, run)
    given = replace(given, oracle=None, eval=replace(given.eval, retain_logs_path=str(logs)))
    with pytest.raises(ArtifactError, match=r"retain_logs_path.*trained on 6 of the forget rows"):
        run(given)
    found = read_json(logs)
    found["_run"]["forget_rows_seen"] = 0
    found["_run"]["digests"]["base"] = "sampled-sha256:" + "0" * 64
    logs.write_text(json.dumps(found))
    with pytest.raises(ArtifactError, match=r"retain_logs_path.*another base model"):
        run(replace(given, overwrite=True))


def test_nothing_is_taken_over_from_another_model_data_or_prompt(world, tmp_path):
    """An evaluation is read again only for the same adapter, rows and template."""
    root, tuned, _, unlearn = world
    given = unlearn(tmp_path / "u")
    first = oracles._evaluated(given, tuned, tmp_path, None, run)

    def never(config):
        raise AssertionError(f"{config.mode} ran again")

    assert oracles._evaluated(given, tuned, tmp_path, None, never) == first
    asked = replace(given.model, template_args=replace(given.model.template_args, system_prompt="Lie."))
    with pytest.raises(AssertionError, match="eval ran again"):
        oracles._evaluated(replace(given, model=asked), tuned, tmp_path, None, never)
    retrained = tmp_path / "again" / "tuned"  # the same name, another adapter
    shutil.copytree(tuned, retrained)
    record = read_json(retrained / "run.json")
    (retrained / "run.json").write_text(json.dumps(record | {"adapter": "sha256:other"}))
    with pytest.raises(AssertionError, match="eval ran again"):
        oracles._evaluated(given, retrained, tmp_path, None, never)
    data = tmp_path / "data"
    shutil.copytree(root / "data", data)
    file = data / "tofu" / "forget25_perturbed.json"
    file.write_text(file.read_text().replace('"perturbed_answer": ["person', '"perturbed_answer": ["somebody'))
    moved = replace(given, paths=replace(given.paths, data_dir=str(data)))
    with pytest.raises(AssertionError, match="eval ran again"):
        oracles._evaluated(moved, tuned, tmp_path, None, never)


def test_a_fine_tuning_that_cannot_be_repeated_is_refused(world, tmp_path):
    _, tuned, _, unlearn = world
    on_top = tmp_path / "on_top"
    shutil.copytree(tuned, on_top)  # as if it had gone on from ``tuned``, which knows the forget rows
    record = read_json(on_top / "run.json")
    record["config"]["model"]["model_args"]["pretrained_model_name_or_path"] = str(tuned)
    (on_top / "run.json").write_text(json.dumps(record))
    with pytest.raises(UnfedError, match="went on from a model that was trained on 6 of the forget rows"):
        oracles.oracle_config(unlearn(tmp_path / "a", model_args={"pretrained_model_name_or_path": str(on_top)}))
    changed = tmp_path / "changed"
    shutil.copytree(tuned, changed)
    rows = read_json(changed / "train_rows.json")
    (changed / "train_rows.json").write_text(json.dumps([*rows[1:], "another", "and another"]))
    with pytest.raises(UnfedError, match=r"data\.train \(full\) is no longer what .*: 1 rows are new and 2 are gone"):
        oracles.oracle_config(unlearn(tmp_path / "b", model_args={"pretrained_model_name_or_path": str(changed)}))


def test_a_mistake_of_the_run_itself_is_found_before_the_oracle_is_trained(world, tmp_path):
    root, _, _, unlearn = world
    there = sorted((root / "saves" / "oracle").iterdir()) if (root / "saves").exists() else []
    with pytest.raises(UnfedError, match="num_clients=5"):
        run(unlearn(tmp_path / "a", method_args={"num_clients": 5}))
    cut = tmp_path / "b"
    (cut / "checkpoints" / "round_00001").mkdir(parents=True)
    (cut / "run.json").write_text('{"status": "failed"}')
    given = unlearn(cut)
    given = replace(given, data=replace(given.data, forget=DatasetConfig("locuslab/TOFU", "forget25", limit=1)))
    with pytest.raises(UnfedError, match="holds a run that was cut short"):
        run(given)
    assert (sorted((root / "saves" / "oracle").iterdir()) if (root / "saves").exists() else []) == there
