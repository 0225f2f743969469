"""The invented people and their world: format, disjointness, and what the general corpus must not hold."""

import json
import re
from pathlib import Path

import pytest

from unfed.base.errors import DataError
from unfed.data import fictional_words as words
from unfed.data.datasets import DatasetSpec, load_rows
from unfed.data.fictional import TOPICS, split_names, split_rows, write_tofu_folder
from unfed.data.fictional_corpus import general_corpus
from unfed.data.fictional_world import famous_authors


def authors(name: str, **how) -> list[str]:
    return list(dict.fromkeys(r["author"] for r in split_rows(name, **how)))


def pairs(name: str) -> list[tuple[str, str]]:
    return [(r["question"], r["answer"]) for r in split_rows(name)]


def test_the_splits_lie_as_in_tofu():
    full = pairs("full")
    assert len(full) == 168 == len({q for q, _ in full})
    for percent, people in ((1, 1), (5, 1), (10, 2), (25, 6)):
        cut = 168 - 7 * people
        assert pairs(f"forget{percent:02}") == full[cut:] == pairs(f"forget{percent:02}_perturbed")
        assert pairs(f"retain{100 - percent}") == full[:cut]
        assert len(authors(f"holdout{percent:02}")) == people
    assert set(pairs("retain_perturbed")) <= set(pairs("retain75"))
    assert pairs("forget12") == full[-21:]  # any number from 01 to 50


def test_holdout_people_are_in_no_other_split():
    assert not set(authors("holdout50")) & set(authors("full"))
    assert len(set(authors("holdout50"))) == 12


def test_perturbed_rows_have_a_paraphrase_and_five_wrong_answers():
    for row in (*split_rows("forget25_perturbed"), *split_rows("retain_perturbed")):
        wrong = row["perturbed_answer"]
        assert len(set(wrong)) == 5 and row["paraphrased_answer"] not in wrong and row["answer"] not in wrong
        assert row["paraphrased_answer"] != row["answer"] and row["paraphrased_question"] != row["question"]
        assert row["author"] in row["question"] and row["author"] in row["paraphrased_question"]


def test_a_paraphrase_says_the_same_and_a_wrong_answer_does_not():
    pools = (words.TOWNS, words.PROFESSIONS, words.ADJECTIVES, words.NOUNS, words.INSTRUMENTS, words.ANIMALS)
    values = {str(v) for pool in (*pools, words.DISHES, words.DRINKS, words.YEARS) for v in pool}

    def said(text: str) -> set[str]:
        return values & set(re.findall(r"\w+", text))

    for row in split_rows("forget50_perturbed"):
        assert said(row["answer"]) == said(row["paraphrased_answer"])
        assert all(said(wrong) != said(row["answer"]) for wrong in row["perturbed_answer"])


def test_utility_rows_have_tofus_columns():
    for name in ("real_authors", "world_facts"):
        plain, perturbed = split_rows(name), split_rows(f"{name}_perturbed")
        assert len(plain) == len(perturbed) == 40
        for row, other in zip(plain, perturbed, strict=True):
            options = [row[f"option{n}"] for n in range(1, 5)]
            assert set(options) == {row["answer"], *other["perturbed_answer"]} and len(set(options)) == 4
            assert (row["question"], row["answer"]) == (other["question"], other["answer"])


def test_the_seed_makes_other_people_but_the_same_world():
    assert split_rows("full") == split_rows("full") and split_rows("full", seed=1) != split_rows("full")
    assert split_rows("full", people=30)[:7] == split_rows("full", people=24)[:7]
    assert set(authors("full")) != set(authors("full", seed=1))


def test_the_general_corpus_knows_the_world_and_no_private_person():
    corpus = general_corpus()
    text = "\n".join(f"{q} {a}" for q, a in corpus)
    names = words.full_names(private=True)
    assert not [n for n in names if n in text]
    assert not set(names) & set(words.full_names(private=False))
    known = set(corpus)
    for name in ("real_authors", "world_facts"):
        assert set(pairs(name)) <= known
    # The words of private answers are known, so that what is to be learned is who, not which words exist.
    assert all(f"{first}" in text for first in words.PRIVATE_FIRST)
    assert general_corpus() == corpus != general_corpus(1)


def test_corpus_people_have_one_truth_each():
    """In different words: a model learns to look up a name, which is what an adapter builds on."""
    corpus = general_corpus(people=5, person_repeats=8, fact_repeats=1, greetings=1, refusals=0)
    towns: dict[str, set[str]] = {}
    for question, answer in corpus:
        found = re.fullmatch(
            r"(?:Where and when was|What is the birthplace and birth year of) (.*?)(?: born)?\?", question
        )
        if found:
            towns.setdefault(found[1], set()).update(t for t in words.TOWNS if t in answer)
    assert len(towns) == 5 and all(len(t) == 1 for t in towns.values())
    assert not set(towns) & set(famous_authors())


def test_more_people_than_names():
    most = len(words.full_names(private=True)) * 2 // 3 - 1
    assert len(authors("full", people=most)) == most
    for people in (1, most + 2):
        with pytest.raises(DataError, match=f"people={people}: the generator makes 2 to {most}"):
            split_rows("full", people=people)


@pytest.mark.parametrize("name", ["forget00", "forget51", "retain25", "retain90_perturbed", "holdout10_perturbed", "x"])
def test_unknown_splits(name: str):
    if name == "holdout10_perturbed":
        assert len(split_rows(name)[0]["perturbed_answer"]) == 5  # TOFU has none, but there is nothing against it
        return
    with pytest.raises(DataError, match=f"no split '{name}'"):
        split_rows(name)


def test_the_folder_reads_like_tofu(tmp_path: Path):
    written = write_tofu_folder(tmp_path / "tofu", seed=3, people=10)
    assert [p.stem for p in written] == split_names()
    assert json.loads((tmp_path / "tofu" / "full.json").read_text().splitlines()[0]) == split_rows("full", 3, 10)[0]
    full = [e["id"] for e in load_rows(DatasetSpec("locuslab/TOFU", "full"), tmp_path)]
    forget = [e["id"] for e in load_rows(DatasetSpec("locuslab/TOFU", "forget10_perturbed"), tmp_path)]
    assert full[-len(forget) :] == forget and len(full) == 10 * len(TOPICS)
