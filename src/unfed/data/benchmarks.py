"""The splits of the evaluation suites as data: where their rows lie, and how a row becomes text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from unfed.data.spec import DatasetSpec, Pair

MUSE_SHOTS = ("\n\n", "\nQuestion", "Question:")
"""Where a generated answer ends at the latest: a model that answers after examples goes on with the next question."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a split become text, where that is not the template's plain question and answer.

    ``completion``: question and answer are a text's beginning and its continuation, joined by a space where
    ``insert_space``; no template, no end-of-sequence token, and ``max_length`` counts from the continuation's start.
    ``shots``: questions and answers that precede every question. ``stop``: generated text ends before any of these.
    ``max_length`` and ``max_new_tokens`` (tokens) stand in for the suite's; ``None``: as there.
    """

    completion: bool = False
    insert_space: bool = False
    shots: tuple[Pair, ...] = ()
    stop: tuple[str, ...] = ()
    max_length: int | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class EvaluationSplit:
    """The rows of a split, its layout, and the rows that are shown as examples (``Layout.shots``) if any."""

    data: DatasetSpec
    layout: Layout = Layout()
    shots: DatasetSpec | None = None


def tofu_splits(
    path: str, forget_split: str = "forget10", holdout_split: str | None = None, limit: int | None = None
) -> dict[str, EvaluationSplit]:
    """TOFU (2401.06121): ``forget10`` is scored on ``forget10_perturbed``.

    The holdout rows that TOFU made for ``forget10`` are ``holdout10``. A forget split of another kind of name has a
    holdout only by ``holdout_split``.
    """
    names = {
        "forget": f"{forget_split}_perturbed",
        "retain": "retain_perturbed",
        "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed",
    }
    named = re.fullmatch(r"forget(\d+)", forget_split)
    holdout = holdout_split or (f"holdout{named[1]}" if named else None)
    if holdout is not None:
        names["holdout"] = holdout
    return {split: EvaluationSplit(DatasetSpec(path, name, limit=limit)) for split, name in names.items()}


def muse_splits(path: str, limit: int | None = None) -> dict[str, EvaluationSplit]:
    """MUSE (2407.06460), News or Books by ``path``; lengths and stop words are OpenUnlearning's (d3d7cf9).

    ``verbmem``: the forget texts' beginnings and how they go on. ``forget_qa`` and ``retain_qa``: questions on the
    texts after ten examples. ``forget`` and ``holdout``: whole texts, for membership inference.
    """
    text, answered = Layout(completion=True, max_length=2048), Layout(stop=MUSE_SHOTS, max_new_tokens=32)

    def texts(split: str) -> EvaluationSplit:
        return EvaluationSplit(DatasetSpec(path, "privleak", split, None, "text", limit=limit), text)

    def questions(side: str) -> EvaluationSplit:
        rows = DatasetSpec(path, "knowmem", f"{side}_qa", limit=limit)
        return EvaluationSplit(rows, answered, DatasetSpec(path, "knowmem", f"{side}_qa_icl"))

    return {
        "verbmem": EvaluationSplit(
            DatasetSpec(path, "verbmem", "forget", "prompt", "gt", limit=limit),
            Layout(completion=True, insert_space=True, max_length=2048, max_new_tokens=128),
        ),
        "forget_qa": questions("forget"),
        "retain_qa": questions("retain"),
        "forget": texts("forget"),
        "holdout": texts("holdout"),
    }


def splits_of(
    suite: str, path: str, forget_split: str, holdout_split: str | None = None, limit: int | None = None
) -> dict[str, EvaluationSplit]:
    """The splits of a suite by its name; MUSE has one forget set for each ``path``, TOFU several."""
    return muse_splits(path, limit) if suite == "muse" else tofu_splits(path, forget_split, holdout_split, limit)
