"""ROUGE between a generated and a true answer (Lin 2004), by the rouge-score package with its stemmer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, Literal

import numpy as np

from unfed.metrics.stats import Score, from_rows

Kind = Literal["rougeL_recall", "rougeL_f1", "rouge1_recall"]
"""Which of the three is averaged."""


class _Tokens:
    """rouge-score's own tokens and stems; a text that is compared several times, and a word, are stemmed once."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer
        from rouge_score.tokenize import tokenize

        stemmer: Any = PorterStemmer()
        stemmer.stem = lru_cache(1 << 16)(stemmer.stem)
        self.tokenize = lru_cache(256)(lambda text: tokenize(text, stemmer))


@cache
def _scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], tokenizer=_Tokens())


def rouge(answer: str, generation: str) -> dict[str, float]:
    """``rouge1_recall``, ``rougeL_f1`` and ``rougeL_recall`` of a generation against the true answer."""
    found = _scorer().score(answer, generation)
    return {
        "rouge1_recall": float(found["rouge1"].recall),
        "rougeL_f1": float(found["rougeL"].fmeasure),
        "rougeL_recall": float(found["rougeL"].recall),
    }


def rouge_score(
    answers: Sequence[str | Sequence[str]],
    generations: Sequence[str],
    prompts: Sequence[str],
    kind: Kind = "rougeL_recall",
) -> Score:
    """``*_ROUGE``: the mean of ``kind``. Each row shows its three scores, prompt, true answer and generation.

    A row with a list of answers shows lists, and counts with the mean over them.
    """
    rows = [_row(a, g) for a, g in zip(answers, generations, strict=True)]
    mean = from_rows(np.array([np.mean(r[kind]) for r in rows], dtype=np.float64))
    shown = tuple(
        {**r, "input": p, "ground_truth": a, "generation": g}
        for r, p, a, g in zip(rows, prompts, answers, generations, strict=True)
    )
    return Score(mean.value, shown, why=mean.why)


def _row(answer: str | Sequence[str], generation: str) -> dict[str, Any]:
    if isinstance(answer, str):
        return rouge(answer, generation)
    each = [rouge(a, generation) for a in answer]
    return {name: [r[name] for r in each] for name in each[0]}
