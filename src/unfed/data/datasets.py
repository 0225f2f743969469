"""Question-answer rows from the built-in generator, a local folder, or the hub."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unfed.base.artifacts import digest_json
from unfed.base.errors import DataError, nearest
from unfed.base.types import Example
from unfed.data import fictional
from unfed.data.spec import DatasetSpec

FICTIONAL = "fictional"
_PART = re.compile(r"(?P<name>[A-Za-z0-9_.-]+?)(?:\[:(?P<rows>[1-9]\d*)\])?")


def load_rows(spec: DatasetSpec, data_dir: Path | str | None = None) -> list[Example]:
    """Read a data set as examples with ``id``, ``question``, ``answer`` and the file's other columns.

    ``spec.name`` may join several and cut each as the hub's split names do: ``retain99[:160]+forget01``. The order
    of places: the generator for ``path == 'fictional'``; ``<data_dir>/<folder>/<name>.json`` (JSON lines) when that
    folder exists; else the hub. ``question`` and ``answer`` hold what ``question_key`` and ``answer_key`` name. Ids
    come from :func:`example_ids`.

    Raises ``DataError`` for an unknown name, a broken line (file and line), a missing column, no rows.
    """
    _check_limit(spec)
    raw: list[Mapping[str, Any]] = []
    where: list[str] = []
    for part in _parts(spec):
        rows, places = _read_part(part, data_dir)
        raw += rows[: part.limit]
        where += places[: part.limit]
    kept = slice(0, spec.limit)
    pairs = [_texts(row, place, spec) for row, place in zip(raw[kept], where[kept], strict=True)]
    ids = example_ids(pairs)
    return [{**row, "id": i, "question": q, "answer": a} for row, i, (q, a) in zip(raw[kept], ids, pairs, strict=True)]


def local_rows(spec: DatasetSpec, data_dir: Path | str, *, optional: bool = False) -> list[Example]:
    """As :func:`load_rows`, from files below ``data_dir`` alone. ``optional``: what has no file has no rows.

    Raises ``DataError`` for a file that is missing, and for ``fictional``, whose rows are the same everywhere.
    """
    if spec.path == FICTIONAL:
        raise DataError("fictional: the generator's rows are the same everywhere; write them to files and deal those")
    files = {part: Path(data_dir) / part.folder / f"{part.full_name}.json" for part in _parts(spec)}
    lacking = [str(file) for file in files.values() if not file.is_file()]
    if lacking and not optional:
        raise DataError(f"{lacking[0]} is not there")
    there = [part for part, file in files.items() if file.is_file()]
    joined = "+".join(p.name if p.limit is None else f"{p.name}[:{p.limit}]" for p in there)
    return load_rows(replace(spec, name=joined), data_dir) if there else []


def _parts(spec: DatasetSpec) -> list[DatasetSpec]:
    """The data sets that a name joins, each with its own ``limit``."""
    found = []
    for text in spec.name.split("+"):
        match = _PART.fullmatch(text.strip())
        if match is None:
            raise DataError(f"data set name {spec.name!r}: {text.strip()!r} is not of the form name or name[:rows]")
        limit = int(match["rows"]) if match["rows"] else spec.limit
        found.append(replace(spec, name=match["name"], limit=limit))
    return found


def _read_part(spec: DatasetSpec, data_dir: Path | str | None) -> tuple[Sequence[Mapping[str, Any]], list[str]]:
    """Rows of one data set, and where each stands."""
    file = local_file(spec, data_dir)
    if spec.path == FICTIONAL:
        raw: Sequence[Mapping[str, Any]] = fictional.split_rows(spec.name)
        where = [f"fictional/{spec.name} row {n}" for n in range(1, len(raw) + 1)]
    elif file is not None:
        numbered = list(read_json_lines(file, spec.limit))
        raw = [row for _, row in numbered]
        where = [f"{file}:{line}" for line, _ in numbered]
    else:
        raw = _hub_rows(spec)
        where = [f"{spec.path}/{spec.name} row {n}" for n in range(1, len(raw) + 1)]
    if not raw:
        raise DataError(f"{file or f'{spec.path}/{spec.name}'} has no rows")
    return raw, where


def preflight(spec: DatasetSpec, data_dir: Path | str | None = None) -> list[str]:
    """What is wrong with ``spec`` as far as a look at the file's first line tells; empty when nothing is.

    Cheap enough to run before a model loads. Data sets of the hub are not looked at.
    """
    try:
        _check_limit(spec)
        for part in _parts(spec):
            file = local_file(part, data_dir)
            if part.path == FICTIONAL:
                _texts(fictional.split_rows(part.name)[0], f"fictional/{part.name} row 1", part)
            elif file is None and "/" not in part.path and difflib.get_close_matches(part.path.lower(), [FICTIONAL]):
                return [f"dataset={part.path}: no such data set; did you mean {FICTIONAL!r}?"]
            elif file is not None:
                line, row = next(read_json_lines(file), (0, None))
                if row is None:
                    return [f"{file} has no rows"]
                _texts(row, f"{file}:{line}", part)
    except DataError as e:
        return [str(e)]
    return []


def example_ids(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """An id for each (question, answer): 16 hex digits of SHA-256 over both, a unit separator (0x1f) between.

    The same row has the same id in whichever file it lies. Repeated rows get ``#2``, ``#3``, ... in order.
    """
    seen: Counter[str] = Counter()
    ids = []
    for question, answer in pairs:
        digest = hashlib.sha256(f"{question}\x1f{answer}".encode()).hexdigest()[:16]
        seen[digest] += 1
        ids.append(digest if seen[digest] == 1 else f"{digest}#{seen[digest]}")
    return ids


def data_digest(examples: Sequence[Example]) -> str:
    """SHA-256 over the examples' ids in order (the ids are digests of the texts)."""
    return digest_json([e["id"] for e in examples])


def local_file(spec: DatasetSpec, data_dir: Path | str | None) -> Path | None:
    """The local file of ``spec``, or ``None`` when it is to come from elsewhere.

    Raises ``DataError`` when ``data_dir`` does not exist, or has the folder but not the file.
    """
    if spec.path == FICTIONAL or data_dir is None:
        file = None
    elif not Path(data_dir).is_dir():
        raise DataError(f"paths.data_dir (or UNFED_DATA_DIR) is {data_dir}, which is not a directory")
    else:
        folder = Path(data_dir) / spec.folder
        stem = spec.full_name
        file = folder / f"{stem}.json" if folder.is_dir() else None
        if file is not None and not file.is_file():
            there = [p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.json")]
            raise DataError(f"{folder} has no data set {stem!r}{nearest(stem, there)} ({file} is not there)")
    if spec.path == FICTIONAL and spec.split != "train":
        raise DataError(f"split {spec.split!r} of {spec.path}: only 'train' exists there")
    return file


def place_of(spec: DatasetSpec, data_dir: Path | str | None) -> str:
    """Where the rows of ``spec`` lie, for messages: the file, or the set's name."""
    file = local_file(spec, data_dir)
    return str(file) if file is not None else f"{spec.path}/{spec.name}"


def read_json_lines(file: Path, limit: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a JSON-lines file; blank lines are passed over."""
    try:
        with file.open("rb") as f:
            found = 0
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                yield number, _object(line, f"{file}:{number}")
                found += 1
                if limit is not None and found >= limit:
                    return
    except OSError as e:
        raise DataError(f"cannot read {file}: {e.strerror or e}") from e


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise DataError(f"{place}: not UTF-8 text ({e.reason})") from e
    except ValueError as e:
        raise DataError(f"{place}: not a JSON object on one line ({e})") from e
    if not isinstance(value, dict):
        raise DataError(f"{place}: a {type(value).__name__} where a JSON object on one line is expected")
    return value


def _texts(row: Mapping[str, Any], place: str, spec: DatasetSpec) -> tuple[str, str]:
    texts = [] if spec.question_key is not None else [""]
    for setting, key in (("question_key", spec.question_key), ("answer_key", spec.answer_key)):
        if key is None:
            continue
        if key not in row:
            raise DataError(f"{place} has no column {key!r} ({setting}){nearest(key, row)}")
        if not isinstance(row[key], str):
            raise DataError(f"{place}: column {key!r} ({setting}) holds {type(row[key]).__name__}, not text")
        texts.append(row[key])
    return texts[0], texts[1]


def _check_limit(spec: DatasetSpec) -> None:
    if spec.limit is not None and spec.limit < 1:
        raise DataError(f"limit={spec.limit} of {spec.path}/{spec.name} keeps no row; use 1 or more, or null")


def _hub_rows(spec: DatasetSpec) -> list[Mapping[str, Any]]:
    import datasets  # slow to import, and not needed for local data

    try:
        rows = datasets.load_dataset(spec.path, spec.name, split=spec.split)
    except Exception as e:  # the hub client raises a dozen unrelated types
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise DataError(
            f"cannot load {spec.path} (name {spec.name!r}, split {spec.split!r}) from the hub: {reason.rstrip('.')}. "
            f"Without network, put JSON lines in <data root>/{spec.folder}/{spec.full_name}.json and set "
            "UNFED_DATA_DIR or paths.data_dir to the data root"
        ) from e
    return [dict(row) for row in rows]
