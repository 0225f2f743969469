"""Round checkpoints: safetensors and JSON, one directory a round, renamed into place when whole."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unfed.base.artifacts import (
    atomic_dir,
    digest_file,
    read_sealed,
    read_tensors,
    write_sealed,
    write_tensors,
)
from unfed.base.errors import ArtifactError, UnfedError
from unfed.base.types import SERVER, ServerState

log = logging.getLogger(__name__)
_NAME = re.compile(r"round_(\d{5})")
_MISSING = object()
RESIDUAL_FILE = "residual.safetensors"


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round. Digests are of the server's adapter; bytes are of tensors sent, both ways.

    ``metrics``: by client whose update was used: loss, steps, seconds, bytes and what else it told. ``notes``: what
    robust rules and clipping did, by their name (see :class:`unfed.base.types.Combined`). ``simulated_seconds``: how
    long the round lasted under ``clients.*``, where that simulates speeds.
    """

    round: int
    phase: str
    clients: tuple[str, ...]
    failures: Mapping[str, str]
    num_examples: int
    adapter_before: str
    adapter_after: str
    bytes_down: int
    bytes_up: int
    seconds: float
    aggregation_error: float | None
    error_is_estimate: bool
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    simulated_seconds: float | None = None

    @property
    def loss(self) -> float | None:
        """Mean of the clients' mean training losses, if any client reported one."""
        losses = [m["loss"] for c, m in self.metrics.items() if "loss" in m and c != SERVER]
        return sum(losses) / len(losses) if losses else None


class Checkpoints:
    """The rounds of one run under ``directory/checkpoints``; the last ``keep`` stay, and each ``every``-th (``None``:
    no other)."""

    def __init__(self, directory: Path, config: Mapping[str, Any], keep: int = 2, every: int | None = None) -> None:
        self._root = directory / "checkpoints"
        self._config = dict(config)
        self._keep, self._every = max(1, keep), every

    def save(self, state: ServerState, records: list[RoundRecord]) -> None:
        """Write ``state`` (after ``state.round`` rounds) and all records so far."""
        with atomic_dir(self._root / f"round_{state.round:05d}") as part:
            write_tensors(part / "adapter.safetensors", state.adapter)
            if state.base_residual is not None:
                write_tensors(part / RESIDUAL_FILE, state.base_residual)
            for slot, values in state.opt_state.items():
                write_tensors(part / f"opt_{slot}.safetensors", values)
            files = {f.name: digest_file(f) for f in sorted(part.glob("*.safetensors"))}
            body = {
                "round": state.round,
                "files": files,
                "config": self._config,
                "records": [asdict(r) for r in records],
            }
            write_sealed(part / "state.json", body)
        # Later rounds are of a run that could not be resumed: they would push out the rounds of this one.
        own = f"round_{state.round:05d}"
        rounds = self._rounds()
        here = [d for d in rounds if d.name <= own]
        kept = here[-self._keep :] + [d for d in here if self._every and number_of(d) % self._every == 0]
        for old in rounds:
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)

    def exist(self) -> bool:
        """Whether any round was saved."""
        return bool(self._rounds())

    def finished(self) -> int:
        """How many rounds the newest whole checkpoint has; 0 where there is none. Tensors are not read."""
        for directory in reversed(self._rounds()):
            with contextlib.suppress(ArtifactError, KeyError, OSError):
                files = _manifest(directory)["files"]
                if all(digest_file(directory / name) == digest for name, digest in files.items()):
                    return number_of(directory)
        return 0

    def latest(self) -> tuple[ServerState, list[RoundRecord]] | None:
        """The newest whole checkpoint; a truncated or altered one is passed over with a warning.

        Raises ``UnfedError`` naming the keys when it was written with another configuration.
        """
        for directory in reversed(self._rounds()):
            try:
                found = self._read(directory)
            except ArtifactError as e:
                log.warning("checkpoint %s is not whole, using the round before: %s", directory.name, e)
                continue
            return found
        return None

    def check(self) -> None:
        """Raise ``UnfedError`` when the newest checkpoint belongs to another configuration. Opens one small file.

        Only the keys of this object's own configuration are compared, so this can be asked before a model is loaded.
        """
        for directory in reversed(self._rounds()):
            try:
                stored = _manifest(directory)["config"]
                known = {k: stored[k] for k in self._config if k in stored}
            except (ArtifactError, KeyError, TypeError):
                continue
            self._refuse_other(known)
            return

    def _refuse_other(self, stored: Any) -> None:
        if differing := differing_keys(stored, self._config):
            raise UnfedError(
                "resume=true, but the run was started with another configuration: "
                + "; ".join(differing[:8])
                + ". Give the same overrides, or start afresh with overwrite=true"
            )

    def _rounds(self) -> list[Path]:
        if not self._root.is_dir():
            return []
        return sorted(d for d in self._root.iterdir() if _NAME.fullmatch(d.name))

    def _read(self, directory: Path) -> tuple[ServerState, list[RoundRecord]]:
        manifest = _manifest(directory)
        try:
            files, config, raw = manifest["files"], manifest["config"], manifest["records"]
            number = int(manifest["round"])
        except (KeyError, TypeError, ValueError) as e:
            raise ArtifactError(f"{directory / 'state.json'} lacks {e}") from e
        for name, digest in files.items():
            if not (directory / name).is_file() or digest_file(directory / name) != digest:
                raise ArtifactError(f"{directory / name} is missing or was altered")
        self._refuse_other(config)
        slots = {n[4:-12]: read_tensors(directory / n) for n in files if n.startswith("opt_")}
        try:
            records = [RoundRecord(**{**r, "clients": tuple(r["clients"])}) for r in raw]
        except (KeyError, TypeError) as e:
            raise ArtifactError(f"{directory / 'state.json'}: a round's record cannot be read ({e})") from e
        residual = read_tensors(directory / RESIDUAL_FILE) if RESIDUAL_FILE in files else None
        return ServerState(number, read_tensors(directory / "adapter.safetensors"), slots, residual), records


def number_of(directory: Path) -> int:
    """The round of a checkpoint's directory."""
    return int(directory.name[-5:])


def _manifest(directory: Path) -> dict[str, Any]:
    return read_sealed(directory / "state.json")


def differing_keys(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, as ``key (was 1, now 2)``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found = []
        for key in sorted({*before, *now}):
            a, b = before.get(key, _MISSING), now.get(key, _MISSING)
            found += differing_keys(a, b, f"{prefix}.{key}" if prefix else str(key))
        return found
    if isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)) and list(before) == list(now):
        return []
    if before == now:
        return []
    shown = ["absent" if v is _MISSING else repr(v) for v in (before, now)]
    return [f"{prefix} (was {shown[0]}, now {shown[1]})"]
