"""Rows near a topic: by their author, or by TF-IDF."""

from __future__ import annotations

import math

from unfed.data.topic import close_rows


def row(i: str, text: str, **more) -> dict:
    return {"id": i, "question": text, "answer": "", **more}


def test_the_cosine_is_that_of_tf_idf_by_hand():
    """Three texts; idf = ln(4 / (1 + df)) + 1: lemons in two of them, the other words in one."""
    rows, topic = [row("a", "green lemons"), row("b", "blue boats")], [row("t", "sour lemons")]
    common, single = math.log(4 / 3) + 1, math.log(4 / 2) + 1
    cosine = common**2 / (common**2 + single**2)
    assert close_rows(rows, topic, cosine - 1e-9) == {"a"}
    assert close_rows(rows, topic, cosine + 1e-9) == frozenset()


def test_rows_of_the_same_author_are_near_whatever_they_say():
    rows = [row("a", "green", author="Ana"), row("b", "blue", author="Bo"), row("c", "red")]
    assert close_rows(rows, [row("t", "sour", author="Ana")], 0.5) == {"a"}
    assert close_rows(rows, [row("t", "sour")], 0.5) == frozenset(), "no author is no common author"


def test_nothing_is_near_nothing():
    assert close_rows([], [row("t", "sour")], 0.5) == close_rows([row("a", "green")], [], 0.5) == frozenset()
