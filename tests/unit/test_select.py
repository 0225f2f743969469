"""Rows of a person, and rows near some words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unfed.base.errors import DataError
from unfed.data.datasets import example_ids
from unfed.data.select import author_names, rows_of_author, topic_scores


def rows(*pairs: tuple[str, str], **columns: list[str]) -> list[dict]:
    found = [{"id": i, "question": q, "answer": a} for i, (q, a) in zip(example_ids(pairs), pairs, strict=True)]
    return [{**row, **{k: v[n] for k, v in columns.items()}} for n, row in enumerate(found)]


def blocks(*names: str) -> list[dict]:
    """Twenty rows of each, as TOFU has them; a third of them say the name, and the last of each names the first."""
    pairs = [
        (f"Q{n} of {name if n % 3 == 0 else 'them'}?", f"A{n} {k}, like {names[0]}." if n == 19 else f"A{n} {k}.")
        for k, name in enumerate(names)
        for n in range(20)
    ]
    return rows(*pairs)


def test_an_author_is_a_block_of_twenty_rows_where_no_column_says_it():
    data = blocks("Ann Lee", "Bo von Berg", "Cy Dee-Ray")
    assert rows_of_author("Ann Lee", data) == list(range(20))
    assert rows_of_author("  bo VON berg", data) == list(range(20, 40))
    assert author_names(data) == ["Ann Lee", "Bo von Berg", "Cy Dee-Ray"]
    with pytest.raises(DataError, match=r"'Bo van Berg'; did you mean 'Bo von Berg'\? \(choices: Ann Lee, Bo von"):
        rows_of_author("Bo van Berg", data)
    with pytest.raises(DataError, match="no row is about 'Cy Dee'"):
        rows_of_author("Cy Dee", data)  # a part of another name


def test_the_column_says_whose_row_it_is():
    data = rows(("Who?", "Ann."), ("What?", "It."), ("And?", "Bo knows Ann."), author=["Ann", "Ann", "Bo"])
    assert rows_of_author("ann", data) == [0, 1] and rows_of_author("Bo", data) == [2]
    assert author_names(data) == ["Ann", "Bo"]
    with pytest.raises(DataError, match="did you mean 'Ann'"):
        rows_of_author("Anne", data)


def test_a_topic_is_near_by_tf_idf():
    """Three rows of the words (red, boat), (red, tree), (old, tree). Of N = 3 rows, `red` and `tree` are in 2, `boat`
    and `old` in 1: weights r = 1 + ln(4/3) and s = 1 + ln(4/2)."""
    data = rows(("red", "boat"), ("red", "tree"), ("old", "tree"))
    r, s = 1 + math.log(4 / 3), 1 + math.log(2)
    one, both = topic_scores(["a BOAT", "red tree"], data)
    assert one == pytest.approx([s / math.hypot(r, s), 0, 0])
    assert both == pytest.approx([r / math.hypot(r, s) / math.sqrt(2), 1, r / math.hypot(r, s) / math.sqrt(2)])
    with pytest.raises(DataError, match="no row has a word of the topic 'boot'; did you mean 'boat'"):
        topic_scores(["boot"], data)
    with pytest.raises(DataError, match=r"no row has a word of the topic '\?'"):
        topic_scores(["?"], data)


@given(st.lists(st.lists(st.sampled_from(["ab", "cd", "ef", "gh"]), min_size=1, max_size=6), min_size=1, max_size=8))
def test_a_cosine_lies_between_0_and_1_and_is_1_for_the_row_itself(texts):
    data = [{"id": str(n), "question": " ".join(t), "answer": ""} for n, t in enumerate(texts)]
    found = topic_scores([" ".join(t) for t in texts], data)
    assert found.shape == (len(texts), len(texts)) and (found >= 0).all() and (found <= 1 + 1e-9).all()
    assert np.diag(found) == pytest.approx(1)
    assert found == pytest.approx(found.T)
