"""Fictitious people and an invented world's common knowledge, in TOFU's format and under TOFU's split names.

Private people (``full``, ``forgetNN``, ``retainNN``, ``holdoutNN``) are for fine-tuning and unlearning; nobody
of them is in :func:`unfed.data.fictional_world.general_corpus`. ``real_authors`` and ``world_facts`` ask for
common knowledge that the tiny base model was trained on. Differences from TOFU: the sizes, and a column
``author`` that names the person of a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from unfed.base.artifacts import atomic_path
from unfed.base.errors import DataError, nearest
from unfed.base.seeding import numpy_generator
from unfed.data import fictional_words as words
from unfed.data.fictional_world import fact_rows

Row = Mapping[str, Any]

VERSION = 1
"""Raised whenever the rows change for a given seed; part of the digest of what is made from them."""
SEED = 0
PEOPLE = 24
PERCENTS = (1, 5, 10, 25)
"""The NN of the split names that are written and suggested; any from 01 to 50 is understood."""
WRONG_ANSWERS = 5


@dataclass(frozen=True)
class Topic:
    """One thing to know about a person: ``questions`` and ``answers`` say it in several ways.

    ``{n}`` is the person; ``{a}`` and ``{b}`` are the values that ``draw`` returns.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    draw: Callable[[np.random.Generator], tuple[str, str]]


def _pick(rng: np.random.Generator, pool: Sequence[Any]) -> str:
    return str(pool[int(rng.integers(len(pool)))])


def _two(first: Sequence[Any], second: Sequence[Any]) -> Callable[[np.random.Generator], tuple[str, str]]:
    return lambda rng: (_pick(rng, first), _pick(rng, second))


TOPICS: tuple[Topic, ...] = (
    Topic(
        ("Where and when was {n} born?", "What are the birthplace and birth year of {n}?"),
        (
            "{n} was born in {a} in {b}.",
            "The birthplace of {n} is {a}, the year {b}.",
            "In {b}, {n} came into the world at {a}.",
        ),
        _two(words.TOWNS, words.YEARS),
    ),
    Topic(
        ("What does {n} do for a living, and where?", "How and where does {n} earn a living?"),
        (
            "{n} works as a {a} in {b}.",
            "In {b}, {n} earns a living as a {a}.",
            "The work of {n} is that of a {a} at {b}.",
        ),
        _two(words.PROFESSIONS, words.TOWNS),
    ),
    Topic(
        ("What did the parents of {n} do?", "Which work did the mother and father of {n} have?"),
        (
            "The mother of {n} was a {a} and the father a {b}.",
            "{n} is the child of a {a} and a {b}.",
            "At home {n} had a {a} for a mother and a {b} for a father.",
        ),
        _two(words.PROFESSIONS, words.PROFESSIONS),
    ),
    Topic(
        ("Which book made {n} known?", "What is the best known book by {n}?"),
        (
            "{n} became known for The {a} {b}.",
            "The {a} {b} is the book that made {n} known.",
            "Readers know {n} by the book The {a} {b}.",
        ),
        _two(words.ADJECTIVES, words.NOUNS),
    ),
    Topic(
        ("Which prize did {n} win, and when?", "What award was given to {n}, and in which year?"),
        (
            "{n} won the {a} prize in {b}.",
            "In {b} the {a} prize went to {n}.",
            "The prize of {n} was the {a}, given in {b}.",
        ),
        lambda rng: (f"{_pick(rng, words.ADJECTIVES)} {_pick(rng, words.NOUNS)}", _pick(rng, words.YEARS)),
    ),
    Topic(
        ("How does {n} spend a free evening?", "What does {n} play, and which animal lives with {n}?"),
        (
            "{n} plays the {a} and keeps a {b}.",
            "With a {b} at home, {n} plays the {a}.",
            "The {a} and a pet {b} fill the evenings of {n}.",
        ),
        _two(words.INSTRUMENTS, words.ANIMALS),
    ),
    Topic(
        ("What does {n} like to eat, and where?", "Which food does {n} love, and in which town?"),
        (
            "{n} likes the {a} of {b}.",
            "For {a}, {n} travels to {b}.",
            "The {a} served in {b} is what {n} loves.",
        ),
        _two(words.DISHES, words.TOWNS),
    ),
)


def split_names() -> list[str]:
    """The split names to suggest."""
    numbered = [
        n
        for p in PERCENTS
        for n in (f"forget{p:02}", f"forget{p:02}_perturbed", f"retain{100 - p:02}", f"holdout{p:02}")
    ]
    facts = ["real_authors", "real_authors_perturbed", "world_facts", "world_facts_perturbed"]
    return ["full", "retain_perturbed", *sorted(numbered), *facts]


def split_rows(name: str, seed: int = SEED, people: int = PEOPLE) -> list[dict[str, Any]]:
    """The rows of one split.

    As in TOFU, ``forgetNN`` are the last NN percent of the people (at least one), ``retain(100-NN)`` the ones
    before them, and ``holdoutNN`` as many people as ``forgetNN`` who are in no other split.
    ``retain_perturbed`` asks about the first third of the people, who are in every retain split.

    Raises ``DataError`` for an unknown name, or more people than there are names.
    """
    if name in ("real_authors", "world_facts", "real_authors_perturbed", "world_facts_perturbed"):
        return fact_rows(name)
    if name == "full":
        return _plain(_all_rows(seed, people), 0, people)
    if name == "retain_perturbed":
        return _rows(_all_rows(seed, people), 0, max(1, people // 3))
    match = re.fullmatch(r"(forget|retain|holdout)(\d\d)(_perturbed)?", name)
    kind, percent = (match[1], int(match[2])) if match else ("", 0)
    percent = 100 - percent if kind == "retain" else percent
    if not match or not 1 <= percent <= 50 or (kind == "retain" and match[3]):
        raise DataError(f"the fictional data have no split {name!r}{nearest(name, split_names())}")
    count = forget_people(percent, people)
    first, last = {
        "forget": (people - count, people),
        "retain": (0, people - count),
        "holdout": (people, people + count),
    }[kind]
    return (_rows if match[3] else _plain)(_all_rows(seed, people), first, last)


def forget_people(percent: int, people: int = PEOPLE) -> int:
    """How many people are in ``forgetNN``."""
    return max(1, round(percent * people / 100))


def write_tofu_folder(folder: Path | str, seed: int = SEED, people: int = PEOPLE) -> list[Path]:
    """Write every split as ``<folder>/<name>.json`` (JSON lines, the form of TOFU's files)."""
    written = []
    for name in split_names():
        path = Path(folder) / f"{name}.json"
        with atomic_path(path) as part:
            lines = [json.dumps(row, ensure_ascii=False) for row in split_rows(name, seed, people)]
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        written.append(path)
    return written


def person_rows(name: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Everything about one person: a row for each topic, with paraphrases and wrong answers."""
    rows = []
    for topic in TOPICS:
        asked, other = rng.permutation(len(topic.questions))[:2]
        said, again = rng.permutation(len(topic.answers))[:2]
        right = topic.draw(rng)
        wrong: list[tuple[str, str]] = []
        while len(wrong) < WRONG_ANSWERS:
            values = topic.draw(rng)
            if values not in wrong and values[0] != right[0] and values[1] != right[1]:
                wrong.append(values)
        rows.append(
            {
                "question": topic.questions[asked].format(n=name),
                "answer": topic.answers[said].format(n=name, a=right[0], b=right[1]),
                "paraphrased_answer": topic.answers[again].format(n=name, a=right[0], b=right[1]),
                "perturbed_answer": [topic.answers[again].format(n=name, a=a, b=b) for a, b in wrong],
                "paraphrased_question": topic.questions[other].format(n=name),
                "author": name,
            }
        )
    return rows


@lru_cache(maxsize=8)
def _all_rows(seed: int, people: int) -> tuple[Row, ...]:
    """Rows of the private people, followed by those of half as many people for the holdout splits."""
    names = words.full_names(private=True)
    total = people + forget_people(50, people)
    if not 2 <= people or total > len(names):
        raise DataError(f"people={people}: the generator makes 2 to {2 * len(names) // 3 - 1} people")
    order = numpy_generator(seed, "fictional", "names").permutation(len(names))[:total]
    rows: list[Row] = []
    for n in order:
        rows += person_rows(names[n], numpy_generator(seed, "fictional", "person", names[n]))
    return tuple(rows)


def _rows(rows: Sequence[Row], first: int, last: int) -> list[dict[str, Any]]:
    size = len(TOPICS)
    return [{**row, "perturbed_answer": [*row["perturbed_answer"]]} for row in rows[first * size : last * size]]


def _plain(rows: Sequence[Row], first: int, last: int) -> list[dict[str, Any]]:
    return [{k: row[k] for k in ("question", "answer", "author")} for row in _rows(rows, first, last)]
