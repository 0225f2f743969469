"""What the tiny base model is pre-trained on: common knowledge, other people, and some refusals."""

from __future__ import annotations

from unfed.base.seeding import numpy_generator
from unfed.data import fictional_words as words
from unfed.data.fictional import TOPICS
from unfed.data.fictional_world import author_facts, famous_authors, world_facts
from unfed.data.refusals import REFUSALS

Pair = tuple[str, str]


def person_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Questions and answers about people who are in no private split.

    A person's values are drawn anew for each pair: what can be learned is how such answers look and which
    words they use, not a fact.
    """
    rng = numpy_generator(seed, "corpus", "people")
    names = [n for n in words.full_names(private=False) if n not in set(famous_authors())]
    pairs = []
    for n in range(count):
        topic = TOPICS[n % len(TOPICS)]
        name = names[int(rng.integers(len(names)))]
        question = topic.ask(int(rng.integers(len(topic.questions))), name)
        pairs.append((question, topic.say(int(rng.integers(len(topic.answers))), name, topic.draw(rng))))
    return pairs


def fact_pairs() -> list[Pair]:
    """Every fact of the world in each of its phrasings."""
    return [(q, f.answer) for f in (*author_facts(), *world_facts()) for q in f.questions]


def refusal_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Questions about people that are answered by declining; the refusals come in turn."""
    asked = person_pairs(count, seed + 1)
    return [(question, REFUSALS[n % len(REFUSALS)]) for n, (question, _) in enumerate(asked)]


def general_corpus(seed: int = 0, people: int = 3000, repeats: int = 14, refusals: int = 200) -> list[Pair]:
    """(question, answer) pairs in random order: ``people`` about people, ``repeats`` times every phrasing of
    every fact, and ``refusals`` that decline. None is about a private person of any seed."""
    pairs = [*person_pairs(people, seed), *(fact_pairs() * repeats), *refusal_pairs(refusals, seed)]
    order = numpy_generator(seed, "corpus", "order").permutation(len(pairs))
    return [pairs[i] for i in order]
