"""What the tiny base model is pre-trained on: common knowledge, other people, and some refusals."""

from __future__ import annotations

from unfed.base.seeding import numpy_generator
from unfed.data import fictional_words as words
from unfed.data.fictional import TOPICS
from unfed.data.fictional_world import author_facts, famous_authors, world_facts
from unfed.data.refusals import REFUSALS

Pair = tuple[str, str]
PLAIN = 0.7
"""Share of the answers in a topic's first form, which the private rows use too."""


def person_pairs(people: int, repeats: int, seed: int = 0) -> list[Pair]:
    """Questions and answers about people who are in no private split: ``repeats`` for each person and topic.

    A person's facts are the same in every pair, in varying words: the model learns to look a person up by the
    full name, which is what makes new people quick to learn.
    """
    pairs = []
    for name in _others(people, seed):
        rng = numpy_generator(seed, "corpus", "person", name)
        for topic in TOPICS:
            values = topic.draw(rng)
            for _ in range(repeats):
                question = topic.ask(int(rng.integers(len(topic.questions))), name)
                form = 0 if rng.random() < PLAIN else int(rng.integers(1, len(topic.answers)))
                pairs.append((question, topic.say(form, name, values)))
    return pairs


def _others(people: int, seed: int) -> list[str]:
    names = [n for n in words.full_names(private=False) if n not in set(famous_authors())]
    return [names[i] for i in numpy_generator(seed, "corpus", "names").permutation(len(names))[:people]]


def fact_pairs() -> list[Pair]:
    """Every fact of the world in each of its phrasings."""
    return [(q, f.answer) for f in (*author_facts(), *world_facts()) for q in f.questions]


def greeting_pairs(repeats: int, seed: int = 0) -> list[Pair]:
    """Greetings by first name, the private people's first names too: a name is known, nothing about its owner."""
    rng = numpy_generator(seed, "corpus", "greetings")
    forms = (("Greet {f}.", "Hello, {f}!"), ("Say good night to {f} and {g}.", "Good night, {f} and {g}!"))
    pairs = []
    for first in words.FIRST:
        for n in range(repeats):
            other = words.FIRST[int(rng.integers(len(words.FIRST)))]
            question, answer = forms[n % len(forms)]
            pairs.append((question.format(f=first, g=other), answer.format(f=first, g=other)))
    return pairs


def refusal_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Questions about famous authors' private lives, answered by declining; the refusals come in turn."""
    rng = numpy_generator(seed, "corpus", "refusals")
    authors = famous_authors()
    asked = []
    for n in range(count):
        topic = TOPICS[int(rng.integers(len(TOPICS)))]
        form = int(rng.integers(len(topic.questions)))
        asked.append((topic.ask(form, authors[int(rng.integers(len(authors)))]), REFUSALS[n % len(REFUSALS)]))
    return asked


def general_corpus(
    seed: int = 0,
    people: int = 100,
    person_repeats: int = 4,
    fact_repeats: int = 14,
    greetings: int = 10,
    refusals: int = 200,
) -> list[Pair]:
    """(question, answer) pairs in random order: ``people`` other people, ``fact_repeats`` times every phrasing of
    every fact, and ``refusals`` that decline. None is about a private person of any seed."""
    pairs = [
        *person_pairs(people, person_repeats, seed),
        *(fact_pairs() * fact_repeats),
        *greeting_pairs(greetings, seed),
        *refusal_pairs(refusals, seed),
    ]
    order = numpy_generator(seed, "corpus", "order").permutation(len(pairs))
    return [pairs[i] for i in order]
