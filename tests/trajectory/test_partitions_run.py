"""Partitions through whole runs: by topic, from a file, and what a run says of who owns what."""

import json
import re
from dataclasses import replace

import pytest

from unfed.app.report import make_report, write_report
from unfed.app.runs import run
from unfed.base.artifacts import read_json
from unfed.base.errors import UnfedError
from unfed.cli.main import main
from unfed.config.schema import PartitionConfig
from unfed.data.ownership import Ownership
from unfed.data.partition import Partition
from unfed.report.page import owner_panels
from unfed.report.roles import Given


@pytest.fixture(scope="module")
def by_topic(small_run, tmp_path_factory):
    """A fine-tuning whose rows were dealt by topic, over four clients."""
    config = small_run("finetune", tmp_path_factory.mktemp("dealt") / "topic", method_args={"num_clients": 4})
    return run(replace(config, partition=PartitionConfig("topic", topics=6))).directory


def test_the_figure_is_recorded_and_unlearning_keeps_the_topics(by_topic, small_run, tmp_path):
    record, owned = read_json(by_topic / "run.json"), Ownership.read(by_topic / "ownership.json")
    found = owned.heterogeneity
    assert record["heterogeneity"] == {
        "by": "topic", "clients": 4, "groups": len(owned.groups), "distance": found.distance,
        "size_variation": found.size_variation,
    }  # fmt: skip
    assert sum(owned.sizes.values()) == 18
    args = {"pretrained_model_name_or_path": str(by_topic)}
    every = {"target_client_idx": "all"}  # with a method that needs no retain rows: some owners have none
    unlearned = run(
        small_run("unlearn", tmp_path / "un", model_args=args, method_args=every, method=("GradAscent", {}))
    )
    before, after = (Partition.read(d / "partition.json") for d in (by_topic, unlearned.directory))
    assert after == before and before.topics
    later = Ownership.read(unlearned.directory / "ownership.json")
    assert (later.groups, later.counts) == (owned.groups, owned.counts)
    assert sum(later.forget.values()) == 6
    report = make_report([Given(by_topic), Given(unlearned.directory)], "unfed report")
    assert [p.alt for p in owner_panels(report)] == ["Rows by client and topic: finetuned, un"], (
        "one partition, one picture"
    )
    write_report(tmp_path / "page", report)
    assert "<h2>Who owns what</h2>" in (tmp_path / "page" / "report.html").read_text(encoding="utf-8")


def test_a_plain_file_deals_the_rows_of_a_run(small_run, tmp_path):
    """Clients keep their names, in the order of the file; row numbers are those of the training data."""
    file = tmp_path / "hospitals.json"
    file.write_text(json.dumps({"north": [*range(12, 18), 0], "south": list(range(1, 12))}), encoding="utf-8")
    config = small_run("finetune", tmp_path / "ft", method_args={"num_clients": None, "global_rounds": 1})
    dealt = run(replace(config, partition=PartitionConfig("file", manifest=str(file)))).directory
    made = Partition.read(dealt / "partition.json")
    assert {c: len(ids) for c, ids in made.clients.items()} == {"north": 7, "south": 11}
    start = {"pretrained_model_name_or_path": str(dealt)}
    result = run(small_run("unlearn", tmp_path / "un", model_args=start, method_args={"global_rounds": 1}))
    assert [r.clients for r in result.records] == [("north",), ("north", "south")], "north owns the rows to forget"
    again = small_run("unlearn", tmp_path / "un2", model_args=start)
    with pytest.raises(UnfedError, match=r"hospitals.json: north: row numbers are those of a fine-tuning's data"):
        run(replace(again, partition=PartitionConfig("file", manifest=str(file))))
    three = replace(config.trainer, method_args=replace(config.trainer.method_args, num_clients=3))
    with pytest.raises(UnfedError, match=r"num_clients=3, but .*hospitals.json deals the rows to 2 clients"):
        run(replace(config, trainer=three, partition=PartitionConfig("file", manifest=str(file))))


def test_the_command_shows_a_run_and_what_overrides_would_deal(by_topic, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["partition", str(by_topic), "--output", "run.png"]) == 0
    shown, owned = capsys.readouterr().out, Ownership.read(by_topic / "ownership.json")
    for client, n in owned.sizes.items():
        assert re.search(rf"{client} +│ +{n} │", shown), "a line for each client"
    assert owned.heterogeneity.line() in shown
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    argv = ["experiment=finetune/quickstart", "model=tiny-lora", "partition=dirichlet", "partition.over=topic"]
    assert main(["partition", *argv, "partition.topics=7", "trainer.method_args.num_clients=5"]) == 0
    shown = capsys.readouterr().out
    assert "partition: made here: dirichlet, 5 clients" in shown and "over 7 topics" in shown
    sizes = [int(n) for n in re.findall(r"client_\d +│ +(\d+) │", shown)]
    forget = [int(n) for n in re.findall(r"client_\d +│ +\d+ │ +(\d+) │", shown)]
    assert (len(sizes), sum(sizes), sum(forget)) == (5, 168, 42)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["ownership.png", "run.png"], "and nothing was run"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["RUN/nothing"], "not a run: it has no run.json"),
        (["RUN/topik"], "did you mean 'topic'"),
        (["RUN/topic", "seed=1"], "give one RUN alone, or overrides"),
        (["RUN/topic", "--output", "x.pdf"], "--output x.pdf: a picture is written as PNG"),
        (["partition=topik"], "partition=topik: no such partition; did you mean 'topic'"),
        (["experiment=finetune/quickstart", "model=tiny-lora", "partition=topic", "partition.topics=169"],
         "partition.topics=169 with 168 rows to deal: use 1 to 168"),
        (["--config-name=eval.yaml", "experiment=eval/tofu/default", "task_name=t"], "an evaluation deals no rows"),
    ],
)  # fmt: skip
def test_what_the_command_cannot_show_is_refused(by_topic, argv, said, capsys):
    assert main(["partition", *(a.replace("RUN", str(by_topic.parent)) for a in argv)]) == 2
    assert said in capsys.readouterr().err


def test_a_run_of_one_client_has_no_table(by_topic, tmp_path, capsys):
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "run.json").write_bytes((by_topic / "run.json").read_bytes())
    assert main(["partition", str(tmp_path / "alone")]) == 2
    assert "it has no ownership.json" in capsys.readouterr().err
