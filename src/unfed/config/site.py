"""What a party of a network keeps to itself: a site's file of data, base model and permissions; the server's places."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from unfed.base.errors import ConfigError, nearest
from unfed.base.params import STRICT

SITE_FILE = "unfed.yml"
"""In the folder ``local`` of a party's startup kit."""
Task = Literal["finetune", "unlearn", "measure"]
SMALLEST_PAYLOAD = 0.01
"""MB: of a message that says anything."""
TASKS: tuple[Task, ...] = ("finetune", "unlearn", "measure")


@dataclass(frozen=True)
class SiteFile:
    """What a site has and permits. No path in it is ever named by, or told to, the server.

    ``data_dir``: its data root (``<data_dir>/<folder>/<name>.json``). ``base_model``: its copy of the base model.
    ``datasets``: those that a job may ask for, as ``data.<split>.path`` names them. ``tasks``: what may be done with
    them (``measure``: how well a model knows the site's rows, as a few numbers). ``largest_payload``: MB of a message.
    ``smallest_share``: a task on fewer rows than that is refused, for an update of few rows tells most of them.
    ``state``: where tensors are kept that never leave the site (``None``: in memory; a file that does not say has a
    folder ``state`` beside the kit's others). ``device``: the model's (``None``: as the job says).
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    data_dir: str
    base_model: str
    datasets: tuple[str, ...]
    tasks: tuple[Task, ...] = TASKS
    largest_payload: float = 512.0
    smallest_share: int = 1
    state: str | None = None
    device: str | None = None

    @property
    def largest(self) -> int:
        """Bytes of the largest message."""
        return int(self.largest_payload * 1e6)


@dataclass(frozen=True)
class ServerFile:
    """``outputs``: the one directory below which runs may be written."""

    __pydantic_config__: ClassVar[Any] = STRICT
    outputs: str


PATHS = ("data_dir", "base_model", "state", "outputs")
Settings = TypeVar("Settings")
File = TypeVar("File", SiteFile, ServerFile)


def read_settings(path: Path, kind: type[Settings], advice: str = "") -> Settings:
    """A YAML file of a dataclass's settings; ``advice``: for whoever has no such file. ``ConfigError`` with every
    problem."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError([f"{path}: {e.strerror or e}{advice}"]) from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # no UTF-8, a number of thousands of digits, too deep
        raise ConfigError([f"{path} is not valid YAML: {' '.join(str(e).split())[:300]}"]) from e
    if not isinstance(raw, dict):
        raise ConfigError([f"{path}: holds no settings"])
    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError as e:
        shape: Any = kind
        known = [f.name for f in fields(shape)]
        raise ConfigError([_words(path, known, error["loc"], error["msg"]) for error in e.errors()]) from e


def read_site_file(path: Path, kind: type[File]) -> File:
    """A party's own file; paths in it are relative to the folder of its kit. ``ConfigError`` with every problem."""
    found = read_settings(path, kind, "; unfed network provision writes one to be filled in")
    if isinstance(found, SiteFile) and (problems := list(_limits(found))):
        raise ConfigError([f"{path}: {p}" for p in problems])
    if isinstance(found, SiteFile) and found.state is None:
        found = replace(found, state="state")
    paths = {k: str(path.parent.parent / value) for k in PATHS if (value := getattr(found, k, None)) is not None}
    return replace(found, **paths)


def _limits(file: SiteFile) -> Iterator[str]:
    if not SMALLEST_PAYLOAD <= file.largest_payload < math.inf:
        yield f"largest_payload={file.largest_payload:g}: must be at least {SMALLEST_PAYLOAD:g} MB, and finite"
    if file.smallest_share < 1:
        yield f"smallest_share={file.smallest_share}: must be at least 1"
    if not file.datasets or not file.tasks:
        yield "datasets and tasks: name one each at least, or no job can do anything here"


def _words(path: Path, known: Sequence[str], loc: Sequence[Any], said: str) -> str:
    key = ".".join(map(str, loc)) or "?"
    if not loc or loc[0] not in known:
        return f"{path}: {key}: no such setting{nearest(key, known)}"
    return f"{path}: {key}: {said.removeprefix('Input should be ')}"


def below(root: str | Path, path: str | Path) -> bool:
    """Whether ``path``, links followed, lies below ``root``."""
    return Path(path).resolve().is_relative_to(Path(root).resolve()) and Path(path).resolve() != Path(root).resolve()
