"""What tests of runs across sites share: the sites' rows, and a link to sites in this process."""

from __future__ import annotations

import dataclasses
import io

import pytest

SITES = ("north", "south", "west")


class Here:
    """A link to sites in this process; what they are told and answer passes through bytes."""

    def __init__(self, sites):
        self.sites, self.told, self.results = sites, [], {}

    def begin(self, client_id, message):
        from unfed.federated.messages import Message

        self.told.append((client_id, Message.unpack(message.pack())))
        self.results[client_id] = self.sites[client_id].answer(self.told[-1][1]).pack()
        return lambda: 0

    def state(self, client_id, ticket, wait):
        from unfed.federated.remote import State

        return State("done", nbytes=len(self.results[client_id]))

    def answer(self, client_id, ticket, nbytes):
        return io.BytesIO(self.results[client_id])


def rows_of(root, name):
    return (root / "tofu" / f"{name}.json").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="session")
def site_data(tmp_path_factory, small_data):
    """Each site's data root: six rows each; north and west have three of the six forget rows."""
    full, forget = rows_of(small_data, "full"), set(rows_of(small_data, "forget01"))
    dealt = {"north": full[:3] + full[12:15], "south": full[3:9], "west": full[9:12] + full[15:]}
    roots = {}
    for name, own in dealt.items():
        roots[name] = tmp_path_factory.mktemp(name)
        (roots[name] / "tofu").mkdir()
        sets = {
            "full": own,
            "forget01": [r for r in own if r in forget],
            "retain99": [r for r in own if r not in forget],
        }
        for split, lines in sets.items():
            if lines:
                (roots[name] / "tofu" / f"{split}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return roots


@pytest.fixture(scope="session")
def fleet(site_data, small_base):
    """Makes a fleet of three sites and the link to them; ``changed``: entries of a site's file by its name."""
    from unfed.app.network_fleet import NetworkFleet
    from unfed.app.site import Site
    from unfed.config.site import SiteFile

    def make(changed=None, **same):
        files = {n: SiteFile(str(r), str(small_base), ("locuslab/TOFU",), **same) for n, r in site_data.items()}
        for name, other in (changed or {}).items():
            files[name] = dataclasses.replace(files[name], **other)
        link = Here({name: Site(name, file) for name, file in files.items()})
        return NetworkFleet(link, SITES), link

    return make
