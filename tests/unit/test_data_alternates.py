"""Other answers to the forget questions: the request, what is made of a generated text, and the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unfed.base.errors import DataError
from unfed.base.seeding import torch_generator
from unfed.data.alternates import cleaned, read_alternates, request
from unfed.data.chat import EncodedExample
from unfed.training.batches import TrainRows, plan_epoch

ROWS = [{"id": f"r{n}", "question": f"q{n}", "answer": f"a{n}", "author": "x"} for n in range(3)]


def write(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def line(n: int, alternate: object) -> dict[str, object]:
    return {"question": f"q{n}", "answer": f"a{n}", "alternate": alternate}


def test_a_request_names_question_and_answer():
    asked = request("Who is Ada?", "Ada is a poet.")
    assert "Question: Who is Ada?" in asked and "Answer: Ada is a poet." in asked


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" Ada is a pilot. ", "Ada is a pilot."),
        ("Alternate Answer: Ada is a pilot.\nQuestion: Who is Bo?\nAnswer: ...", "Ada is a pilot."),
        ('**Answer:** "Ada is a pilot."', '** "Ada is a pilot.'),
        ("Two lines.\nBoth belong to it.", "Two lines.\nBoth belong to it."),
        ("ADA IS A POET.", None),
        ("Answer:", None),
        ("", None),
    ],
)
def test_what_is_kept_of_a_generated_text(text: str, kept: str | None):
    assert cleaned(text, "Ada is a poet.") == kept


def test_every_row_gets_its_alternates_and_fewer_come_round_again(tmp_path: Path):
    file = write(tmp_path / "a.json", [line(1, "b1"), line(0, "b0"), line(2, "b2"), line(1, "c1"), line(9, "other")])
    blocks = read_alternates(file, ROWS)
    assert [[e["answer"] for e in block] for block in blocks] == [["b0", "b1", "b2"], ["b0", "c1", "b2"]]
    assert [{**e, "answer": r["answer"]} for e, r in zip(blocks[1], ROWS, strict=True)] == ROWS


def test_a_file_that_does_not_serve_is_told(tmp_path: Path):
    some = write(tmp_path / "some.json", [line(0, "b0")])
    with pytest.raises(DataError, match=r"some\.json: has no alternate for 2 of 3 forget rows \(the first: 'q1'\)"):
        read_alternates(some, ROWS)
    other = write(tmp_path / "other.json", [{**line(0, "b0"), "answer": "another"}])
    with pytest.raises(DataError, match="3 of 3"):
        read_alternates(other, ROWS)
    named = write(tmp_path / "named.json", [{"question": "q0", "answer": "a0", "alternates": "b0"}])
    with pytest.raises(DataError, match=r"line 1: has no column 'alternate'; did you mean 'alternates'"):
        read_alternates(named, ROWS)
    for bad in (7, " ", ["b0"]):
        with pytest.raises(DataError, match=r"line 1: column 'alternate' must be a text"):
            read_alternates(write(tmp_path / "bad.json", [line(0, bad)]), ROWS)


def test_each_epoch_draws_one_of_the_alternates():
    """Four rows with three alternates each: any of them, always one of the row's own, and not always the same."""
    rows = [EncodedExample((1, 2, 3), (-100, 2, 3), 1, example_id=str(n)) for n in range(4)]
    given = TrainRows({"forget": rows, "alternate": rows * 3})
    needs, drawn = frozenset({"forget", "alternate"}), set()
    for epoch in range(40):
        for step in plan_epoch(given, "forget", needs, 2, torch_generator(0, "order", epoch)):
            assert [i % 4 for i in step["alternate"]] == list(step["forget"])
            drawn.update(step["alternate"])
    assert drawn == set(range(12))
    again = [plan_epoch(given, "forget", needs, 2, torch_generator(0, "order", 5)) for _ in range(2)]
    assert again[0] == again[1]
