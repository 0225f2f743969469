"""Topics: clusters of rows whose words are alike."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unfed.base.errors import DataError
from unfed.base.seeding import derive_seed
from unfed.base.types import Example

STARTS = 4
"""k-means runs from that many starts and keeps the tightest clustering."""
NAMED_BY = 3
"""Words in a topic's name."""


@dataclass(frozen=True)
class Topic:
    """``words``: the heaviest in the topic's centre, by weight; ``ids``: of its rows, in data order."""

    words: str
    ids: tuple[str, ...]


def default_topics(rows: int, clients: int) -> int:
    """How many topics, where nobody said: the square root of half the rows (Mardia, Kent and Bibby 1979,
    "Multivariate Analysis", p. 365), but two for each client, and no more than there are rows."""
    return min(rows, max(2 * clients, math.ceil(math.sqrt(rows / 2))))


def find_topics(examples: Sequence[Example], count: int, seed: int) -> tuple[Topic, ...]:
    """Cut the rows into ``count`` topics, the largest first; each row is in exactly one.

    k-means (scikit-learn, k-means++ starts) on the unit TF-IDF vectors of question and answer, English stop words
    left out: the squared Euclidean distance of two rows is 2 minus twice their cosine. Fewer topics come back where
    the rows have fewer than ``count`` different texts. Depends on the arguments alone: one thread computes,
    because several would add up in an order of their own.

    Raises ``DataError`` for a ``count`` below 1 or above the number of rows, and for rows without a word.
    """
    if not 1 <= count <= len(examples):
        raise DataError(f"partition.topics={count} with {len(examples)} rows to deal: use 1 to {len(examples)}")
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from threadpoolctl import threadpool_limits

    vectorizer = TfidfVectorizer(stop_words="english")
    try:
        vectors = vectorizer.fit_transform([f"{e['question']} {e['answer']}" for e in examples])
    except ValueError as e:  # "empty vocabulary"
        raise DataError(
            f"no topics can be found in the {len(examples)} rows to deal: their questions and answers have no word "
            "of two letters or more beside English stop words; use partition=author or partition=iid"
        ) from e
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than topics: said above
        start = derive_seed(seed, "partition", "topics") % 2**32
        fitted = KMeans(count, n_init=STARTS, random_state=start).fit(vectors)  # type: ignore[arg-type]
    words = vectorizer.get_feature_names_out()
    found = []
    for k, centre in enumerate(fitted.cluster_centers_):
        rows = np.flatnonzero(fitted.labels_ == k).tolist()
        order = np.argsort(-centre, kind="stable")[:NAMED_BY].tolist()
        heaviest = [str(words[w]) for w in order if centre[w] > 0]
        if rows:
            found.append(Topic(" ".join(heaviest) or "no word", tuple(examples[i]["id"] for i in rows)))
    return tuple(sorted(found, key=lambda t: -len(t.ids)))
