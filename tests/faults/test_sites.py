"""Sites that are killed, slow, gone or different: without a network, the site's own processes where they matter.

Over a real network: ``test_network_faults.py``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest
import yaml
from fault_fixtures import Here, rounds_done, story, until

from unfed.base.artifacts import digest_file
from unfed.base.errors import ClientError, UnfedError
from unfed.federated.child import Child, Desk
from unfed.federated.remote import State

ADAPTER = "adapter_model.safetensors"
SLOW = "south"


class Gone(Here):
    """One site, asked in round ``number``, answers no question; ``asked``: how often it was."""

    def __init__(self, sites, number: int, found) -> None:
        super().__init__(sites)
        self.number, self.found, self.asked, self.round = number, found, 0, None

    def begin(self, client_id, message):
        self.round = message.head.get("round")
        return super().begin(client_id, message)

    def state(self, client_id, ticket, wait):
        if client_id == SLOW and self.round == self.number:
            self.asked += 1
            return self.found(wait)
        return super().state(client_id, ticket, wait)


def working(wait):
    time.sleep(wait)
    return State("working")


def no_answer(wait):
    raise ClientError("no answer to state within 5 s")


def test_a_site_slower_than_the_deadline_is_left_out_of_that_round_alone(across, sites):
    out = across(Gone(sites.sites, 0, working), timeout=3.0)
    rounds = story(out)
    assert rounds[0]["failures"] == {SLOW: "it was not done after 3 s"} and rounds[0]["clients"] == ["north", "west"]
    assert rounds[1]["failures"] == {} and rounds[1]["clients"] == ["north", "south", "west"]


def test_a_site_that_leaves_two_questions_unanswered_is_gone_for_that_round_alone(across, sites):
    link = Gone(sites.sites, 0, no_answer)
    rounds = story(across(link))
    reason = "it does not answer any more (no answer to state within 5 s)"
    assert rounds[0]["failures"] == {SLOW: reason} and link.asked == 2
    assert rounds[1]["clients"] == ["north", "south", "west"]


def test_a_site_that_is_gone_in_every_round_changes_nothing_else(across, sites, in_one_place, monkeypatch):
    """The adapter of the two others; with ``min_clients`` at three the run ends and says why."""
    from unfed.federated.client import Client

    link = Gone(sites.sites, 0, no_answer)
    found = across(link, name="one round", method_args={"global_rounds": 1})
    fit = Client.fit

    def away(self, task, broadcast, client_id):
        if client_id == SLOW:
            raise ClientError("away")
        return fit(self, task, broadcast, client_id)

    monkeypatch.setattr(Client, "fit", away)
    assert digest_file(found / ADAPTER) == digest_file(in_one_place(method_args={"global_rounds": 1}) / ADAPTER)
    monkeypatch.undo()
    strict = {"global_rounds": 1, "min_clients": 3}
    with pytest.raises(UnfedError, match=r"only 2 of 3 clients .* min_clients=3: south: it does not answer any more"):
        across(Gone(sites.sites, 0, no_answer), name="strict", method_args=strict)


def test_another_base_model_at_a_site_is_refused_before_a_round(across, sites, site_file, make_base, tmp_path):
    from unfed.app.site import Site

    other = make_base(tmp_path / "other", seed=1)
    sites.sites[SLOW] = Site(SLOW, site_file(SLOW, base_model=str(other)))
    with pytest.raises(
        UnfedError, match=r"south has another base model than the server: its weights: \w+, the server's"
    ):
        across(sites)
    assert not (tmp_path / "net").exists(), "nothing was begun"


@pytest.fixture
def with_process(sites, site_file, tmp_path, repo_root):
    """The same link with one site's part in a process of its own, and that process."""
    file = tmp_path / "kit" / "local" / "unfed.yml"
    file.parent.mkdir(parents=True)
    own = site_file(SLOW)
    said = {"data_dir": own.data_dir, "base_model": own.base_model, "datasets": list(own.datasets)}
    file.write_text(yaml.safe_dump(said), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(repo_root / "src")}
    child = Child([sys.executable, "-m", "unfed.app.site", SLOW, str(file)], environment)
    sites.sites[SLOW] = Desk(child)
    yield sites, child
    child.stop()


def test_a_worker_that_is_killed_is_named_and_replaced_for_the_next_round(across, with_process, tmp_path):
    """Stopped first, so that the kill meets it in the middle of its round, then killed."""
    link, child = with_process
    found: list[dict] = []

    def go():
        found.extend(story(across(link, timeout=200.0, method_args={"global_rounds": 30})))

    run = threading.Thread(target=go)
    run.start()
    place = tmp_path / "net"
    until(lambda: rounds_done(place) >= 2, 200, "two rounds")
    pid = child.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    before = None
    while before != (done := rounds_done(place)):  # until the server has been waiting for it for a second
        before = done
        time.sleep(1.0)
    assert before < 30, "it was stopped within the run"
    os.kill(pid, signal.SIGKILL)
    run.join(250)
    assert not run.is_alive()
    assert len(found) == 30
    lost = {r["round"]: r["failures"] for r in found if r["failures"]}
    assert lost == {before: {SLOW: "its training process ended (signal 9)"}}
    assert found[before]["clients"] == ["north", "west"]
    assert found[-1]["clients"] == ["north", "south", "west"]
    assert child.pid not in {None, pid}
