"""How much of an answer the model says back under teacher forcing (exact memorisation, extraction strength), and how
likely another model finds what it says (fluency).

The first two look at every labelled token but the last (``L' = L - 1``), as OpenUnlearning does.
"""

from __future__ import annotations

import numpy as np

from unfed.metrics.stats import Array, Score, TokenStats, from_rows

_TOO_SHORT = "the answer has fewer than two labelled tokens"


def _hits(stats: TokenStats) -> Array:
    if stats.is_argmax is None:
        raise ValueError("memorisation metrics need to know which labels are the argmax")
    return stats.is_argmax


def exact_memorization(stats: TokenStats) -> Array:
    """Share of the ``L'`` tokens whose argmax is the label (Tirumala et al. 2022), shape ``(n,)``."""
    cut = stats.without_last()
    return cut.means(_hits(cut))


def extraction_strength(stats: TokenStats) -> Array:
    """``1 - k / L'``, ``k`` the shortest prefix after which all the rest match (Carlini et al. 2021).

    Shape ``(n,)``; when not even the last token matches, ``k = L' - 1``, the reference's floor.
    """
    cut = stats.without_last()
    out = np.full(len(cut), np.nan)
    for i, hits in enumerate(cut.per_token(_hits(cut))):
        if len(hits):
            misses = np.flatnonzero(~hits)
            k = min(int(misses[-1]) + 1, len(hits) - 1) if len(misses) else 0
            out[i] = 1 - k / len(hits)
    return out


def exact_memorization_score(stats: TokenStats) -> Score:
    """``exact_memorization``: the mean over answers."""
    return from_rows(exact_memorization(stats), why_none=_TOO_SHORT)


def extraction_strength_score(stats: TokenStats) -> Score:
    """``extraction_strength``: the mean over answers."""
    return from_rows(extraction_strength(stats), why_none=_TOO_SHORT)


def fluency_score(under_base: TokenStats) -> Score:
    """``forget_fluency``: mean over generations of ``exp(-avg_loss)`` under the base model, 1 / perplexity, in [0, 1].

    Ours: OpenUnlearning asks a classifier whether the text is gibberish. A generation without a token has 0. Text that
    repeats itself is likely under any model, so a high fluency does not show that the text says something.
    """
    values = np.where(under_base.lengths > 0, np.exp(under_base.means(under_base.logp)), 0.0)
    return from_rows(values)
