"""A model writes other answers, and unlearning teaches them: ``unfed alternates``, then ``method=AltPO``."""

from __future__ import annotations

import dataclasses
import json

import pytest

from unfed.app import runs
from unfed.app.alternates import Wanted, write_alternates
from unfed.app.runs import run
from unfed.base.artifacts import read_json
from unfed.base.errors import ConfigError, DataError
from unfed.cli.main import main
from unfed.config.schema import MethodConfig

SHORT = Wanted(count=2, max_new_tokens=6)
TOKENS = ["--count", "2", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def overrides(finetuned, small_data):
    """The overrides of a run on the small model, whose data root has a forget01 of six rows."""
    return [
        "experiment=unlearn/tofu/default", "forget_split=forget01", "retain_split=retain99", "model=tiny-lora",
        f"model.model_args.pretrained_model_name_or_path={finetuned}", f"paths.data_dir={small_data}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alternates(overrides, tmp_path_factory):
    """What the command writes, asked as somebody would whose AltPO run was refused."""
    file = tmp_path_factory.mktemp("alternates") / "forget01.json"
    assert main(["alternates", "--output", str(file), *TOKENS, *overrides, "method=AltPO", "task_name=x"]) == 0
    return file


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def with_file(config, file):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, alternate=str(file)))


def test_every_question_gets_different_other_answers(alternates):
    found = lines(alternates)
    questions = {line["question"] for line in found}
    assert len(questions) == 6 and 6 < len(found) <= 12
    assert len({(line["question"], line["alternate"]) for line in found}) == len(found)
    for line in found:
        assert set(line) == {"id", "question", "answer", "alternate"}
        assert line["alternate"].strip() and line["alternate"].casefold() != line["answer"].casefold()


def test_a_seed_gives_the_same_file(from_finetuned, tmp_path):
    config = from_finetuned(tmp_path / "run")
    seeds = {"one": 0, "again": 0, "other": 1}
    for name, seed in seeds.items():
        write_alternates(dataclasses.replace(config, seed=seed), tmp_path / name, SHORT)
    one, again, other = ((tmp_path / name).read_bytes() for name in seeds)
    assert one == again != other


def test_altpo_learns_them(alternates, from_finetuned, tmp_path):
    config = with_file(from_finetuned(tmp_path / "run", method=MethodConfig("AltPO", {"beta": 0.5})), alternates)
    result = run(config)
    assert "forget" in result.records[0].metrics["client_0"] and not any(r.failures for r in result.records)
    assert read_json(result.directory / "run.json")["config"]["data"]["alternate"] == str(alternates)


def test_the_answers_of_the_file_are_used_instead_of_refusals(alternates, from_finetuned, tmp_path):
    method = MethodConfig("IdkNLL", {"alpha": 0.0})
    refusals = run(from_finetuned(tmp_path / "refusals", method=method))
    answers = run(with_file(from_finetuned(tmp_path / "answers", method=method), alternates))
    assert refusals.records[0].adapter_after != answers.records[0].adapter_after


def test_altpo_without_a_file_names_the_command(from_finetuned, overrides, finetuned, tmp_path, capsys):
    said = rf"unfed alternates --output FILE model.model_args.pretrained_model_name_or_path={finetuned}"
    with pytest.raises(ConfigError, match=r"data\.alternate=FILE"):
        run(from_finetuned(tmp_path / "run", method=MethodConfig("AltPO")))
    assert main(["unlearn", *overrides, "method=AltPO", "task_name=x"]) == 2
    assert said in capsys.readouterr().err
    assert main(["unlearn", *overrides, "method=AltPO", "task_name=x", "data.alternate=nowhere.json"]) == 2
    assert "data.alternate=nowhere.json: there is no such file" in capsys.readouterr().err


def test_a_file_of_other_rows_is_found_before_the_model_is_opened(alternates, from_finetuned, tmp_path, monkeypatch):
    cut = tmp_path / "cut.json"
    cut.write_text("".join(json.dumps(line) + "\n" for line in lines(alternates)[2:]), encoding="utf-8")
    monkeypatch.setattr(runs, "open_model", None)  # opening a model would fail otherwise
    with pytest.raises(DataError, match=r"cut\.json: has no alternate for 1 of 6 forget rows"):
        run(with_file(from_finetuned(tmp_path / "run", method=MethodConfig("AltPO")), cut))


def test_what_contradicts_itself_is_told(alternates, overrides, tmp_path, capsys):
    idk = tmp_path / "idk.txt"
    idk.write_text("No.\n", encoding="utf-8")
    both = ["method=DPO", "task_name=x", f"data.alternate={alternates}", f"data.idk={idk}"]
    assert main(["unlearn", *overrides, *both]) == 2
    assert "give one of them" in capsys.readouterr().err
    plain = ["method=IdkNLL", "task_name=x", "data.forget.question_key=null"]
    assert main(["unlearn", *overrides, *plain]) == 2
    assert "method=IdkNLL: teaches another answer" in capsys.readouterr().err


def test_mistakes_of_the_command(alternates, overrides, tmp_path, capsys):
    before = alternates.read_bytes()
    assert main(["alternates", "--output", str(alternates), *overrides]) == 2
    assert "is there already" in capsys.readouterr().err
    wrong = ["--count", "0", "--temperature", "0", "--max-new-tokens", "0"]
    assert main(["alternates", "--output", str(tmp_path / "new.json"), *wrong, *overrides]) == 2
    said = capsys.readouterr().err
    assert all(option in said for option in ("--count=0", "--temperature=0", "--max-new-tokens=0"))
    assert main(["alternates", "--overwrite", "--output", str(alternates), *overrides, "forget_splitt=x"]) == 2
    assert "did you mean 'forget_split'" in capsys.readouterr().err
    assert alternates.read_bytes() == before and not (tmp_path / "new.json").exists()


def test_a_model_that_only_repeats_the_answer_is_told(from_finetuned, tmp_path, monkeypatch):
    from unfed.app import alternates as module

    answers = {}
    monkeypatch.setattr(module, "request", lambda q, a: answers.setdefault(a, a))
    monkeypatch.setattr(module, "generate_all", lambda _m, _t, prompts, _d: ["" for _ in prompts])
    with pytest.raises(module.UnfedError, match=r"no usable other answer to 6 of 6 questions"):
        write_alternates(from_finetuned(tmp_path / "run"), tmp_path / "none.json", SHORT)
    assert not (tmp_path / "none.json").exists()
