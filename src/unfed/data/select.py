"""Rows by what they are about: all rows of a person, or those near some words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from unfed.base.errors import DataError, nearest
from unfed.base.types import Example
from unfed.data.partition import people_of

_CAPITALISED = r"[^\W\d_a-zß-öø-ÿ][^\W\d][\w'’.-]*"
_NAME = re.compile(rf"\b{_CAPITALISED}(?: (?:(?!of|in|is|the|and|or)[a-z]{{2,3}} )?{_CAPITALISED})+")
"""Two or more capitalised words, with a short particle between (``von``, ``al``)."""
MAIN_SHARE = 0.5
"""A person is meant who has at least this share of the rows that the most named one has with the name in them."""


def rows_of_author(name: str, rows: Sequence[Example]) -> list[int]:
    """Numbers of all rows of the person called ``name``, also of those that do not say the name.

    Whose row each is, is what ``partition=author`` goes by (:func:`unfed.data.partition.people_of`). With a column
    ``author`` it holds the name. Without, rows are looked at that name the person in question or answer, as whole
    words; people who are named in passing in somebody else's rows do not make those theirs (:data:`MAIN_SHARE`).

    Raises ``DataError`` with the nearest names when there is no such person.
    """
    people, wanted = people_of(rows), _folded(name)
    owners = {p for p in people if isinstance(p, str) and _folded(p) == wanted}
    if not owners and wanted:
        said = re.compile(rf"(?<![\w-]){re.escape(wanted)}(?![\w-])")
        named = Counter(p for p, row in zip(people, rows, strict=True) if said.search(_folded(_text(row))))
        owners = {p for p, n in named.items() if n >= MAIN_SHARE * max(named.values())}
    if not owners:
        raise DataError(f"no row is about {name!r}{nearest(name, author_names(rows))}")
    return [n for n, p in enumerate(people) if p in owners]


def author_names(rows: Sequence[Example]) -> list[str]:
    """The people's names: the column ``author``, else the name that most of a person's rows say, as far as it shows."""
    people = people_of(rows)
    if all("author" in row for row in rows):
        return sorted({str(p) for p in people})
    said: dict[Any, Counter[str]] = {}
    for person, row in zip(people, rows, strict=True):
        found = {_bare(m) for text in (row["question"], row["answer"]) for m in _NAME.findall(text)}
        said.setdefault(person, Counter()).update(n for n in found if " " in n)
    return sorted({c.most_common(1)[0][0] for c in said.values() if c})


def _bare(name: str) -> str:
    """A run of capitalised words without a question word before it, a possessive or a full stop behind it."""
    first, _, rest = name.partition(" ")
    name = rest if first in {"Who", "What", "How", "In", "The", "Is", "Does", "Has", "Can", "When", "Where"} else name
    return re.sub(r"['’]s?$", "", name.rstrip(".-"))


def _text(row: Example) -> str:
    return f"{row['question']} {row['answer']}"


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def topic_scores(topics: Sequence[str], rows: Sequence[Example]) -> np.ndarray:
    """Cosine of each row's words to each topic's: shape ``(len(topics), len(rows))``, between 0 and 1.

    TF-IDF with scikit-learn's defaults: words of two letters at least, in any case, document frequencies over the
    rows. Raises ``DataError`` for a topic of which no word is in any row.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer()
    vectors = vectorizer.fit_transform([_text(row) for row in rows])
    own = csr_matrix(vectorizer.transform(topics))
    for topic, known in zip(topics, own.getnnz(axis=1), strict=True):
        if not known:
            words = vectorizer.build_analyzer()(topic)
            close = nearest(words[0], vectorizer.vocabulary_).partition(" (choices")[0] if words else ""
            raise DataError(f"no row has a word of the topic {topic!r}{close}")
    return (own @ vectors.T).toarray()
