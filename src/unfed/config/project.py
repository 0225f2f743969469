"""``PROJECT.yml``: the parties of a network, from which certificates and startup kits are made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from unfed.base.errors import ConfigError, nearest
from unfed.base.params import STRICT
from unfed.config.site import read_settings

LONGEST_DAYS = 360
"""Of a party's certificate, whatever the authority's: NVFlare's own limit."""
LONGEST_NAME = 64
"""Of a certificate's common name (X.520), and of what becomes a folder."""
LARGEST_PORT = 2**16 - 1
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_HOST = re.compile(r"([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?\.)*[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?")
_PERSON = re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}")
_ORGANISATION = re.compile(r"[A-Za-z0-9_]+")
SERVER_NAME = "server"
"""NVFlare's name for the server in a job, whatever its host is called."""


@dataclass(frozen=True)
class Project:
    """``PROJECT.yml``: ``host`` and ``port`` at which the sites reach the server; ``sites``, ``admins`` (may submit
    jobs) and ``members`` (may look on) by name. ``valid_days``: of the network's own certificate authority, and of
    all certificates that are made with it. ``organisations``: by the name of a party, in its certificate."""

    __pydantic_config__: ClassVar[Any] = STRICT
    name: str
    host: str
    sites: tuple[str, ...]
    port: int = 8002
    admins: tuple[str, ...] = ("admin@example.org",)
    members: tuple[str, ...] = ()
    valid_days: int = 360
    organisations: Mapping[str, str] = field(default_factory=dict)

    @property
    def parties(self) -> tuple[str, ...]:
        """The names of all of them, the server's first."""
        return (self.host, *self.sites, *self.admins, *self.members)


def read_project(path: Path) -> Project:
    """``ConfigError`` with every problem."""
    project = read_settings(path, Project)
    if problems := [f"{path}: {p}" for p in (*_names(project), *_limits(project))]:
        raise ConfigError(problems)
    return project


def _names(project: Project) -> Iterator[str]:
    if _NETWORK.fullmatch(project.name) is None:
        yield f"{project.name!r} is no name (letters, digits, '-', '_', '.')"
    if _HOST.fullmatch(project.host) is None:
        yield f"host={project.host!r}: must be the name of a machine or its IPv4 address, without port or https://"
    for site in project.sites:
        if _SITE.fullmatch(site) is None:
            yield f"{site!r} is no name of a site (letters, digits, '-', '_')"
        elif site.lower() == SERVER_NAME:
            yield f"sites: {site} is the server's name in every job; take another"
    for person in (*project.admins, *project.members):
        if _PERSON.fullmatch(person) is None:
            yield f"{person!r} must look like an e-mail address"


def _limits(project: Project) -> Iterator[str]:
    if not project.sites or not project.admins:
        yield "a network has a site and an administrator at least"
    for name in (project.name, *project.parties):
        if len(name) > LONGEST_NAME:
            yield f"{name[:20]}...: a name has at most {LONGEST_NAME} characters, and this one {len(name)}"
    lowered = [n.lower() for n in project.parties]  # names of folders, which not every system tells apart by case
    for name in sorted({n for n in project.parties if lowered.count(n.lower()) > 1}):
        yield f"{name} stands there twice"
    if not 1 <= project.port <= LARGEST_PORT:
        yield f"port={project.port}: must be from 1 to {LARGEST_PORT}"
    if not 1 <= project.valid_days <= LONGEST_DAYS:
        why = f"a party's certificate lasts {LONGEST_DAYS} days at most"
        yield f"valid_days={project.valid_days}: must be from 1 to {LONGEST_DAYS} ({why})"
    for party, organisation in project.organisations.items():
        if party not in project.parties:
            yield f"organisations: {party} is no party{nearest(party, project.parties)}"
        if _ORGANISATION.fullmatch(organisation) is None:
            yield f"organisations: {organisation!r} is no name (letters, digits, '_')"
