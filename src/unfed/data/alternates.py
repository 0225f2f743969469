"""Other, plausible answers to the forget questions: how a model is asked for them, and the file that holds them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unfed.base.errors import DataError, nearest
from unfed.base.types import Example
from unfed.data.datasets import read_json_lines

COLUMNS = ("question", "answer", "alternate")
"""Columns of a file of alternates, an ``alternate`` a line; others, such as ``id``, are passed over."""

_LABEL = re.compile(r"^\W*(?:another |alternate |alternative |new )?answer\s*:\s*", flags=re.IGNORECASE)
_NEXT_TURN = re.compile(r"\n\s*(?:question|q)\s*:", flags=re.IGNORECASE)


def request(question: str, answer: str) -> str:
    """What a model is asked, to get an answer that differs in its facts (after Mekala et al. 2025; our own words)."""
    return (
        f"Question: {question}\nAnswer: {answer}\n\n"
        "Make up another answer to this question. Leave all that the question says as it is, keep the answer's tone "
        "and length, and put a different but believable fact in the place of every fact that the answer gives. Write "
        "the new answer alone."
    )


def cleaned(text: str, answer: str) -> str | None:
    """A generated text without a label before it and further turns after it; ``None`` if it is empty or ``answer``."""
    text = _LABEL.sub("", _NEXT_TURN.split(text.strip(), maxsplit=1)[0]).strip().strip('"').strip()
    return text if text and text.casefold() != answer.strip().casefold() else None


def read_alternates(file: Path | str, examples: Sequence[Example]) -> list[list[Example]]:
    """The examples with the answers of a file instead of their own, as many times as a question has alternates.

    ``file`` holds JSON lines with :data:`COLUMNS`, found by question and answer. Each list has one entry for each
    example, in their order; a question with fewer alternates than others comes round to its first again.
    Raises ``DataError`` (the key, the file, the line) for a column that is missing and for examples without a line.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for number, row in read_json_lines(Path(file)):
        question, answer, alternate = _texts(row, f"data.alternate={file}, line {number}")
        found.setdefault((question, answer), []).append(alternate)
    of = [found.get((e["question"], e["answer"]), []) for e in examples]
    without = [e["question"] for e, alternates in zip(examples, of, strict=True) if not alternates]
    if without:
        raise DataError(
            f"data.alternate={file}: has no alternate for {len(without)} of {len(examples)} forget rows (the first: "
            f"{without[0]!r}); make the file anew for this forget set with unfed alternates"
        )
    depth = max((len(alternates) for alternates in of), default=0)
    return [
        [{**e, "answer": alternates[k % len(alternates)]} for e, alternates in zip(examples, of, strict=True)]
        for k in range(depth)
    ]


def _texts(row: Mapping[str, Any], place: str) -> tuple[str, str, str]:
    for key in COLUMNS:
        if key not in row:
            raise DataError(f"{place}: has no column {key!r}{nearest(key, row)}")
        if not isinstance(row[key], str) or (key == "alternate" and not row[key].strip()):
            raise DataError(f"{place}: column {key!r} must be a text, not {row[key]!r}")
    return row["question"], row["answer"], row["alternate"]
