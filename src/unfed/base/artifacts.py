"""Files written atomically, digests, and the lock on a run directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file

from unfed.base.errors import ArtifactError, WriteError
from unfed.base.types import AdapterState

RUN_FILE = "run.json"
"""What a run directory says about its run."""
RUN_KEY = "_run"
"""Entry of a result file that says which model and rows were scored; other tools' files have none."""
LOCK_NAME = ".unfed.lock"


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling; on success sync it and rename it over ``path``, else remove it.

    Raises ``WriteError`` when the directory is full or may not be written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(fd)
    except OSError as e:
        raise WriteError(f"cannot write {path}: {e.strerror or e}") from e
    part = Path(name)
    try:
        yield part
        _sync(part)
        os.chmod(part, 0o644)
        os.replace(part, path)
        _sync(path.parent)
    except (OSError, safetensors.SafetensorError) as e:
        raise WriteError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from e
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling directory; on success it takes the place of ``path``. ``WriteError`` as above."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as e:
        raise WriteError(f"cannot write {path}: {e.strerror or e}") from e
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                _sync(file)
        _sync(part)
        os.chmod(part, 0o755)  # noqa: S103 - a model directory is for reading, as mkdir would make it
        if path.exists():
            shutil.rmtree(path)
        os.replace(part, path)
        _sync(path.parent)
    except (OSError, safetensors.SafetensorError) as e:
        raise WriteError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed process left of :func:`atomic_path` and :func:`atomic_dir` in ``directory``."""
    for part in directory.glob(".*.part"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON, atomically."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; ``ArtifactError`` names the file when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ArtifactError(f"cannot read {path}: {e}") from e


def write_sealed(path: Path | str, body: Mapping[str, Any]) -> None:
    """Write ``body`` as JSON with its own digest, which :func:`read_sealed` checks."""
    write_json(path, {**body, "digest": digest_json(body)})


def read_sealed(path: Path | str) -> dict[str, Any]:
    """What :func:`write_sealed` wrote; ``ArtifactError`` when it is missing, broken, or was altered since."""
    found = read_json(path)
    body = {k: v for k, v in found.items() if k != "digest"} if isinstance(found, dict) else {}
    if not body or found.get("digest") != digest_json(body):
        raise ArtifactError(f"{path} was altered")
    return body


def write_tensors(path: Path | str, state: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically."""
    with atomic_path(path) as part:
        save_file({n: t.contiguous() for n, t in state.items()}, part, metadata={"format": "pt", **(metadata or {})})


def read_tensors(path: Path | str) -> AdapterState:
    """Read a safetensors file; ``ArtifactError`` when it is missing, truncated or altered."""
    try:
        return AdapterState(load_file(path))
    except (OSError, safetensors.SafetensorError, ValueError) as e:
        raise ArtifactError(f"cannot read {path}: {e}") from e


def digest_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes as ``sha256:<hex>``."""
    with open(path, "rb") as f:
        return "sha256:" + hashlib.file_digest(f, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON as ``sha256:<hex>``."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold a run directory; a second live run in it is refused with the owner and its age.

    The lock of a process that no longer lives on this host is taken over.
    """
    lock = directory / LOCK_NAME
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    try:
        with _one_at_a_time(directory):
            if lock.exists():
                _refuse_if_held(lock, owner)
            # Not atomic_path: a directory that is full or read-only should say so here, in its own words.
            fd = os.open(lock, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
            with os.fdopen(fd, "w", encoding="utf-8") as f:
                json.dump(owner, f)
    except OSError as e:
        raise WriteError(f"cannot write to {directory}: {e.strerror or e}") from e
    try:
        yield
    finally:
        # Only our own: the directory may have been renamed meanwhile, and another run begun in its place.
        if _owner(lock) == owner:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Between looking at a lock and writing one's own, nobody else may do the same (where the system can see to it)."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _owner(lock: Path) -> dict[str, Any] | None:
    """What a lock file says; ``None`` for one that is gone or was torn by a crash."""
    try:
        held = json.loads(lock.read_text(encoding="utf-8"))
        return {"pid": int(held["pid"]), "host": str(held["host"]), "since": float(held["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_if_held(lock: Path, owner: Mapping[str, Any]) -> None:
    held = _owner(lock)
    if held is None or (held["host"] == owner["host"] and (held["pid"] == owner["pid"] or not _alive(held["pid"]))):
        return
    age = int(time.time() - held["since"])
    raise ArtifactError(
        f"{lock.parent} is in use by process {held['pid']} on {held['host']} for {age} s. "
        f"Wait for it, choose another task_name, or delete {lock.name} there if that process is gone."
    )
