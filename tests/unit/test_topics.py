"""Rows by topic: the clusters, dealing them whole or spread, and the manifest that remembers them."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unfed.base.errors import DataError
from unfed.base.seeding import numpy_generator
from unfed.data.dealers import DEALERS
from unfed.data.partition import Partition, PartitionSpec, make_partition
from unfed.data.topics import default_topics, find_topics

SUBJECTS = {"whales": "whale ocean krill fin", "bread": "oven flour yeast crust", "chess": "rook bishop gambit pawn"}


def rows(each: int = 5) -> list[dict]:
    """``each`` rows about each of three subjects that share no word, one subject after the other in turn."""
    made = []
    for n in range(each):
        for name, words in SUBJECTS.items():
            one = words.split()
            made.append({"id": f"{name}{n}", "question": f"{one[n % 4]} {one[(n + 1) % 4]}", "answer": f"{words}"})
    return made


def test_rows_that_share_words_are_one_topic_named_by_its_words():
    found = find_topics(rows(), 3, seed=0)
    assert {frozenset(t.ids) for t in found} == {frozenset(f"{name}{n}" for n in range(5)) for name in SUBJECTS}
    for topic in found:
        assert set(topic.words.split()) <= set(SUBJECTS[topic.ids[0][:-1]].split())
        assert len(topic.words.split()) == 3
    assert found == find_topics(rows(), 3, seed=0)


def test_the_largest_topic_comes_first_and_equal_texts_are_not_torn_apart():
    same = [{"id": f"s{n}", "question": "oven", "answer": "flour"} for n in range(6)]
    data = [*same, {"id": "w", "question": "whale", "answer": "krill"}]
    found = find_topics(data, 4, seed=1)
    assert [t.ids for t in found] == [tuple(r["id"] for r in same), ("w",)], "two different texts: two topics, not four"


@pytest.mark.parametrize(
    ("count", "clients", "said"), [(4000, 3, 45), (168, 3, 10), (50, 10, 20), (6, 5, 6), (1, 1, 1)]
)
def test_how_many_topics_where_nobody_said(count, clients, said):
    assert default_topics(count, clients) == said == min(count, max(2 * clients, math.ceil(math.sqrt(count / 2))))


def test_rows_without_a_word_have_no_topics():
    with pytest.raises(DataError, match="no topics can be found in the 3 rows to deal"):
        find_topics([{"id": str(n), "question": "a", "answer": "the of"} for n in range(3)], 2, seed=0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 8), st.integers(0, 5))
def test_whole_topics_are_dealt_as_evenly_as_the_largest_allows(sizes, clients, seed):
    topic_of = [g for g, size in enumerate(sizes) for _ in range(size)]
    everything = list(range(len(topic_of)))
    if len(sizes) < clients:
        with pytest.raises(DataError, match=f"{len(sizes)} topics are too few for {clients} clients"):
            DEALERS["topic"](everything, topic_of, clients, 0.5, numpy_generator(seed))
        return
    dealt = DEALERS["topic"](everything, topic_of, clients, 0.5, numpy_generator(seed))
    assert sorted(i for own in dealt for i in own) == everything
    assert all(len({c for c, own in enumerate(dealt) if g in {topic_of[i] for i in own}}) == 1 for g in topic_of)
    lengths = [len(own) for own in dealt]
    assert min(lengths) > 0
    assert max(lengths) - min(lengths) <= max(sizes)


def test_the_longest_topic_goes_first():
    """7, 5, 4, 3, 1 to two clients: 7; 5; 5 + 4; 7 + 3; 9 + 1, so 10 and 10."""
    topic_of = [g for g, size in enumerate([4, 7, 1, 5, 3]) for _ in range(size)]
    dealt = DEALERS["topic"](list(range(20)), topic_of, 2, 0.5, numpy_generator(0))
    assert {frozenset(topic_of[i] for i in own) for own in dealt} == {frozenset({1, 4}), frozenset({3, 0, 2})}


@pytest.mark.parametrize("spec", [
    PartitionSpec("topic", topics=3), PartitionSpec("topic", topics=9), PartitionSpec("target", "topic", topics=6),
    PartitionSpec("dirichlet", over="topic", topics=3), PartitionSpec("target", "dirichlet", over="topic", topics=3),
])  # fmt: skip
def test_topics_are_in_the_manifest_and_every_row_has_one_owner_and_one_topic(spec, tmp_path: Path):
    data, forget = rows(8), ["chess1", "bread2"]
    made = make_partition(data, 3, spec, forget, seed=3)
    everything = sorted(r["id"] for r in data)
    assert sorted(i for own in made.clients.values() for i in own) == everything
    assert sorted(i for t in made.topics for i in t.ids) == everything
    assert made == make_partition(data, 3, spec, forget, seed=3)
    made.write(tmp_path / "partition.json")
    assert Partition.read(tmp_path / "partition.json") == made
    if spec.scheme == "topic":
        assert all(len({made.owner(i) for i in t.ids}) == 1 for t in made.topics)


def test_little_alpha_gives_a_topic_to_one_client_and_much_gives_each_its_share():
    data = rows(40)

    def largest_share(alpha: float) -> float:
        """Mean over topics of the largest share that one client has of the topic's rows."""
        made = make_partition(data, 4, PartitionSpec("dirichlet", alpha=alpha, over="topic", topics=3))
        shares = [max(sum(made.owner(i) == c for i in t.ids) for c in made.clients) / len(t.ids) for t in made.topics]
        return sum(shares) / len(shares)

    assert largest_share(1e-3) > 0.9
    assert largest_share(1e4) < 0.5


def test_new_rows_bring_their_topics_where_the_old_ones_have_some():
    old = make_partition(rows(3), 2, PartitionSpec("topic", topics=3))
    more = [{**r, "id": f"new-{r['id']}"} for r in rows(2)]
    grown = old.extended(make_partition(more, 2, PartitionSpec("topic", topics=3)))
    assert sorted(i for t in grown.topics for i in t.ids) == sorted(r["id"] for r in (*rows(3), *more))
    assert old.extended(make_partition(more, 2, PartitionSpec("iid"))).topics == ()
