"""What a request names is what is forgotten, and what was forgotten before stays left out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from unfed.app import oracle as oracles
from unfed.app import recipes, requests
from unfed.app.runs import run
from unfed.base.artifacts import read_json, read_tensors, write_json
from unfed.base.errors import ConfigError, UnfedError
from unfed.config.schema import DatasetConfig, EvalConfig, ForgetConfig, HistoryConfig, PartitionConfig, RecipeConfig

PEOPLE = ("Ana Bok", "Bo Crane", "Cleo Dunn", "Dag Ek", "Eve Falk", "Fay Gro")
FULL = DatasetConfig("locuslab/TOFU", "full", max_length=96)


def row(person: int, n: int) -> dict:
    thing = ("bread", "a green lamp", "boats", "old maps")[n]
    named = PEOPLE[person] if n < 3 else "this person"  # the last row does not say the name
    return {"question": f"What has {named} got, {n}{person}?", "answer": f"It is {thing}.", "author": PEOPLE[person]}


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_run):
    """Six people of four rows, two a client; fine-tuned with the history of its rounds."""
    root = tmp_path_factory.mktemp("requests")
    (root / "data" / "tofu").mkdir(parents=True)
    lines = [json.dumps(row(p, n)) for p in range(6) for n in range(4)]
    (root / "data" / "tofu" / "full.json").write_text("\n".join(lines) + "\n")

    def place(config):
        return replace(config, paths=replace(config.paths, root_dir=str(root), data_dir=str(root / "data")))

    tuned = place(small_run("finetune", root / "tuned"))
    tuned = replace(
        tuned, data=replace(tuned.data, train=FULL, forget=None), partition=PartitionConfig("author"),
        history=HistoryConfig(("rounds",)),
    )  # fmt: skip
    run(tuned)

    def unlearn(output, start=root / "tuned", recipe="local_then_recover", **asked):
        args = {"pretrained_model_name_or_path": str(start)}
        config = small_run("unlearn", output, model_args=args, recipe=RecipeConfig(recipe))
        return replace(place(config), forget=ForgetConfig(**asked))

    return root, tuned, unlearn


def owned(root: Path, *clients: int) -> list[str]:
    dealt = read_json(root / "tuned" / "partition.json")["clients"]
    return [i for c in clients for i in dealt[f"client_{c}"]]


def ids_of(root: Path, *people: int) -> list[str]:
    from unfed.data.datasets import load_rows

    names = {PEOPLE[p] for p in people}
    return [r["id"] for r in load_rows(FULL, root / "data") if r["author"] in names]


def home(root: Path, person: int) -> str:
    dealt = read_json(root / "tuned" / "partition.json")["clients"]
    return next(c for c, ids in dealt.items() if ids_of(root, person)[0] in ids)


def digest(place: Path) -> str:
    return read_tensors(place / "adapter_model.safetensors").digest()


def test_a_client_leaves_with_all_its_rows(world, tmp_path, capsys):
    root, _, unlearn = world
    run(unlearn(tmp_path / "u", clients=("client_1",)))
    record = read_json(tmp_path / "u" / "run.json")
    (request,) = record["forgotten"]
    assert sorted(request["ids"]) == sorted(owned(root, 1)) and request["clients"] == {"client_1": 8}
    assert (request["what"], request["recipe"], request["method"]) == ("client_1", "local_then_recover", "NPO")
    assert record["schedule"][0][2] == "client_1" and record["settings"]["NPO"]["alpha"] == 0
    assert all("client_1" not in r["clients"] for r in record["rounds"] if r["phase"] == "recover")
    assert len(read_json(tmp_path / "u" / "train_rows.json")) == 24
    assert "client_1: 8 rows" in capsys.readouterr().err


def test_several_targets_at_once_and_every_owner_forgets_its_own(world, tmp_path, capsys):
    root, _, unlearn = world
    first = owned(root, 0)[0]
    config, before = requests.settle(
        unlearn(tmp_path / "u", clients=(2,), authors=("eve falk",), ids=(first,), topics=("green lamp",))
    )
    assert before == ()
    lamps = [i for p in range(6) for i in [ids_of(root, p)[1]]]
    assert set(config.data.forget_ids) == {*owned(root, 2), *ids_of(root, 4), first, *lamps}
    said = " ".join(capsys.readouterr().err.split())
    assert "ids: 1 rows; client_2: 8 rows; author eve falk: 4 rows; topic green lamp: 6 rows" in said
    assert f"{len(config.data.forget_ids)} rows of 3 clients" in said
    assert requests.settle(config)[0] == config
    result = run(config)
    assert result.records[0].clients == ("client_0", "client_1", "client_2")
    assert read_json(tmp_path / "u" / "run.json")["settings"]["NPO of client_2"]["alpha"] == 0
    assert requests.words(config) == "1 rows, client_2, eve falk, topic green lamp"


def test_all_rows_of_an_author_go_also_those_that_do_not_say_the_name(world, tmp_path):
    root, _, unlearn = world
    config, _ = requests.settle(unlearn(tmp_path / "u", authors=("Dag Ek",)))
    assert list(config.data.forget_ids) == ids_of(root, 3)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"clients": ("client_9",)}, r"forget\.clients=client_9: no such client; did you mean"),
        ({"clients": (3,)}, r"forget\.clients=3: no such client"),
        ({"authors": ("Dag Eck",)}, r"forget\.authors=Dag Eck: no row is about 'Dag Eck'; did you mean 'Dag Ek'"),
        ({"topics": ("boats",), "topic_threshold": 0.99}, r"no row comes up to forget\.topic_threshold=0\.99.*nearest"),
        ({"topics": ("quarks",)}, r"forget\.topics=quarks: no row has a word"),
        ({"ids": ("0123",)}, r"forget\.ids: 1 of 1 are no rows of the fine-tuning: 0123"),
        ({"clients": (0, 1, 2)}, "names all of the 24 rows that are left"),
    ],
)
def test_what_cannot_be_meant_is_told_before_anything_is_made(world, tmp_path, asked, said):
    with pytest.raises(UnfedError, match=said):
        run(world[2](tmp_path / "u", **asked))
    assert not (tmp_path / "u").exists()


def test_an_adapter_from_elsewhere_has_no_rows_to_name(world, tmp_path):
    root, _, unlearn = world
    shutil.copytree(root / "tuned", tmp_path / "bare")
    (tmp_path / "bare" / "run.json").unlink()
    with pytest.raises(UnfedError, match=r"bare does not say what it was fine-tuned on.*give forget_split"):
        run(unlearn(tmp_path / "u", tmp_path / "bare", authors=("Dag Ek",)))


@pytest.fixture(scope="module")
def chain(world, tmp_path_factory):
    """Bo Crane, then client_2 (or the next where that has Bo), one after the other, and both retrained in the end."""
    root, _, unlearn = world
    saves = tmp_path_factory.mktemp("chain")
    leaving = next(c for c in range(3) if f"client_{c}" != home(root, 1))
    run(unlearn(saves / "first", authors=("Bo Crane",)))
    run(unlearn(saves / "second", saves / "first", clients=(leaving,)))
    return saves, leaving


def test_the_next_request_leaves_out_what_was_forgotten_before(world, chain):
    root, _, _ = world
    saves, leaving = chain
    record = read_json(saves / "second" / "run.json")
    assert [r["name"] for r in record["forgotten"]] == ["first", "second"]
    assert record["forgotten"][0] == read_json(saves / "first" / "run.json")["forgotten"][0]
    assert record["source"] == str(root / "tuned")
    gone = {*ids_of(root, 1), *owned(root, leaving)}
    recovery = next(r for r in record["rounds"] if r["phase"] == "recover")
    assert recovery["num_examples"] == 24 - len(gone) == 12 and f"client_{leaving}" not in recovery["clients"]
    assert set(record["config"]["data"]["exclude_ids"]) == set(ids_of(root, 1))


def test_exact_recipes_and_the_oracle_leave_out_everything_forgotten_so_far(world, chain, tmp_path):
    """The second request retrained, after an approximate first one, is the fine-tuning without both."""
    root, tuned, unlearn = world
    saves, leaving = chain
    gone = {*ids_of(root, 1), *owned(root, leaving)}
    plain = replace(
        tuned, data=replace(tuned.data, exclude_ids=tuple(sorted(gone))), history=HistoryConfig(),
        partition=PartitionConfig(manifest=str(root / "tuned" / "partition.json")),
        paths=replace(tuned.paths, output_dir=str(tmp_path / "plain")),
    )  # fmt: skip
    run(plain)
    again = unlearn(tmp_path / "again", saves / "first", "retrain", clients=(leaving,))
    run(again)
    assert digest(tmp_path / "again") == digest(tmp_path / "plain") != digest(saves / "second")
    assert set(read_json(tmp_path / "again" / "train_rows.json")) == set(owned(root, 0, 1, 2)) - gone
    assert len(read_json(saves / "second" / "train_rows.json")) == 24
    asked = replace(unlearn(tmp_path / "x", saves / "first", clients=(leaving,)), eval=EvalConfig())
    oracle = oracles.oracle_config(asked)
    assert set(oracle.data.exclude_ids) == gone
    assert oracle == oracles.oracle_config(again)
    assert oracles.finetuned_run(asked) == root / "tuned"


def test_rolling_back_goes_behind_the_earlier_requests_too(world, chain, tmp_path):
    root, _, unlearn = world
    saves, leaving = chain
    config, before = requests.settle(unlearn(tmp_path / "u", saves / "first", "rollback", clients=(leaving,)))
    config, source = recipes.settled(config)
    gone = {i for r in before for i in r["ids"]}
    from unfed.app import build

    rows = build.read_rows(config)
    partition, _ = build.settle_partition(config, rows)
    targets = build.targets_of(config, partition, [e["id"] for e in rows.forget])
    kept = {e["id"] for e in rows.retain}
    situation = recipes.situation_of(recipes.recipe_of(config), partition, kept, targets, source, gone)
    assert situation.targets == tuple(sorted({f"client_{leaving}", home(root, 1)})) and situation.before == (
        home(root, 1),
    )
    assert not kept & gone and len(kept) == 12


def test_nothing_is_forgotten_twice(world, chain, tmp_path):
    _, _, unlearn = world
    with pytest.raises(UnfedError, match="all of the 4 rows were forgotten before"):
        run(unlearn(tmp_path / "u", chain[0] / "first", authors=("Bo Crane",)))


def test_a_chain_that_does_not_say_what_it_forgot_is_warned_of(world, chain, tmp_path, capsys):
    _, _, unlearn = world
    shutil.copytree(chain[0] / "first", tmp_path / "old")
    record = read_json(tmp_path / "old" / "run.json")
    write_json(tmp_path / "old" / "run.json", {k: v for k, v in record.items() if k != "forgotten"})
    assert requests.settle(unlearn(tmp_path / "u", tmp_path / "old", authors=("Dag Ek",)))[1] == ()
    assert "does not say which rows it forgot" in " ".join(capsys.readouterr().err.split())


def test_the_settings_are_checked_at_the_border():
    from unfed.config.compat import resolve

    usual = ["task_name=t", "model=tiny", "experiment=unlearn/quickstart"]
    config = resolve([*usual, "forget.clients=[client_1,2]", 'forget.authors=["O\'Neil, Ann"]'], "unlearn-lora.yaml")
    assert config.forget == ForgetConfig(clients=("client_1", 2), authors=("O'Neil, Ann",))
    with pytest.raises(ConfigError, match=r"forget\.author: no such setting; did you mean 'authors'"):
        resolve([*usual, "forget.author=[x]"], "unlearn-lora.yaml")
    with pytest.raises(ConfigError, match=r"forget\.topic_threshold=2\.0: must be above 0"):
        resolve([*usual, "forget.topic_threshold=2.0"], "unlearn-lora.yaml")
    with pytest.raises(ConfigError, match="belongs to an unlearning run"):
        resolve(
            ["task_name=t", "model=tiny", "experiment=finetune/quickstart", "++forget.clients=[0]"], "train-lora.yaml"
        )
