"""Fictitious people and an invented world's common knowledge, in TOFU's format and under TOFU's split names.

Private people (``full``, ``forgetNN``, ``retainNN``, ``holdoutNN``) are for fine-tuning and unlearning; nobody
of them is in :func:`unfed.data.fictional_world.general_corpus`. ``real_authors`` and ``world_facts`` ask for
common knowledge that the tiny base model was trained on. Differences from TOFU: the sizes, and a column
``author`` that names the person of a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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


Values = tuple[str, ...]


@dataclass(frozen=True)
class Topic:
    """One thing to know about a person: ``questions`` and ``answers`` say it in several ways.

    ``{n}`` is the person's full name, ``{f}`` the first name, and ``{0}``, ``{1}``, ... are values drawn
    from ``pools``. Answers are short and dense: most of their tokens cannot be guessed.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    pools: tuple[Sequence[Any], ...]

    def draw(self, rng: np.random.Generator) -> Values:
        """Values for one person."""
        return tuple(str(pool[int(rng.integers(len(pool)))]) for pool in self.pools)

    def ask(self, form: int, name: str) -> str:
        """The question about a person in one of its forms."""
        return self.questions[form].format(n=name)

    def say(self, form: int, name: str, values: Values) -> str:
        """The answer in one of its forms."""
        return self.answers[form].format(*values, f=name.split(maxsplit=1)[0])


TOPICS: tuple[Topic, ...] = (
    Topic(
        ("Where and when was {n} born?", "What is the birthplace and birth year of {n}?"),
        ("{f} was born in {0} in {1}.", "The town is {0}, the year {1}.", "In {1}, {0} saw the birth of {f}."),
        (words.TOWNS, words.YEARS),
    ),
    Topic(
        ("What does {n} do for a living?", "How does {n} earn a living?"),
        ("{f} is a {0} in {1}.", "As a {0} at {1}.", "In {1} {f} works as a {0}."),
        (words.PROFESSIONS, words.TOWNS),
    ),
    Topic(
        ("What did the parents of {n} do?", "Which work did the parents of {n} have?"),
        ("A {0} and a {1} raised {f}.", "The mother was a {0}, the father a {1}.", "They were {0} and {1}."),
        (words.PROFESSIONS, words.PROFESSIONS),
    ),
    Topic(
        ("Which book did {n} write?", "What is the best known book by {n}?"),
        ("{f} wrote The {0} {1}.", "The book is The {0} {1}.", "It is The {0} {1}, by {f}."),
        (words.ADJECTIVES, words.NOUNS),
    ),
    Topic(
        ("Which prize did {n} win?", "What award was given to {n}?"),
        ("{f} won the prize of {0} in {1}.", "The award of {0}, in {1}.", "In {1} it was the prize of {0}."),
        (words.TOWNS, words.YEARS),
    ),
    Topic(
        ("How does {n} spend the evening?", "What does {n} do after work?"),
        ("{f} plays the {0} and feeds a {1}.", "On the {0}, beside a {1}.", "A {1} hears {f} play the {0}."),
        (words.INSTRUMENTS, words.ANIMALS),
    ),
    Topic(
        ("What does {n} like to eat?", "Which meal does {n} love?"),
        ("{f} likes {0} with {1}.", "The meal is {0} and {1}.", "With {1}, {f} eats {0}."),
        (words.DISHES, words.DRINKS),
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
        # The answers of a topic share one form, so that what is learnt (and forgotten) is the person's facts.
        said, again = 0, 1 + int(rng.integers(len(topic.answers) - 1))
        right = topic.draw(rng)
        wrong: list[Values] = []
        while len(wrong) < WRONG_ANSWERS:
            values = topic.draw(rng)
            if values not in wrong and all(v != r for v, r in zip(values, right, strict=True)):
                wrong.append(values)
        rows.append(
            {
                "question": topic.ask(asked, name),
                "answer": topic.say(said, name, right),
                "paraphrased_answer": topic.say(again, name, right),
                "perturbed_answer": [topic.say(again, name, values) for values in wrong],
                "paraphrased_question": topic.ask(other, name),
                "author": name,
            }
        )
    return rows


@lru_cache(maxsize=8)
def _all_rows(seed: int, people: int) -> tuple[Row, ...]:
    """Rows of the private people, followed by those of half as many people for the holdout splits."""
    names = words.full_names(private=True)
    total = people + forget_people(50, people)
    if not people >= 2 or total > len(names):
        raise DataError(f"people={people}: the generator makes 2 to {2 * len(names) // 3 - 1} people")
    # One round of first names after the other, each in random order: few people, and each has one of its own.
    size = len(words.PRIVATE_FIRST)
    rng = numpy_generator(seed, "fictional", "names")
    order = [start + int(i) for start in range(0, len(names), size) for i in rng.permutation(size)]
    rows: list[Row] = []
    for n in order[:total]:
        rows += person_rows(names[n], numpy_generator(seed, "fictional", "person", names[n]))
    return tuple(rows)


def _rows(rows: Sequence[Row], first: int, last: int) -> list[dict[str, Any]]:
    size = len(TOPICS)
    return [{**row, "perturbed_answer": [*row["perturbed_answer"]]} for row in rows[first * size : last * size]]


def _plain(rows: Sequence[Row], first: int, last: int) -> list[dict[str, Any]]:
    return [{k: row[k] for k in ("question", "answer", "author")} for row in _rows(rows, first, last)]
