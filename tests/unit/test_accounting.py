"""Epsilon against dp-accounting's own accountants, and what they are asked about."""

from __future__ import annotations

import math

import pytest
from dp_accounting import NeighboringRelation, dp_event, pld, rdp

from unfed.base.errors import ArtifactError
from unfed.federated.accounting import Release, Spent, spent

REPLACE = NeighboringRelation.REPLACE_ONE


def by(accountant, *events, delta=1e-5):
    for event, count in events:
        accountant.compose(event, count)
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize("z", [1.5, 4.0])
def test_everyone_in_every_round(z):
    found = spent([Release(z, 5)], 1e-5)
    event = (dp_event.GaussianDpEvent(z), 5)
    assert found.rdp == pytest.approx(by(rdp.RdpAccountant(), event), rel=1e-12)
    assert found.pld == pytest.approx(by(pld.PLDAccountant(), event), rel=1e-12)
    assert found.epsilon == found.pld < found.rdp and found.neighbours == "add_or_remove"


def test_poisson_samples():
    found = spent([Release(1.1, 300, "poisson", 8, 100)], 1e-5)
    event = (dp_event.PoissonSampledDpEvent(0.08, dp_event.GaussianDpEvent(1.1)), 300)
    assert found.rdp == pytest.approx(by(rdp.RdpAccountant(), event), rel=1e-12)
    assert found.pld == pytest.approx(by(pld.PLDAccountant(), event), rel=1e-12)
    assert found.epsilon < spent([Release(1.1, 300)], 1e-5).epsilon / 5, "sampling is what makes DP-SGD affordable"


def test_a_fixed_number_drawn_without_replacement():
    """Accounted for by replacement: the sum moves by two bounds, so the multiplier is half."""
    found = spent([Release(3.0, 10, "fixed", 4, 40)], 1e-5)
    event = (dp_event.SampledWithoutReplacementDpEvent(40, 4, dp_event.GaussianDpEvent(1.5)), 10)
    assert found.rdp == pytest.approx(by(rdp.RdpAccountant(neighboring_relation=REPLACE), event), rel=1e-12)
    assert found.pld is None and found.neighbours == "replace" and found.epsilon == found.rdp


def test_a_replaced_unit_costs_what_half_the_noise_costs():
    """dp-accounting's PLD accountant puts the 2 in itself under replacement, its RDP accountant does not."""
    found = spent([Release(2.0, 5, replace=True)], 1e-5)
    twice = by(pld.PLDAccountant(neighboring_relation=REPLACE), (dp_event.GaussianDpEvent(2.0), 5))
    assert found.pld == pytest.approx(twice, rel=1e-9)
    assert found.rdp == pytest.approx(by(rdp.RdpAccountant(), (dp_event.GaussianDpEvent(1.0), 5)), rel=1e-12)
    assert found.pld < found.rdp, "both bound the same mechanism"


def test_phases_compose():
    phases = [Release(4.0, 3), Release(8.0, 5), Release(4.0, 10, "poisson", 1, 10)]
    events = [
        (dp_event.GaussianDpEvent(4.0), 3),
        (dp_event.GaussianDpEvent(8.0), 5),
        (dp_event.PoissonSampledDpEvent(0.1, dp_event.GaussianDpEvent(4.0)), 10),
    ]
    found = spent(phases, 1e-6)
    assert found.rdp == pytest.approx(by(rdp.RdpAccountant(), *events, delta=1e-6), rel=1e-12)
    assert found.pld == pytest.approx(by(pld.PLDAccountant(), *events, delta=1e-6), rel=1e-12)


def test_the_known_value_of_one_gaussian():
    """Balle and Wang 2018: delta = Phi(1/(2s) - eps s) - e^eps Phi(-1/(2s) - eps s); 0.1269 at s = eps = 1."""
    assert spent([Release(1.0, 1)], 0.126936737507).pld == pytest.approx(1.0, abs=2e-3)


def test_the_ends():
    assert spent([], 1e-5) == Spent(1e-5, "add_or_remove", 0.0, 0.0)
    assert spent([Release(0.0, 1)], 1e-5).epsilon == math.inf
    assert spent([Release(1.0, 1, "poisson", 5, 3)], 1e-5) == spent([Release(1.0, 1)], 1e-5), "a rate above 1 is 1"
    huge = spent([Release(0.005, 3)], 1e-5)
    assert huge.pld is None and huge.epsilon == huge.rdp > 1e4, "the PLD accountant would take gigabytes"
    with pytest.raises(ValueError, match="replacement"):
        spent([Release(1.0, 1, "poisson", 1, 3), Release(1.0, 1, replace=True)], 1e-5)
    release = Release(1.5, 7, "fixed", 3, 9)
    assert Release.read(release.record()) == release
    with pytest.raises(ArtifactError, match="cannot be read"):
        Release.read({"noise": 1})
