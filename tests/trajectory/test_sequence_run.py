"""Requests one after the other on one model: the earlier stay left out, and a sequence goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from unfed.app import sequence as sequences
from unfed.app.runs import run
from unfed.base.artifacts import read_json
from unfed.base.errors import UnfedError
from unfed.config.schema import DatasetConfig, ForgetConfig, MethodConfig, PartitionConfig, RecipeConfig

PEOPLE = ("Ana Bok", "Bo Crane", "Cleo Dunn", "Dag Ek", "Eve Falk", "Fay Gro")
THINGS = ("a loaf of bread", "a green lamp", "two boats", "some old maps")
FULL = DatasetConfig("locuslab/TOFU", "full", max_length=96)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, small_run):
    """Six people of four rows, two a client, learnt until it shows; and what makes a request from it."""
    root = tmp_path_factory.mktemp("sequence")
    (root / "data" / "tofu").mkdir(parents=True)
    lines = [
        json.dumps({"question": f"What has {name}, {n}?", "answer": f"{THINGS[(n + p) % 4]}.", "author": name})
        for p, name in enumerate(PEOPLE)
        for n in range(4)
    ]
    (root / "data" / "tofu" / "full.json").write_text("\n".join(lines) + "\n")
    lora = {"lora_dropout": 0.0}

    def place(config):
        args = config.model.model_args
        args = replace(args, lora_config=replace(args.lora_config, **lora))
        paths = replace(config.paths, root_dir=str(root), data_dir=str(root / "data"))
        return replace(config, paths=paths, model=replace(config.model, model_args=args))

    tuned = place(small_run("finetune", root / "tuned", args={"learning_rate": 3e-2}, method_args={"global_rounds": 4}))
    data = replace(tuned.data, train=FULL, forget=None)
    run(replace(tuned, data=data, partition=PartitionConfig("author")))

    def request(output, recipe="local_then_recover", **asked):
        args = {"pretrained_model_name_or_path": str(root / "tuned")}
        config = small_run(
            "unlearn", output, model_args=args, recipe=RecipeConfig(recipe), method=MethodConfig("GradDiff"),
            method_args={"unlearn_epochs": 3, "global_rounds": 1},
        )  # fmt: skip
        return replace(place(config), forget=ForgetConfig(**asked))

    return root, request


def plan(directory: Path, request, **changes) -> sequences.Plan:
    steps = {
        "rows": request(directory / "01_rows", topics=("green lamp",), topic_threshold=0.5),
        "client": request(directory / "02_client", clients=(1,)),
    }
    return sequences.Plan("Two", "unfed sequence r.yaml", directory, {**steps, **changes})


def test_two_requests_then_a_third_and_only_what_changed_runs_again(learnt, tmp_path, monkeypatch):
    """The third request, for a person who is no longer whole, leaves out the lamp that went with the first."""
    root, request = learnt
    ran: list[str] = []
    monkeypatch.setattr(sequences, "run", lambda config: (ran.append(config.task_name), run(config))[1])
    place = tmp_path / "s"
    report = sequences.run_sequence(plan(place, request))
    assert ran == ["01_rows", "02_client"]
    start, first, second = report.looks
    assert [look.after for look in report.looks] == ["start", "rows", "client"]
    assert start.forget["rows"].prob > first.forget["rows"].prob
    assert first.forget["client"].prob > second.forget["client"].prob
    found = read_json(place / "sequence.json")
    assert found["status"] == "finished" and [r["rows"] for r in found["requests"]] == [6, 6]
    assert found["requests"][1]["clients"] == {"client_1": 6} and found["kept_rows"] == 12
    assert (place / "sequence.html").is_file() and (place / "sequence.png").is_file()
    forgotten = read_json(place / "02_client" / "run.json")["forgotten"]
    assert [r["name"] for r in forgotten] == ["01_rows", "02_client"]

    dealt = read_json(root / "tuned" / "partition.json")["clients"]["client_0"]
    rows = [e for e in sequences.foresee(plan(place, request)).kept if e["id"] in dealt]
    author = rows[0]["author"]
    longer = plan(place, request, person=request(place / "03_person", "retrain", authors=(author,)))
    ran.clear()
    report = sequences.run_sequence(longer)
    assert ran == ["03_person"]
    assert [r.rows for r in report.requests] == [6, 6, 3] and report.requests[2].how == "retrain"
    record = read_json(place / "03_person" / "run.json")
    assert [r["name"] for r in record["forgotten"]] == ["01_rows", "02_client", "03_person"]
    assert record["rounds"][0]["num_examples"] == 24 - 15
    gone = {i for r in record["forgotten"] for i in r["ids"]}
    assert len(gone) == 15 and not gone & set(read_json(place / "03_person" / "train_rows.json"))

    ran.clear()
    assert sequences.run_sequence(longer).looks == report.looks and ran == []
    changed = {**longer.steps, "client": request(place / "02_client", clients=(2,))}
    monkeypatch.setattr(sequences, "run", lambda config: (ran.append(config.task_name), _stop())[1])
    with pytest.raises(KeyboardInterrupt):
        sequences.run_sequence(replace(longer, steps=changed))
    assert ran == ["02_client"], "the first is kept; the changed one runs again"


def _stop():
    raise KeyboardInterrupt


def test_a_request_that_cannot_be_met_is_told_before_the_first_is_begun(learnt, tmp_path):
    _, request = learnt
    place = tmp_path / "s"
    wrong = plan(place, request, third=request(place / "03", authors=("Dag Eck",)))
    with pytest.raises(UnfedError, match=r"request third: .*did you mean 'Dag Ek'"):
        sequences.run_sequence(wrong)
    with pytest.raises(UnfedError, match="request third: forget: all of the 8 rows were forgotten before"):
        sequences.run_sequence(plan(place, request, third=request(place / "03", clients=(1,))))
    assert not place.exists()
