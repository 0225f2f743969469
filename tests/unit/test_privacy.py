"""Clipping, noise and the adaptive bound: worked numbers, and what a rule with them does over rounds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from unfed.aggregation.central import BOUND, Central, CentralNoise, Clipping
from unfed.aggregation.fedavg import FedAvg, FedAvgM
from unfed.aggregation.gaussian import clipped, normal, plus_noise
from unfed.aggregation.privacy import CentralPrivacy, LocalPrivacy, build_privacy, privacy_problems
from unfed.base.errors import ConfigError
from unfed.base.types import AdapterState, ClientUpdate, ServerState


def state(*values, name="w", dtype=torch.float32):
    return AdapterState({name: torch.tensor(values, dtype=dtype)})


def updates(*rows):
    return [ClientUpdate(f"c{n}", state(*row), n + 1) for n, row in enumerate(rows)]


def rule(settings, clients, seed=0, cls=FedAvg, rounds=100, **given):
    central = Central(settings, (float(clients),) * rounds, seed)
    return cls(weighting="uniform", filters=(Clipping(central),), noise=CentralNoise(central), **given)


def one_round(aggregator, begin, given):
    return aggregator.advance(begin, aggregator.combine(given, len(given), begin))


QUIET = CentralPrivacy(clip=1.0, noise_multiplier=0.0)


def test_an_update_is_shortened_to_the_bound():
    start = AdapterState({"a": torch.tensor([1.0]), "b": torch.tensor([0.0])})
    update = AdapterState({"a": torch.tensor([4.0]), "b": torch.tensor([4.0])})
    short, length = clipped(start, update, 1.0)
    assert length == 5.0, "over all tensors together"
    assert short["a"].item() == pytest.approx(1.6) and short["b"].item() == pytest.approx(0.8)
    same, _ = clipped(start, update, 5.0)
    assert same is update


def test_what_cannot_be_clipped_is_not_let_through():
    start = AdapterState({"w": torch.zeros(1), "n": torch.tensor(3)})
    update = AdapterState({"w": torch.tensor([0.5]), "n": torch.tensor(1000)})
    for bound in (0.1, 1.0):
        assert clipped(start, update, bound)[0]["n"].item() == 3


def test_the_sum_is_divided_by_who_was_expected_not_by_who_came():
    """Two of four clients answer, with clipped updates 1 and 0.5: 1.5 / 4."""
    begin = ServerState(0, state(10.0))
    after = one_round(rule(QUIET, 4), begin, updates([13.0], [10.5]))
    assert after.adapter["w"].item() == pytest.approx(10.0 + 1.5 / 4)


def test_weights_are_equal_whatever_the_rule_says():
    begin = ServerState(0, state(0.0))
    by_examples = replace(rule(QUIET, 2), weighting="examples")
    assert one_round(by_examples, begin, updates([0.2], [0.6])).adapter["w"].item() == pytest.approx(0.4)


def test_the_noise_has_the_stated_size():
    """``z * clip / expected`` = 3 * 0.5 / 10 on every value; the seed and the round decide it."""
    settings, begin = CentralPrivacy(clip=0.5, noise_multiplier=3.0), AdapterState({"w": torch.zeros(40_000)})
    given = [ClientUpdate(f"c{n}", begin, 1) for n in range(10)]
    ends = [one_round(rule(settings, 10, seed), ServerState(r, begin), given).adapter["w"] for seed, r in
            ((0, 0), (0, 0), (1, 0), (0, 1))]  # fmt: skip
    assert float(ends[0].std()) == pytest.approx(0.15, rel=0.02) and abs(float(ends[0].mean())) < 0.003
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2]) and not torch.equal(ends[0], ends[3])


def test_secure_noise_is_normal_and_is_never_drawn_twice():
    draws = normal(torch.Size([200_000]), None)
    assert float(draws.mean()) == pytest.approx(0.0, abs=0.01) and float(draws.std()) == pytest.approx(1.0, rel=0.01)
    assert float((draws.abs() < 1).double().mean()) == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.005)
    settings, begin = CentralPrivacy(secure_noise=True), ServerState(0, state(0.0, 0.0))
    one, two = (one_round(rule(settings, 1), begin, updates([0.1, 0.1])).adapter["w"] for _ in range(2))
    assert not torch.equal(one, two)


def test_what_did_not_train_gets_no_noise():
    begin = AdapterState({"a": torch.ones(3), "b": torch.zeros(3)})
    central = Central(CentralPrivacy(), (1.0,), 0)
    combined = FedAvg(weighting="uniform").combine([ClientUpdate("c", begin, 1)], 1)
    after = CentralNoise(central)(combined, ServerState(0, begin), frozenset({"b"}))
    assert torch.equal(after.adapter["a"], begin["a"]) and float(after.adapter["b"].abs().min()) > 0


def test_noise_comes_before_the_optimizer():
    """Momentum acts on the noised mean: two rounds of FedAvgM move by d, then by 0.9 d + d'."""
    settings, begin = CentralPrivacy(clip=1.0, noise_multiplier=1.0), ServerState(0, state(0.0))
    noised, with_momentum = rule(settings, 1), rule(settings, 1, cls=FedAvgM, momentum=0.9)
    first = one_round(noised, begin, updates([0.3])).adapter["w"].item()
    mine = one_round(with_momentum, begin, updates([0.3]))
    assert mine.adapter["w"].item() == pytest.approx(first)
    stay = [ClientUpdate("c0", mine.adapter, 1)]
    second = one_round(noised, ServerState(1, mine.adapter), stay).adapter["w"].item() - first
    assert one_round(with_momentum, mine, stay).adapter["w"].item() == pytest.approx(
        first + 0.9 * first + second, rel=1e-5
    )


# --- adaptive clipping ------------------------------------------------------------------------------------------------


def test_the_bound_moves_to_the_quantile_by_hand():
    """Lengths 0.5, 2, 3, 4 at bound 1: a quarter is within, so C = exp(-0.2 (0.25 - 0.5))."""
    settings = CentralPrivacy(clip=1.0, noise_multiplier=0.0, adaptive=True)
    after = one_round(rule(settings, 4), ServerState(0, state(0.0)), updates([0.5], [2.0], [3.0], [4.0]))
    assert float(after.opt_state[BOUND]["clip"]) == pytest.approx(math.exp(0.05), rel=1e-12)
    at = float(after.adapter["w"])
    again = one_round(rule(settings, 4), after, updates(*([at + d] for d in (0.5, 1.01, 3.0, 4.0))))
    assert float(again.opt_state[BOUND]["clip"]) == pytest.approx(math.exp(0.05), rel=1e-12), "half is within now"
    assert again.adapter["w"].item() - after.adapter["w"].item() == pytest.approx((0.5 + 1.01 + 2 * math.exp(0.05)) / 4)


def test_the_bound_finds_the_median_through_noise():
    settings = CentralPrivacy(clip=0.01, noise_multiplier=0.0, adaptive=True)
    noisy = replace(settings, noise_multiplier=0.5, bit_noise=2.0)
    lengths = [0.5 + 0.05 * n for n in range(40)]
    for given, tolerance in ((settings, 0.1), (noisy, 0.5)):
        now, aggregator = ServerState(0, state(0.0)), rule(given, 40)
        for _ in range(100):
            at = float(now.adapter["w"])
            now = one_round(aggregator, now, [ClientUpdate(f"c{n}", state(at + d), 1) for n, d in enumerate(lengths)])
        assert float(now.opt_state[BOUND]["clip"]) == pytest.approx(1.475, abs=tolerance)


def test_the_noisy_count_and_the_noisier_sum_cost_one_gaussian():
    """Two Gaussian mechanisms of multipliers z_D and 2 sigma_b cost 1 / sqrt(z_D^-2 + (2 sigma_b)^-2)."""
    settings = CentralPrivacy(noise_multiplier=1.0, adaptive=True)
    assert settings.count_noise(100) == 5.0 and settings.count_noise(3) == 1.0
    for clients in (3, 100):
        both = settings.update_multiplier(clients) ** -2 + (2 * settings.count_noise(clients)) ** -2
        assert both**-0.5 == pytest.approx(1.0)
    assert settings.update_multiplier(3) == pytest.approx((1 - 0.25) ** -0.5)
    assert CentralPrivacy(noise_multiplier=1.0).update_multiplier(3) == 1.0
    with pytest.raises(ConfigError, match=r"must be above 0\.5, half of privacy\.noise_multiplier"):
        CentralPrivacy(noise_multiplier=1.0, adaptive=True, bit_noise=0.5).update_multiplier(3)


# --- local, and the settings ------------------------------------------------------------------------------------------


def test_noise_on_a_client_keeps_dtype_and_buffers():
    given = AdapterState({"w": torch.zeros(20_000, dtype=torch.bfloat16), "n": torch.tensor(3)})
    out = plus_noise(given, 0.5, torch.Generator().manual_seed(0))
    assert out["w"].dtype == torch.bfloat16 and out["n"].item() == 3
    assert float(out["w"].float().std()) == pytest.approx(0.5, rel=0.02)
    assert plus_noise(given, 0.0, None) is given


def test_settings_are_checked_by_name():
    assert build_privacy("local", {"clip": 0.5}) == LocalPrivacy(clip=0.5)
    assert "did you mean 'central'" in privacy_problems("centrall", {})[0]
    assert privacy_problems("central", {"clip": 0.0, "delta": 1.0, "noise": 1.0}) == [
        "privacy.clip: must be a number above 0, not 0.0",
        "privacy.delta: must be a number above 0 and below 1, not 1.0",
        next(p for p in privacy_problems("central", {"noise": 1.0})),
    ]
    assert "noise_multiplier" in privacy_problems("central", {"noise": 1.0})[0]
    assert privacy_problems("local", {"adaptive": True})[0].startswith("privacy.adaptive: LocalPrivacy has no such")
