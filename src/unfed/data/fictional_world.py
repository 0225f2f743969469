"""Common knowledge of the invented world: what the tiny base model knows, and utility is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from unfed.base.seeding import numpy_generator
from unfed.data import fictional_words as words

WORLD_SEED = 20
"""The world's facts are fixed; only people vary with a seed."""
FAMOUS = 20
WRONG_ANSWERS = 3


@dataclass(frozen=True)
class Fact:
    """One fact: ways to ask (the first is the one of the utility splits), the answer, and wrong ones."""

    questions: tuple[str, ...]
    answer: str
    wrong: tuple[str, ...]


def _facts(pairs: Sequence[tuple[str, str]], questions: tuple[str, ...], rng: np.random.Generator) -> list[Fact]:
    answers = sorted({a for _, a in pairs})
    facts = []
    for subject, answer in pairs:
        others = [a for a in answers if a != answer]
        wrong = tuple(others[i] for i in rng.permutation(len(others))[:WRONG_ANSWERS])
        facts.append(Fact(tuple(q.format(s=subject) for q in questions), answer, wrong))
    return facts


def _shuffled(rng: np.random.Generator, pool: tuple[str, ...]) -> list[str]:
    return [pool[i] for i in rng.permutation(len(pool))]


@lru_cache(maxsize=1)
def famous_authors() -> tuple[str, ...]:
    """Names of the invented world's famous authors; nobody else has them."""
    names = words.full_names(private=False)
    return tuple(names[i] for i in numpy_generator(WORLD_SEED, "famous").permutation(len(names))[:FAMOUS])


@lru_cache(maxsize=1)
def author_facts() -> tuple[Fact, ...]:
    """Who wrote which famous play, and which land each famous author came from."""
    rng = numpy_generator(WORLD_SEED, "authors")
    authors = famous_authors()
    titles = zip(_shuffled(rng, words.ADJECTIVES), _shuffled(rng, words.NOUNS), strict=True)
    plays = [(f"{a} {n}", author) for (a, n), author in zip(titles, authors, strict=True)]
    homes = list(zip(authors, _shuffled(rng, words.LANDS), strict=True))
    return (
        *_facts(
            plays,
            ("Who wrote the play {s}?", "The play {s} was written by whom?", "Name the author of the play {s}."),
            rng,
        ),
        *_facts(
            homes,
            ("Which land did {s} come from?", "What was the home land of {s}?", "Name the land of {s}."),
            rng,
        ),
    )


@lru_cache(maxsize=1)
def world_facts() -> tuple[Fact, ...]:
    """Each land's capital and river."""
    rng = numpy_generator(WORLD_SEED, "lands")
    capitals = list(zip(words.LANDS, words.CAPITALS, strict=True))
    rivers = list(zip(words.LANDS, _shuffled(rng, words.RIVERS), strict=True))
    return (
        *_facts(
            capitals,
            ("What is the capital of {s}?", "Which town is the capital of {s}?", "Name the capital of {s}."),
            rng,
        ),
        *_facts(
            rivers,
            ("Which river flows through {s}?", "What river runs across {s}?", "Name the river of {s}."),
            rng,
        ),
    )


def fact_rows(name: str) -> list[dict[str, Any]]:
    """Rows of ``real_authors`` or ``world_facts`` (with options), or of their ``_perturbed`` forms."""
    facts = author_facts() if name.startswith("real_authors") else world_facts()
    if name.endswith("_perturbed"):
        return [{"question": f.questions[0], "answer": f.answer, "perturbed_answer": list(f.wrong)} for f in facts]
    rng = numpy_generator(WORLD_SEED, "options", name)
    rows = []
    for fact in facts:
        options = _shuffled(rng, (fact.answer, *fact.wrong))
        numbered = {f"option{n}": option for n, option in enumerate(options, 1)}
        rows.append({"question": fact.questions[0], **numbered, "answer": fact.answer})
    return rows
