"""The run directory: its lock, ``run.json``, and what happens when one is there already."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from unfed.base.artifacts import LOCK_NAME, RUN_FILE, read_json, remove_leftovers, run_lock, write_json
from unfed.base.errors import ArtifactError, UnfedError, WriteError
from unfed.base.stopping import Stopped
from unfed.config.schema import RunConfig
from unfed.data.ownership import OWNERSHIP_FILE
from unfed.federated.checkpoint import Checkpoints
from unfed.federated.shards import SHARDS_DIR

PARTITION_FILE = "partition.json"
TRAIN_ROWS_FILE = "train_rows.json"
"""Ids of all rows that an adapter, or one that it goes on from, was trained on: an oracle's has none to forget."""
PACKAGES = ("unfed", "torch", "transformers", "peft", "accelerate", "datasets", "hydra-core", "safetensors", "numpy")


def plain(value: Any) -> Any:
    """A dataclass as JSON-ready data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def training_identity(config: RunConfig) -> dict[str, Any]:
    """What two runs must share for one to resume the other: all but where to, how to report, and what comes after the
    last round (evaluation, the clients' own adapters). Workers and their number change nothing."""
    identity = plain(config)
    for key in ("resume", "overwrite", "eval", "paths", "task_name", "oracle", "personalise"):
        identity.pop(key)
    engine = identity.pop("engine")
    if engine["name"] == "nvflare":  # whose sites keep their own tensors
        identity["engine"] = {"name": "nvflare"}
    for key in ("report_to", "run_name", "logging_steps", "dataloader_num_workers", "eval_strategy"):
        (identity.get("trainer") or {}).get("args", {}).pop(key, None)
    return identity


def versions() -> dict[str, str]:
    """Versions of Python, the machine and the packages that decide a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    threads = torch.get_num_threads()
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} thread(s)"
    return found


def seen_rows(adapter: str | None) -> set[str]:
    """What an adapter's directory says of the rows that it was trained on (nothing for one from elsewhere)."""
    file = Path(adapter or "") / TRAIN_ROWS_FILE
    found = read_json(file) if adapter is not None and file.is_file() else []
    return {str(i) for i in found} if isinstance(found, list) else set()


class RunDir:
    """An open run directory. ``before`` is what ``run.json`` held; a resumed run adds to it."""

    def __init__(self, config: RunConfig, before: Mapping[str, Any]) -> None:
        self.path = Path(config.paths.output_dir)
        self._record: dict[str, Any] = {
            **before,
            "task_name": config.task_name,
            "mode": config.mode,
            "status": "running",
            "command": sys.argv[:],
            "started": before.get("started", _now()),
            "seed": config.seed,
            "config": plain(config),
            "versions": versions(),
        }

    def known(self, key: str) -> Any:
        """What is recorded under ``key``, by this process or the one that it goes on from."""
        return self._record.get(key)

    def note(self, **entries: Any) -> None:
        """Add to ``run.json`` and write it."""
        self._record.update({k: plain(v) for k, v in entries.items()})
        write_json(self.path / RUN_FILE, self._record)

    def name(self) -> str:
        """A name of this run and of no other that says nothing of it; it keeps it when it is resumed."""
        if "name" not in self._record:
            self.note(name=secrets.token_hex(8))
        return self._record["name"]

    def sent(self, what: str, bytes_up: int = 0, bytes_down: int = 0) -> None:
        """Record what travelled before or after the rounds, for costs to count it."""
        known = self.known("beside_rounds") or {}
        self.note(beside_rounds={**known, what: {"bytes_up": bytes_up, "bytes_down": bytes_down}})


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextlib.contextmanager
def open_run(config: RunConfig) -> Iterator[RunDir]:
    """Lock the directory, deal with an earlier run in it, and record how this one ends.

    A finished run that is there already is set aside under ``<name>.1``, ``<name>.2``, ...: nothing is lost. One that
    was cut short is not touched unless ``resume=true`` (go on) or ``overwrite=true`` (set it aside) says what to do.
    A run that ends in a user's mistake, or is stopped, before it has made anything leaves the place as it was. One that
    is stopped, or finds the disk full, says where to go on.
    """
    path = Path(config.paths.output_dir)
    _not_its_own_input(config, path)
    aside = None if config.resume else _set_aside(path, overwrite=config.overwrite)
    there = set(path.iterdir()) if path.is_dir() else None
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise WriteError(f"cannot make the output directory {path}: {e.strerror or e}") from e
    with run_lock(path):
        for place in (path, path / "checkpoints", path / SHARDS_DIR):
            remove_leftovers(place)
        run = RunDir(config, _history(path) if config.resume else {})
        run.note(**({"set_aside": str(aside)} if aside else {}), **({"resumed": _now()} if config.resume else {}))
        try:
            yield run
        except BaseException as e:
            stopped = isinstance(e, KeyboardInterrupt)
            with contextlib.suppress(UnfedError):
                run.note(status="stopped" if stopped else "failed", ended=_now(), error=f"{type(e).__name__}: {e}")
            if isinstance(e, Stopped) and e.where is None:
                e.where = go_on(path)
            if isinstance(e, UnfedError | Stopped) and not config.resume:
                _undo(path, there, aside)
            if isinstance(e, WriteError) and path.is_dir():
                raise WriteError(f"{e}. {go_on(path)}") from e
            raise
        run.note(status="finished", ended=_now())


def go_on(path: Path) -> str:
    """What a run that ended before its time has left, and how to go on with it."""
    done = Checkpoints(path, {}).finished()
    if not done:
        return f"No round was finished in {path}: the same command starts afresh"
    rounds = f"{done} finished round{'s' * (done != 1)}"
    return f"{path} holds {rounds}, whole: the same command with resume=true goes on from there"


def _undo(path: Path, there: set[Path] | None, aside: Path | None) -> None:
    """Remove a run that made nothing but its record, and put back the one that was set aside for it.

    ``there``: what the directory held before (``None``: it did not exist), which stays.
    """
    made = [f for f in path.iterdir() if f not in (there or ())]
    if any(f.name not in {RUN_FILE, PARTITION_FILE, OWNERSHIP_FILE, LOCK_NAME} and f.suffix != ".log" for f in made):
        return
    with contextlib.suppress(OSError):  # the message matters more than a directory that cannot be removed
        for file in made:
            file.unlink()
        if there is None:
            path.rmdir()
        if aside is not None:
            aside.rename(path)


def _history(path: Path) -> dict[str, Any]:
    """What an earlier process wrote to ``run.json``, without how it ended."""
    try:
        found = read_json(path / RUN_FILE)
    except ArtifactError:
        return {}
    return {k: v for k, v in found.items() if k not in {"ended", "error"}} if isinstance(found, dict) else {}


def _not_its_own_input(config: RunConfig, path: Path) -> None:
    args = config.model.model_args
    for key in ("pretrained_model_name_or_path", "lora_model_path"):
        source = getattr(args, key)
        if source is not None and Path(source).resolve() == path.resolve():
            raise UnfedError(
                f"model.model_args.{key}={source} is also the output directory: choose another task_name, or "
                f"paths.output_dir={path / 'evals' if config.mode == 'eval' else path.with_name(path.name + '_2')}"
            )


def _set_aside(path: Path, *, overwrite: bool) -> Path | None:
    status = run_status(path)
    if status is None:
        return None
    refuse_unfinished(path, overwrite=overwrite)
    with run_lock(path):  # refuses while another process works there
        number = 1
        while (aside := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        try:
            path.rename(aside)
        except OSError as e:
            raise ArtifactError(f"cannot set {path} aside: {e.strerror or e}") from e
        (aside / LOCK_NAME).unlink(missing_ok=True)
    return aside


def refuse_unfinished(path: Path, *, overwrite: bool) -> None:
    """Raise ``UnfedError`` where a run with finished rounds lies that was cut short, unless it may be set aside."""
    if run_status(path) in (None, "finished") or overwrite or not Checkpoints(path, {}).exist():
        return
    with run_lock(path):  # refuses while another process works there
        pass
    raise UnfedError(
        f"{path} holds a run that was cut short: resume=true goes on from its last round, overwrite=true sets it aside "
        "and starts afresh"
    )


def run_status(path: Path) -> str | None:
    """``finished``, ``running``, ``failed``, ``stopped`` (by a signal), or ``None`` where no run was recorded."""
    file = path / RUN_FILE
    if not file.is_file():
        return None
    try:
        return str(read_json(file).get("status", "running"))
    except (ArtifactError, AttributeError):
        return "failed"
