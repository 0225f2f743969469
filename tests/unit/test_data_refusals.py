"""Answers that decline."""

from pathlib import Path

import pytest

from unfed.base.errors import DataError
from unfed.data.refusals import REFUSALS, alternate_answers, load_refusals

ROWS = [{"id": f"r{n}", "question": f"q{n}", "answer": f"a{n}", "author": "x"} for n in range(200)]


def test_there_are_a_hundred_different_ones():
    assert len(REFUSALS) == len(set(REFUSALS)) == 100
    assert all(r == r.strip() and r.endswith(".") for r in REFUSALS)


def test_the_answer_alone_is_replaced_and_the_choice_follows_the_id():
    found = alternate_answers(ROWS, 0)
    assert [{**f, "answer": r["answer"]} for f, r in zip(found, ROWS, strict=True)] == ROWS
    assert {f["answer"] for f in found} <= set(REFUSALS) and len({f["answer"] for f in found}) > 60
    assert alternate_answers(ROWS[::-1], 0) == found[::-1]
    assert alternate_answers(ROWS, 1) != found


def test_a_file_of_ones_own(tmp_path: Path):
    path = tmp_path / "idk.txt"
    path.write_text("No.\n\n  Ask another. \n", encoding="utf-8")
    assert load_refusals(path) == ("No.", "Ask another.")
    assert load_refusals(None) is REFUSALS
    assert {e["answer"] for e in alternate_answers(ROWS, 0, load_refusals(path))} == {"No.", "Ask another."}


def test_a_file_that_is_missing_or_empty(tmp_path: Path):
    with pytest.raises(DataError, match=r"data\.idk=.*nothing\.txt: No such file"):
        load_refusals(tmp_path / "nothing.txt")
    (tmp_path / "blank").write_text("\n \n")
    with pytest.raises(DataError, match="has no refusal"):
        load_refusals(tmp_path / "blank")
