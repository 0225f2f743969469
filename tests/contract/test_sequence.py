"""``unfed sequence``: three requests in a row on one model, for rows, for a client, for an author."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from unfed.app.tiny_base import tiny_base
from unfed.base.artifacts import read_json
from unfed.cli import sequence
from unfed.cli.main import main
from unfed.data.datasets import load_rows
from unfed.data.spec import DatasetSpec

PATH = "model.model_args.pretrained_model_name_or_path"
LEARN = ("experiment=finetune/quickstart", "partition=author", "eval.enabled=false", "task_name=people")


def three_requests(
    root: Path, size: Literal["quickstart", "test"], author: str, learn: list[str], forget: list[str]
) -> dict[str, Any]:
    """Fine-tune, forget three times, and what sequence.json says of it. The client that leaves is not ``author``'s."""
    base = tiny_base(root / "base", size=size)
    tuned = root / "people"
    learning = [*LEARN, "model=tiny-lora", *learn]
    assert main(["train", *learning, f"{PATH}={base}", f"paths.output_dir={tuned}"]) == 0
    dealt = read_json(tuned / "partition.json")["clients"]
    own = next(r["id"] for r in load_rows(DatasetSpec("fictional", "full")) if r["author"] == author)
    leaves = next(c for c, ids in dealt.items() if own not in ids)
    file = root / "requests.yaml"
    file.write_text(
        "- {name: prizes, topics: [prize award], overrides: [trainer.method_args.unlearn_epochs=20]}\n"
        f"- {{name: leaves, clients: [{leaves}], overrides: [trainer.method_args.unlearn_epochs=3]}}\n"
        f"- {{name: person, authors: [{author}]}}\n"
    )
    argv = ["experiment=unlearn/quickstart", "model=tiny-lora", f"{PATH}={tuned}", *forget]
    assert sequence.main([str(file), "--directory", str(root / "sequence"), *argv]) == 0
    return read_json(root / "sequence" / "sequence.json")


def check(found: dict[str, Any], forgotten: float) -> None:
    """Each request's rows have at most the share ``forgotten`` of their probability from its request on."""
    names = ["prizes", "leaves", "person"]
    assert [r["name"] for r in found["requests"]] == names and found["status"] == "finished"
    assert [look["after"] for look in found["looks"]] == ["start", *names]
    start = found["looks"][0]["forget"]
    for n, name in enumerate(names, 1):
        for look in found["looks"][n:]:
            share = look["forget"][name]["prob"] / start[name]["prob"]
            assert share < forgotten, f"{name} after {look['after']}: {share:.2f}"
    assert all(0 <= look["utility"] < 1 for look in found["looks"]), "utility is reported after each"
    last = read_json(Path(found["requests"][-1]["run"]) / "run.json")
    ids = [i for request in last["forgotten"] for i in request["ids"]]
    assert len(ids) == len(set(ids)) == sum(r["rows"] for r in found["requests"])


def test_three_requests_at_a_size_for_tests(tmp_path: Path) -> None:
    """A model that learns little: what it knew of each falls, and does not come back."""
    learn = ["trainer.method_args.global_rounds=6", "trainer.args.learning_rate=0.02", "data.train.limit=84"]
    few = ["eval.metrics=[model_utility]", "eval.limit=4", "eval.round_limit=14", "eval.generation.max_new_tokens=4"]
    author = load_rows(DatasetSpec("fictional", "full"))[0]["author"]
    found = three_requests(tmp_path, "test", author, learn, ["trainer.method_args.global_rounds=1", *few])
    check(found, 0.9)


@pytest.mark.slow  # learning takes a minute, and as long again to make the base
def test_three_requests_on_the_quickstarts_model(tmp_path: Path) -> None:
    """As docs/requests.md shows it: each is forgotten, the earlier stay so, and most of the rest is kept."""
    found = three_requests(tmp_path, "quickstart", "Grethel Ashmere", ["trainer.method_args.num_clients=4"], [])
    check(found, 0.35)
    first, last = found["looks"][0], found["looks"][-1]
    assert last["kept"]["prob"] > 0.8 * first["kept"]["prob"]
    assert last["utility"] > 0.8 * first["utility"]
