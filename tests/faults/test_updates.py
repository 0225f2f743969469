"""Updates that are not what they should be: the same outcome whatever the engine. Such a client counts as absent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from fault_fixtures import Here, story

from unfed.base.artifacts import digest_file
from unfed.base.errors import ClientError, UnfedError
from unfed.base.types import AdapterState, ClientUpdate
from unfed.config.schema import RobustConfig
from unfed.federated.client import Client
from unfed.federated.messages import Message

SCREENED = RobustConfig("screening", max_norm_ratio=10.0)
BAD = "south"
ADAPTER = "adapter_model.safetensors"


def first(tensors: dict) -> str:
    return min(tensors)


def entry(value: float) -> Callable[[dict], dict]:
    def change(tensors):
        name = first(tensors)
        changed = tensors[name].clone()
        changed.view(-1)[3] = value
        return {**tensors, name: changed}

    return change


def renamed(tensors):
    name = first(tensors)
    return {("x." + n if n == name else n): t for n, t in tensors.items()}


def adapter(change: Callable[[dict], dict]) -> Callable[[ClientUpdate], ClientUpdate]:
    return lambda update: dataclasses.replace(update, adapter=AdapterState(change(dict(update.adapter))))


def claiming(count: int) -> Callable[[ClientUpdate], ClientUpdate]:
    return lambda update: dataclasses.replace(update, num_examples=count)


FAULTS = {
    "NaN": (adapter(entry(float("nan"))), "has values that are not finite"),
    "infinite": (adapter(entry(float("inf"))), "has values that are not finite"),
    "another shape": (adapter(lambda t: t | {first(t): t[first(t)][:-1].clone()}), "has shape"),
    "another name": (adapter(renamed), "missing"),
    "a name too few": (adapter(lambda t: {n: v for n, v in t.items() if n != first(t)}), "missing"),
    "a name too many": (adapter(lambda t: t | {"x": torch.ones(2)}), "unknown x"),
    "another dtype": (adapter(lambda t: t | {first(t): t[first(t)].half()}), "is float16, not float32"),
    "a thousandfold norm": (adapter(lambda t: {n: 1000.0 * v for n, v in t.items()}), "times the round's median"),
    "more examples than it has": (claiming(7), "num_examples is 7, and by the partition the client has 6"),
    "no examples": (claiming(0), "num_examples is 0"),
    "fewer than none": (claiming(-6), "num_examples is -6"),
}


def answering(monkeypatch, change: Callable[[ClientUpdate], ClientUpdate]) -> None:
    """One client's updates are changed before they leave it, in either engine."""
    fit = Client.fit

    def changed(self, task, broadcast, client_id):
        update = fit(self, task, broadcast, client_id)
        return change(update) if client_id == BAD else update

    monkeypatch.setattr(Client, "fit", changed)


@pytest.fixture
def without(monkeypatch, in_one_place):
    """The adapter of the run in which that client never answers, and the one in which it is honest."""

    def absent(update):
        raise ClientError("away")

    with monkeypatch.context() as patch:
        answering(patch, absent)
        gone = digest_file(in_one_place("gone", robust=SCREENED) / ADAPTER)
    return gone, digest_file(in_one_place("honest", robust=SCREENED) / ADAPTER)


@pytest.mark.parametrize("engine", ["inprocess", "remote"])
def test_a_bad_update_is_named_and_counts_as_none(engine, without, in_one_place, across, sites, monkeypatch):
    """All faults, one engine: each run ends with the adapter of a run in which the client was away, bit for bit."""
    for name, (change, reason) in FAULTS.items():
        with monkeypatch.context() as patch:
            answering(patch, change)
            place = f"{engine} {name}"
            out = (
                in_one_place(place, robust=SCREENED) if engine == "inprocess" else across(sites, place, robust=SCREENED)
            )
        rounds = story(out)
        assert len(rounds) == 2, name
        for record in rounds:
            assert record["clients"] == ["north", "west"], name
            assert set(record["failures"]) == {BAD}, name
            assert record["failures"][BAD].startswith("update dropped: "), name
            assert reason in record["failures"][BAD], name
        assert digest_file(out / ADAPTER) == without[0] != without[1], name


GARBAGE = {
    "no message": (b"\x80\x04nonsense", "larger than what is taken"),
    "nothing": (b"", "cut short"),
    "another's name": (
        Message({"client": "north", "num_examples": 6, "metrics": {}, "nbytes": None}).pack(),
        "'north'",
    ),
    "no number of examples": (
        Message(
            {"client": BAD, "num_examples": "six", "metrics": {}, "nbytes": None}, {"adapter": AdapterState({})}
        ).pack(),
        "num_examples is str",
    ),
}


def test_an_answer_that_is_no_update_is_named_and_counts_as_none(across, sites, without):
    """Bytes of a site's that are no update never reach the screening."""
    for name, (data, reason) in GARBAGE.items():
        link = Here(sites.sites)
        honest = link.answer

        def answer(client_id, ticket, nbytes, data=data, link=link, honest=honest):
            if client_id == BAD and b'"num_examples"' in link.results[BAD][:4096]:
                link.results[BAD] = data
            return honest(client_id, ticket, nbytes)

        link.answer = answer
        out = across(link, name, robust=SCREENED)
        for record in story(out):
            assert set(record["failures"]) == {BAD} and reason in record["failures"][BAD], name
        assert digest_file(out / ADAPTER) == without[0], name


def test_with_one_client_left_out_too_many_the_run_ends_with_the_reason(monkeypatch, in_one_place):
    answering(monkeypatch, FAULTS["NaN"][0])
    with pytest.raises(UnfedError, match=r"only 2 of 3 clients .* min_clients=3: south: update dropped: .* not finite"):
        in_one_place(method_args={"min_clients": 3})
