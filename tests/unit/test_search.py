"""A search: proposals follow from what is known and from nothing else, and what was proposed is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from unfed.app.search import Objective, Proposals, Scored, Search, score, study, suggest
from unfed.app.sweep import Row
from unfed.base.errors import ConfigError, UnfedError
from unfed.config.sweep import Choice, Span, run_name
from unfed.config.sweep_runs import SweepRun
from unfed.report.contents import Cost

SPACE = {
    "method": Choice(("NPO", "GradDiff")),
    "lr": Span(1e-4, 1e-2, log=True),
    "r": Span(1, 7, integer=True, step=3),
    "seed": Choice(("0", "1", "2")),
}
BOTH = (Objective("model_utility", True), Objective("forget_Q_A_Prob", False))


@pytest.fixture
def search():
    pytest.importorskip("optuna")
    return lambda trials=4, seed=0, space=SPACE, objectives=BOTH: Search(space, objectives, trials, seed)


def known(search, count, rank=2.0):
    """A history of proposals whose utility is higher for GradDiff, and whose forget score is the rate."""
    history = []
    for _ in range(count):
        values = suggest(search, history)
        history.append(Scored(values, (rank * (values["method"] == "GradDiff"), float(values["lr"]))))
    return history


def test_proposals_lie_in_the_space_and_follow_from_the_history(search):
    history = known(search(), 14)
    assert known(search(), 14) == history
    assert known(search(seed=1), 3) != history[:3]
    for found in history:
        assert found.values.keys() == {"method", "lr", "r"}, "the seed is repeated, not searched"
        assert 1e-4 <= float(found.values["lr"]) <= 1e-2 and found.values["r"] in {"1", "4", "7"}
    failed = [Scored(h.values, None) for h in history]
    assert suggest(search(), failed).keys() == history[0].values.keys(), "failures alone are no reason to stop"


def test_a_later_search_prefers_what_scored_well(search):
    one = search(objectives=BOTH[:1])
    history = []
    for _ in range(25):
        values = suggest(one, history)
        history.append(Scored(values, (float(values["method"] == "GradDiff"),)))
    later = [h.values["method"] for h in history[15:]]
    assert later.count("GradDiff") >= 8


def test_the_best_of_two_objectives_are_those_that_none_beats(search):
    values = [{"method": "NPO", "lr": "0.001", "r": r} for r in ("1", "4", "7")]
    history = [Scored(values[0], (0.9, 0.5)), Scored(values[1], (0.5, 0.1)), Scored(values[2], (0.4, 0.2))]
    assert [t.number for t in study(search(), history).best_trials] == [0, 1]


def row(values, *, status="finished", **metrics):
    cost = Cost(seconds=2.0, rounds=3, bytes_up=10, bytes_down=20, aggregation_error=None)
    return Row(run_name(values), values, Path(run_name(values)), status, cost=cost, metrics=metrics)


def test_a_proposal_scores_the_median_over_its_seeds():
    rows = [row({"seed": str(n)}, model_utility=u) for n, u in enumerate((0.1, 0.9, 0.3))]
    objectives = (Objective("model_utility", True), Objective("bytes", False))
    assert score(rows, objectives) == (0.3, 30.0)
    assert score([*rows, row({"seed": "3"}, status="failed")], objectives) is None
    assert score(rows, BOTH) is None, "none of them has the second metric"


def carried_out(search, directory, stop=None):
    """Runs every proposal with a made-up score; the names of the runs that were asked for."""
    proposals = Proposals(search, directory, lambda v: SweepRun(run_name(v), v, config=None))
    ran = []
    for run in proposals:
        if len(ran) == stop:
            return ran, proposals
        ran.append(run.name)
        scores = {"model_utility": float(run.values["lr"]), "forget_Q_A_Prob": 0.1}
        proposals.report(row(run.values, **scores))
    return ran, proposals


def test_a_search_that_was_cut_short_goes_on_as_if_it_had_not_been(search, tmp_path):
    whole, proposals = carried_out(search(3), tmp_path / "whole")
    assert len(whole) == 9, "three proposals with three seeds each"
    assert len(proposals.history) == 3 and all(h.scores for h in proposals.history)
    best = max(proposals.history, key=lambda h: float(h.values["lr"]))
    assert proposals.best() == [best]
    carried_out(search(3), tmp_path / "cut", stop=4)
    assert carried_out(search(3), tmp_path / "cut")[0] == whole
    assert carried_out(search(4), tmp_path / "cut")[0][:9] == whole, "more proposals go on from the same ones"


def test_another_search_in_the_same_place_is_refused(search, tmp_path):
    carried_out(search(1), tmp_path)
    with pytest.raises(UnfedError, match="another space, seed or objective"):
        carried_out(search(1, seed=1), tmp_path)


def test_a_proposal_that_cannot_be_composed_is_a_row(search, tmp_path):
    def refuse(values):
        raise ConfigError([f"no {values['method']} with this"])

    proposals = Proposals(search(2, space={"method": SPACE["method"]}), tmp_path, refuse)
    rows = []
    for found in proposals:
        rows.append(found)
        proposals.report(found)
    assert {(r.status, r.exit_code) for r in rows} == {("failed", 2)} and "with this" in rows[0].reason
    assert [h.scores for h in proposals.history] == [None, None]


def test_a_search_needs_something_to_search_for(search):
    with pytest.raises(UnfedError, match="no objective"):
        search(objectives=())
    with pytest.raises(UnfedError, match="only seed is swept"):
        search(space={"seed": SPACE["seed"]})


def test_without_optuna_the_search_says_what_to_install(monkeypatch):
    monkeypatch.setattr("unfed.app.search.find_spec", lambda _: None)
    with pytest.raises(UnfedError, match=r"unfed\[sweep\]"):
        Search(SPACE, BOTH, 1)
