"""Which rows are about what other rows are about."""

from __future__ import annotations

from collections.abc import Sequence

from unfed.base.types import Example


def close_rows(rows: Sequence[Example], topic: Sequence[Example], threshold: float) -> frozenset[str]:
    """Ids of the ``rows`` that are near one of the ``topic`` rows: by the same ``author``, where the rows name one, or
    with a cosine of ``threshold`` or more between the TF-IDF vectors of question and answer (scikit-learn's defaults,
    document frequencies over both)."""
    if not rows or not topic:
        return frozenset()
    from sklearn.feature_extraction.text import TfidfVectorizer

    authors = {e["author"] for e in topic if e.get("author") is not None}
    vectors = TfidfVectorizer().fit_transform([_text(e) for e in (*rows, *topic)])
    nearest = (vectors[: len(rows)] @ vectors[len(rows) :].T).max(axis=1).toarray()[:, 0]
    return frozenset(
        e["id"] for e, value in zip(rows, nearest, strict=True) if value >= threshold or e.get("author") in authors
    )


def _text(row: Example) -> str:
    return f"{row['question']} {row['answer']}"
