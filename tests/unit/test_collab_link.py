"""What a site may answer over NVFlare's calls. Needs NVFlare; its network is in ``test_network.py``."""

from __future__ import annotations

import pytest

pytest.importorskip("nvflare")

from unfed.base.types import AdapterState
from unfed.federated.messages import LARGEST, Message, MessageError
from unfed.federated.nvflare import PIECE, CollabLink, SiteDesk
from unfed.federated.remote import Patience, State


@pytest.fixture
def link():
    """A link whose sites give ``answers`` by method; calls stand in ``calls``."""

    class Answered(CollabLink):
        def __init__(self):
            super().__init__(Patience())
            self.answers, self.calls = {}, []

        def _call(self, client_id, timeout, method, **given):
            self.calls.append((method, given))
            found = self.answers[method]
            return lambda: found(**given) if callable(found) else found

    return Answered()


@pytest.mark.parametrize("nbytes", [True, -1, "7", 2.0, None, LARGEST + 1, float("nan")])
def test_a_state_whose_size_is_none_is_the_sites_fault(link, nbytes):
    link.answers["state"] = ["done", "", nbytes]
    with pytest.raises(MessageError, match="no number that it could be"):
        link.state("site-1", 1, 0.1)
    link.answers["state"] = ("done", "", 7)
    assert link.state("site-1", 1, 0.1) == State("done", "", 7)


def test_a_ticket_is_a_number_and_minus_one_is_no_ticket(link):
    for ticket in ("1", None, 1.5, -2, False):
        link.answers["begin"] = ticket
        with pytest.raises(MessageError):
            link.begin("site-1", Message({}))()
    link.answers["begin"] = -1
    assert link.begin("site-1", Message({}))() == -1


def test_an_answer_comes_in_whole_pieces(link):
    """Or a site could hold a round with a byte at a time."""
    whole = bytes(range(256)) * ((PIECE + 1000) // 256)
    link.answers["answer"] = lambda ticket, offset: whole[offset : offset + PIECE]
    assert link.answer("site-1", 3, len(whole)).read() == whole
    assert [given["offset"] for _, given in link.calls] == [0, PIECE]
    for short in (lambda ticket, offset: whole[offset : offset + 1], lambda ticket, offset: whole, lambda **_: "text"):
        link.answers["answer"] = short
        with pytest.raises(MessageError, match="no message"):
            link.answer("site-1", 3, len(whole)).read()


def test_a_large_message_goes_out_in_pieces_that_make_it_up_again(link):
    import torch

    message = Message({"do": "fit"}, {"adapter": AdapterState({"a": torch.arange(PIECE // 4 + 9.0)})})
    link.answers |= {"put": None, "begin": 5}
    assert link.begin("site-1", message)() == 5
    assert [m for m, _ in link.calls] == ["put", "begin"] and [g["first"] for _, g in link.calls] == [True, False]
    assert b"".join(g["data"] for _, g in link.calls) == message.pack()


def test_only_the_server_may_ask_a_site(monkeypatch):
    from types import SimpleNamespace

    from unfed.federated import nvflare

    desk = SiteDesk(lambda *_: [], lambda _: 100)
    monkeypatch.setattr(nvflare, "collab", SimpleNamespace(caller="site-2"))
    for ask in (lambda: desk.put(b"", True), lambda: desk.begin(b"", True), lambda: desk.answer(1, 0)):
        with pytest.raises(PermissionError, match="only the server may ask"):
            ask()
