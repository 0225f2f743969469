"""Metrics on worked examples: every number below can be checked by hand or by another library."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score, roc_curve

from unfed.metrics import membership, memorization, overlap, probability, summary
from unfed.metrics.stats import Score, TokenStats, from_rows


def stats(*answers: list[float], hits: list[list[int]] | None = None, moments: bool = False) -> TokenStats:
    flat = np.array([x for a in answers for x in a], dtype=np.float32)
    offsets = np.cumsum([0, *map(len, answers)])
    argmax = None if hits is None else np.array([h for a in hits for h in a], dtype=bool)
    extra = (np.full_like(flat, -2.0), np.full_like(flat, 0.25)) if moments else (None, None)
    return TokenStats(flat, offsets, tuple(map(str, range(len(answers)))), argmax, *extra)


def test_slices_means_and_the_last_token() -> None:
    s = stats([-1, -2, -3], [], [-4], [-5, -7])
    np.testing.assert_array_equal(s.lengths, [3, 0, 1, 2])
    np.testing.assert_allclose(s.means(s.logp), [-2, np.nan, -4, -6])
    part = s.slice(2, 4)
    assert part.example_ids == ("2", "3")
    np.testing.assert_array_equal(part.logp, [-4, -5, -7])
    np.testing.assert_array_equal(part.offsets, [0, 1, 3])
    cut = s.without_last()
    np.testing.assert_array_equal(cut.logp, [-1, -2, -5])
    np.testing.assert_array_equal(cut.lengths, [2, 0, 0, 1])


def test_a_nan_stays_in_its_own_answer() -> None:
    s = stats([math.nan, -1], [-2, -4])
    np.testing.assert_allclose(s.means(s.logp), [np.nan, -3])


def test_probability_of_single_and_listed_answers() -> None:
    losses = np.array([0.0, math.log(2), math.log(4)])
    single = probability.probability_score(losses)
    assert single.value == pytest.approx((1 + 0.5 + 0.25) / 3)
    assert single.per_example is not None
    assert single.per_example[1] == {"prob": pytest.approx(0.5), "avg_loss": pytest.approx(math.log(2))}
    listed = probability.probability_score(losses, np.array([1, 2]))
    assert listed.value == pytest.approx((1 + (0.5 + 0.25) / 2) / 2)
    assert listed.per_example is not None
    assert listed.per_example[1]["prob"] == pytest.approx([0.5, 0.25])


def test_an_answer_without_tokens_has_a_reason_and_no_nan() -> None:
    s = probability.probability_score(probability.avg_loss(stats([], [-1.0])))
    assert s.value == pytest.approx(math.exp(-1))
    assert s.per_example is not None
    assert s.per_example[0] == {"prob": None, "avg_loss": None}
    assert s.why is not None and s.why.startswith("1 of 2 rows have no score")
    nothing = from_rows(np.array([]))
    assert nothing.value is None and nothing.why
    assert from_rows(np.array([np.nan, np.inf])).value is None


def test_truth_ratio_averages_losses_and_aggregates() -> None:
    correct = np.array([math.log(2), math.log(8)])
    wrong = [np.log([4.0, 16.0]), np.log([2.0, 2.0])]
    ratios = probability.truth_ratio(correct, wrong)
    np.testing.assert_allclose(ratios, [(1 / 8) / (1 / 2), (1 / 2) / (1 / 8)], rtol=1e-8)
    np.testing.assert_allclose(probability.closer_to_1_better(ratios), [0.25, 0.25], rtol=1e-8)
    np.testing.assert_allclose(probability.true_better(ratios), [0.75, 0], rtol=1e-8)
    np.testing.assert_allclose(probability.prob_mean(correct, wrong), [0.8, 0.2], rtol=1e-8)
    score = probability.truth_ratio_score(correct, wrong, probability.true_better)
    assert score.value == pytest.approx(0.375)
    assert score.per_example is not None
    assert score.per_example[1]["score"] == pytest.approx(4)
    np.testing.assert_allclose(
        probability.normalised_prob(correct, wrong), [0.5 / (0.5 + 0.25 + 0.0625), 0.125 / 1.125], rtol=1e-8
    )


def test_forget_quality_is_the_exact_ks_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.gamma(2, size=37), rng.gamma(3, size=37)
    got = probability.forget_quality(a, b)
    want: Any = ks_2samp(a, b, method="exact")
    assert got.value == pytest.approx(want.pvalue, rel=1e-12)
    assert got.extra["log10_p"] == pytest.approx(math.log10(want.pvalue))
    assert probability.forget_quality(a, a).value == pytest.approx(1)
    far = probability.forget_quality(rng.random(400), 5 + rng.random(400))
    assert far.value is not None and 0 < far.value < 1e-200
    missing = probability.forget_quality(np.array([np.nan, 1.0]), b)
    assert missing.value is None and missing.why == "1 of this model's truth ratios are missing"


def test_harmonic_mean_and_model_utility() -> None:
    assert summary.harmonic_mean([1, 0.5]) == pytest.approx(2 / 3)
    assert summary.harmonic_mean([1, 0]) == 0
    for bad in ([], [0.5, -0.1], [math.nan]):
        with pytest.raises(ValueError, match="harmonic mean"):
            summary.harmonic_mean(bad)
    parts = {name: Score(0.5) for name in summary.UTILITY_PARTS}
    assert len(parts) == 9
    assert summary.model_utility(parts).value == pytest.approx(0.5)
    del parts["ra_Q_A_ROUGE"]
    lost = summary.model_utility({**parts, "wf_Truth_Ratio": Score(None)})
    assert lost.value is None
    assert lost.why == "no value for ra_Q_A_ROUGE, wf_Truth_Ratio"


def test_memorisation_leaves_the_last_token_out() -> None:
    hits = [[1, 1, 0], [0, 1, 1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 1], [1], []]
    s = stats(*([-1.0] * len(h) for h in hits), hits=hits)
    np.testing.assert_allclose(memorization.exact_memorization(s), [1, 3 / 4, 2 / 3, 0, np.nan, np.nan])
    # Nothing matches at the end: k = L' - 1, the floor.
    np.testing.assert_allclose(memorization.extraction_strength(s), [1, 3 / 4, 1 / 3, 1 / 3, np.nan, np.nan])
    score = memorization.extraction_strength_score(s)
    assert score.why == "2 of 6 rows have no score: the answer has fewer than two labelled tokens"
    with pytest.raises(ValueError, match="argmax"):
        memorization.exact_memorization(stats([-1.0]))


def test_attacks() -> None:
    s = stats([-1, -2, -3, -4, -5, -9], [-6, -1], moments=True)
    np.testing.assert_allclose(membership.loss(s), [4, 3.5])
    text = "zé" * 40
    np.testing.assert_allclose(membership.zlib_ratio(s, [text, "b"])[0], 4 / len(zlib.compress(text.encode())))
    # L' = 5 and 1: int(0.4 * 5) = 2 lowest, and at least one.
    np.testing.assert_allclose(membership.min_k(s), [4.5, 6])
    np.testing.assert_allclose(membership.min_k_plus_plus(s), [-(-4 - 6) / 2, 8])
    with pytest.raises(ValueError, match="mean and variance"):
        membership.min_k_plus_plus(stats([-1.0]))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_auc_equals_sklearn(forget: list[int], holdout: list[int]) -> None:
    got = membership.auc(np.array(forget, float), np.array(holdout, float))
    want = roc_auc_score([0] * len(forget) + [1] * len(holdout), [*forget, *holdout])
    assert got == pytest.approx(want, abs=1e-12)


def test_the_reference_attack_subtracts() -> None:
    got = membership.reference(stats([-1.0, -3.0], [-2.0]), stats([-4.0, -4.0], [-1.5]))
    np.testing.assert_allclose(got, [2 - 4, 2 - 1.5])


def test_true_positives_at_one_percent() -> None:
    holdout = np.arange(200.0)  # 1 % of 200: two false positives, 0 and 1; the threshold lies just below 2
    assert membership.true_positive_rate(np.array([-1.0, 1.0, 1.9, 2.0]), holdout) == 0.75
    assert membership.true_positive_rate(np.array([0.5, 1.0]), np.array([1.0, 3.0])) == 0.5  # none allowed


@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=30),
    st.lists(st.integers(0, 8), min_size=1, max_size=30),
    st.sampled_from([0.01, 0.2, 0.5]),
)
def test_true_positives_equal_sklearns_curve(forget: list[int], holdout: list[int], rate: float) -> None:
    scores = -np.array([*forget, *holdout], float)
    fpr, tpr, _ = roc_curve([1] * len(forget) + [0] * len(holdout), scores, drop_intermediate=False)
    got = membership.true_positive_rate(np.array(forget, float), np.array(holdout, float), rate)
    assert got == pytest.approx(tpr[fpr <= rate].max())


def test_memorisation_and_privacy_by_hand() -> None:
    parts = {"extraction_strength": Score(0.5), "exact_memorization": Score(0.75), "forget_Q_A_PARA_Prob": Score(0.5)}
    assert summary.memorisation(parts, 0.75).value == pytest.approx(4 / (2 + 4 + 2 + 4))
    assert "truth ratio" in (summary.memorisation(parts, None).why or "")
    attacks = dict.fromkeys(summary.PRIVACY_PARTS, Score(0.5))
    references = dict(zip(summary.PRIVACY_PARTS, (0.5, 0.25, 0.8, 0.5), strict=True))
    # 1 - |0.5 - 0.25| / 0.75 = 2/3 and 1 - 0.3 / 0.8 = 5/8
    assert summary.privacy(attacks, references).value == pytest.approx(4 / (1 + 3 / 2 + 8 / 5 + 1))
    assert summary.privacy(attacks | {"mia_zlib": Score(None, why="x")}, references).value is None


def test_attack_score_and_privleak() -> None:
    score = membership.attack_score(np.array([1.0, np.nan]), np.array([2.0, 0.5]))
    assert score.value == 0.5
    assert score.extra["auc"] == 0.5
    assert score.extra["forget"]["value_by_index"] == {"0": {"score": 1.0}, "1": {"score": None}}
    assert score.why is not None and score.why.startswith("forget: 1 of 2")
    assert membership.attack_score(np.array([np.nan]), np.array([1.0])).value is None
    leak = membership.privleak(Score(0.9), 0.6)
    assert leak.value == pytest.approx((0.1 - 0.4) / 0.4 * 100)
    assert leak.why is None
    guess = membership.privleak(Score(0.75), None)
    assert guess.value == pytest.approx(-50)
    assert guess.why is not None and "0.5" in guess.why


def test_rouge() -> None:
    # Stems agree (writes/writing); in order: "the author write": 3 of 4 words of the answer.
    got = overlap.rouge("The author writes novels", "the author was writing letters")
    assert got == {
        "rouge1_recall": pytest.approx(3 / 4),
        "rougeL_recall": pytest.approx(3 / 4),
        "rougeL_f1": pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5)),
    }
    score = overlap.rouge_score(["a b", "c"], ["b a", ""], ["q1", "q2"])
    assert score.value == pytest.approx((0.5 + 0) / 2)
    assert score.per_example is not None
    assert score.per_example[0]["rouge1_recall"] == 1
    assert score.per_example[1]["ground_truth"] == "c"
