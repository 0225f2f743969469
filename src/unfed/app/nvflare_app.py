"""What a job runs, at the server and at the sites, and an administrator's session. Jobs carry settings and no code:
these classes are named in a job's configuration and are installed, and allowed, at every party."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from nvflare.collab import collab  # pyright: ignore[reportMissingImports]
from nvflare.fuel.flare_api import api_spec  # pyright: ignore[reportMissingImports]
from nvflare.fuel.flare_api.flare_api import new_secure_session  # pyright: ignore[reportMissingImports]

from unfed.base.errors import UnfedError
from unfed.config.site import SITE_FILE, ServerFile, SiteFile, below, read_site_file
from unfed.federated.nvflare import CollabLink, SiteDesk

log = logging.getLogger("unfed")
_DENIED = re.compile(r"is not authorized for '(\w+)'")


class Server:
    """The server's part of a job: the rounds. ``config``: :func:`unfed.app.rundir.plain` of a run, JSON in base64;
    ``sites``: those that it was submitted for."""

    def __init__(self, config: str, sites: list[str]) -> None:
        self._config, self._sites = config, sites

    @collab.main
    def run(self) -> None:
        """Called by NVFlare. What goes wrong stands in the job's log, and the job is shown as failed."""
        from unfed.app.network_fleet import NetworkFleet, patience_of
        from unfed.app.runs import run
        from unfed.app.worker import read_config

        with _logged():
            try:
                config = read_config(json.loads(base64.b64decode(self._config)))
                place = Path(collab.workspace.get_site_config_dir()) / SITE_FILE
                outputs = read_site_file(place, ServerFile).outputs
                if not below(outputs, config.paths.output_dir):
                    raise UnfedError(f"{config.paths.output_dir} is not below {outputs} (outputs of {place})")
                link = CollabLink(patience_of(config))
                if lacking := sorted(set(self._sites) - set(link.sites())):
                    raise UnfedError(f"{', '.join(lacking)}: gone when the job began; submit it again once it is back")
                run(config, NetworkFleet(link, link.sites()))
            except UnfedError as e:
                log.error("error: %s", e)
                raise


class Site(SiteDesk):
    """A site's part of a job: it passes messages to its own process and back."""

    def __init__(self) -> None:
        super().__init__(_command, _largest)


def _command(name: str, place: Path) -> list[str]:
    return [sys.executable, "-m", "unfed.app.site", name, str(place / SITE_FILE)]


def _largest(place: Path) -> int:
    return read_site_file(place / SITE_FILE, SiteFile).largest


class _LogStream(io.TextIOBase):
    """Lines into the job's log."""

    def write(self, text: str) -> int:
        for line in filter(None, (part.rstrip() for part in text.split("\n"))):
            log.info(line)
        return len(text)


@contextmanager
def _logged() -> Iterator[None]:
    """What is said to the user goes to the log, of which the administrator can ask for the end."""
    from unfed.app.progress import console

    logging.getLogger("nvflare.collab").setLevel(logging.WARNING)  # a line for every question that is asked
    before = console.file
    console.file = _LogStream()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        console.file = before


@contextmanager
def session(kit: Path) -> Iterator[Any]:
    """An administrator's session with the server; ``kit``: the startup kit of an administrator or member.

    NVFlare's errors become ``UnfedError`` in words of what can be done.
    """
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            opened = new_secure_session(kit.name, str(kit))
    except Exception as e:
        raise UnfedError(_why(kit, e)) from e
    try:
        yield opened
    except (api_spec.AuthorizationError, api_spec.AuthenticationError) as e:
        what = _DENIED.search(str(e))
        raise UnfedError(
            f"{kit.name} may not do that (see the role of its kit): {what[1] if what else _line(e)}"
        ) from e
    except api_spec.JobNotFound as e:
        raise UnfedError(f"{_line(e)}; unfed network status lists the jobs") from e
    except api_spec.JobNotRunning as e:
        raise UnfedError(_line(e)) from e
    except api_spec.InvalidJobDefinition as e:
        raise UnfedError(f"{type(e).__name__}: {_line(e)}") from e
    except (api_spec.NoConnection, api_spec.SessionClosed, api_spec.InternalError, api_spec.NoReply) as e:
        raise UnfedError(f"the server ended the session: {_line(e)}") from e
    finally:
        opened.close()


def _why(kit: Path, error: Exception) -> str:
    """The reason why no session came about."""
    if isinstance(error, api_spec.AuthenticationError) or "certificate" in str(error).lower():
        return (
            f"the server does not accept the certificate in {kit / 'startup'}: is the kit of this network, and valid?"
        )
    return (
        f"no session with the server ({_line(error)}): does it run, is its host reachable, and is {kit} the kit of an "
        "administrator of this network whose certificate is valid?"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def said_by(opened: Any, job: str) -> list[str]:
    """What a job's server has said so far, without NVFlare's own lines."""
    found = opened.get_job_logs(job).get("logs", {})
    text = found.get("server", "") if isinstance(found, Mapping) else str(found)
    parts = (line.split(" - ", 3) for line in str(text).splitlines())
    return [p[-1] for p in parts if len(p) == 4 and p[1] == log.name]
