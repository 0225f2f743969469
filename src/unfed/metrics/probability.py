"""Metrics of an answer's probability: Prob, normalised Prob, truth ratio, forget quality (TOFU, 2401.06121).

The definitions are those of OpenUnlearning (2506.12618): an answer's probability is ``exp(-avg_loss)``, the
geometric mean over its tokens, end-of-sequence token included. Losses are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from unfed.metrics.stats import Array, Score, TokenStats, as_rows, from_rows, number

EPSILON = 1e-10
"""Keeps the reference's quotients finite; part of the definitions."""


def avg_loss(stats: TokenStats) -> Array:
    """Mean negative log-likelihood of each answer, shape ``(n,)``; NaN without tokens."""
    return -stats.means(stats.logp)


def prob(losses: Array) -> Array:
    """``exp(-avg_loss)``, the length-normalised probability of each answer."""
    return np.exp(-losses)


def probability_score(losses: Array, counts: Array | None = None) -> Score:
    """``*_Prob``: mean over a row's answers, then over rows.

    ``losses`` has one entry for each answer. ``counts`` groups them by row (the result file then shows lists);
    ``None`` says one answer a row (plain numbers).
    """
    if counts is None:
        score = from_rows(prob(losses))
        rows = [{"prob": number(np.exp(-x)), "avg_loss": number(x)} for x in losses]
    else:
        groups = as_rows(losses, counts)
        score = from_rows(np.array([np.exp(-g).mean() if len(g) else np.nan for g in groups]))
        rows = [{"prob": [number(np.exp(-x)) for x in g], "avg_loss": [number(x) for x in g]} for g in groups]
    return Score(score.value, tuple(rows), why=score.why)


def normalised_prob(correct: Array, wrong: list[Array]) -> Array:
    """``p / (p + sum_j p_j + 1e-10)`` of the right answer against its wrong options, shape ``(n,)``.

    ``correct`` ``(n,)`` and ``wrong`` (one array for each row) are losses.
    """
    right = prob(correct)
    return right / (right + np.array([prob(w).sum() for w in wrong]) + EPSILON)


def normalised_score(correct: Array, wrong: list[Array]) -> Score:
    """``*_Prob_normalised``: the mean of :func:`normalised_prob`."""
    return from_rows(normalised_prob(correct, wrong), key="prob")


def truth_ratio(correct: Array, wrong: list[Array]) -> Array:
    """``exp(-mean_j loss_j) / (exp(-loss_correct) + 1e-10)``, shape ``(n,)``.

    The mean over wrong answers is taken on losses: a geometric mean of probabilities.
    """
    mean_wrong = np.array([w.mean() if len(w) else np.nan for w in wrong])
    return prob(mean_wrong) / (prob(correct) + EPSILON)


def closer_to_1_better(ratios: Array) -> Array:
    """``min(tr, 1 / (tr + 1e-10))``: how the forget set's truth ratio is aggregated."""
    return np.minimum(ratios, 1 / (ratios + EPSILON))


def true_better(ratios: Array) -> Array:
    """``max(0, 1 - tr)``: how the other sets' truth ratios are aggregated."""
    return np.maximum(0, 1 - ratios)


def prob_mean(correct: Array, wrong: list[Array]) -> Array:
    """``c / (c + w + 1e-10)``: the truth ratio as a share, for the memorisation score (Mem)."""
    mean_wrong = prob(np.array([w.mean() if len(w) else np.nan for w in wrong]))
    return prob(correct) / (prob(correct) + mean_wrong + EPSILON)


def truth_ratio_score(correct: Array, wrong: list[Array], aggregate: Callable[[Array], Array]) -> Score:
    """``*_truth_ratio``: each row shows its ratio; the value is the mean of ``aggregate(ratios)``."""
    ratios = truth_ratio(correct, wrong)
    return from_rows(aggregate(ratios), per_row=ratios)


def forget_quality(ratios: Array, retain_ratios: Array) -> Score:
    """p-value of the exact two-sided Kolmogorov-Smirnov test between truth ratios ``(n,)`` and ``(m,)``.

    1: the model's truth ratios on the forget set look like those of a model that never saw it. ``extra`` has
    log10 p (``None`` when p underflows to 0) and the KS distance. No value when a ratio is missing.
    """
    from scipy.stats import ks_2samp  # costs half a second to import

    if not len(ratios) or not len(retain_ratios):
        return Score(None, why="there are no truth ratios to compare")
    for name, values in (("this model's", ratios), ("the retain model's", retain_ratios)):
        if not np.isfinite(values).all():
            return Score(None, why=f"{int((~np.isfinite(values)).sum())} of {name} truth ratios are missing")
    # The reference compares 1 / (tr + 1e-10); the order is the same up to ties among huge ratios.
    test: Any = ks_2samp(1 / (ratios + EPSILON), 1 / (retain_ratios + EPSILON), method="auto")
    p = float(test.pvalue)
    extra = {"log10_p": float(np.log10(p)) if p > 0 else None, "ks_distance": float(test.statistic)}
    return Score(p, higher_is_better=True, extra=extra)
