"""Errors that end in one readable message and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UnfedError(Exception):
    """Something the user can mend. The command line prints the message alone and exits with 2."""


class ConfigError(UnfedError):
    """Every problem found in a configuration, reported together."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        head = (
            "The configuration has a problem:"
            if len(self.problems) == 1
            else (f"The configuration has {len(self.problems)} problems:")
        )
        super().__init__("\n".join([head, *(f"  - {p}" for p in self.problems)]))


class DataError(UnfedError):
    """A data file or data set that cannot be used; names the file, and the line where there is one."""


class AdapterError(UnfedError):
    """An adapter that does not fit: other names, shapes, base model or rank."""


class ArtifactError(UnfedError):
    """A file under the run directory that is missing, altered, or cannot be written."""


class WriteError(ArtifactError):
    """A file that cannot be written: the disk is full, the place is not writable."""


class ClientError(Exception):
    """A client failed in this round. The round survives it; never reaches the user as an exit."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'? (choices: a, b, c)"`` for an unknown name.

    The suggestion is left out when nothing is close; the list is cut after twelve names.
    """
    names = sorted(str(c) for c in choices)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    lowered = {n.lower(): n for n in names}
    if not close and str(name).lower() in lowered:
        close = [lowered[str(name).lower()]]
    hint = f"; did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"{hint} (choices: {shown})" if shown else hint
