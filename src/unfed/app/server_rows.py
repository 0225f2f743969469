"""The server's own rows (FLTrust's root set): drawn once, by fine-tuning, owned by no client, kept beside the
manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from unfed.app.build import Rows, find_manifest, is_federated
from unfed.app.encode import encoded
from unfed.app.progress import say
from unfed.base.artifacts import read_sealed, write_sealed
from unfed.base.errors import ConfigError, DataError
from unfed.base.seeding import numpy_generator
from unfed.base.types import SERVER, Example
from unfed.config.schema import RunConfig
from unfed.data.datasets import example_ids, read_json_lines
from unfed.federated.client import ClientData
from unfed.federated.schedule import Phase, Schedule
from unfed.models.load import LoadedModel

SERVER_FILE = "server_rows.json"


def apart(config: RunConfig, rows: Rows) -> Rows:
    """The rows, with those that are the server's in ``server`` and nowhere else.

    A fine-tuning draws ``robust.root`` of its training rows, none of them to be forgotten; a run that goes on from one
    finds them beside the manifest. Raises ``UnfedError`` when robust=fltrust has none.
    """
    if not is_federated(config):
        return rows
    kept = _kept(config)
    ids = _drawn(config, rows) if kept is None else kept
    if asked := {e["id"] for e in rows.forget} & ids:
        raise DataError(f"{len(asked)} of the rows to forget are the server's own ({SERVER_FILE})")
    own = tuple(e for e in (*rows.train, *rows.retain) if e["id"] in ids)
    train, retain = (tuple(e for e in split if e["id"] not in ids) for split in (rows.train, rows.retain))
    if config.robust is None or config.robust.name != "fltrust":
        return replace(rows, train=train, retain=retain)
    if isinstance(config.robust.root, str):
        own = _from_file(config, config.robust.root, rows)
    if not own:
        raise ConfigError([_nothing(config, kept)])
    say(f"robust=fltrust: the server trains on {len(own)} rows of its own")
    return replace(rows, train=train, retain=retain, server=own)


def _nothing(config: RunConfig, kept: set[str] | None) -> str:
    if kept:
        return f"robust=fltrust: none of the server's {len(kept)} rows is in the data of this run"
    given = "robust=fltrust" if config.robust is None or config.robust.root is None else "robust.root"
    return f"{given}: all rows of the fine-tuning are its clients'; give a file of rows as robust.root"


def _kept(config: RunConfig) -> set[str] | None:
    """Ids that a fine-tuning drew before; none where there was no draw; ``None`` where this run deals the rows."""
    manifest = find_manifest(config)
    if manifest is None:
        return None
    return server_ids(manifest.parent)


def server_ids(place: Path) -> set[str]:
    """Ids of the rows that the server of a finished run has for itself; none for a run without."""
    file = place / SERVER_FILE
    return {str(i) for i in read_sealed(file)["rows"]} if file.is_file() else set()


def _drawn(config: RunConfig, rows: Rows) -> set[str]:
    root = config.robust.root if config.robust is not None else None
    if not isinstance(root, int) or config.mode != "finetune":
        return set()
    held = {e["id"] for e in rows.forget}
    free = [e["id"] for e in rows.train if e["id"] not in held]
    if root >= len(free):
        raise ConfigError([f"robust.root={root}: of {len(free)} rows that are not to be forgotten none would be left"])
    chosen = numpy_generator(config.seed, "server-rows").choice(len(free), size=root, replace=False)
    return {free[int(i)] for i in chosen}


def _from_file(config: RunConfig, name: str, rows: Rows) -> tuple[Example, ...]:
    spec = config.data.train if config.mode == "finetune" else config.data.retain
    question, answer = (spec.question_key, spec.answer_key) if spec is not None else ("question", "answer")
    found = [row for _, row in read_json_lines(Path(name))]
    try:
        pairs = [(str(row[question]) if question is not None else "", str(row[answer])) for row in found]
    except KeyError as e:
        raise DataError(f"robust.root={name}: a row has no column {e}") from e
    own = [
        {**row, "id": i, "question": q, "answer": a}
        for row, i, (q, a) in zip(found, example_ids(pairs), pairs, strict=True)
    ]
    if both := {e["id"] for e in own} & {e["id"] for e in rows.forget} if config.mode == "unlearn" else set():
        raise DataError(f"robust.root={name}: {len(both)} of its rows are to be forgotten; take them out")
    return tuple(own)


def joins(config: RunConfig, loaded: LoadedModel, rows: Rows, schedule: Schedule) -> tuple[Schedule, ClientData | None]:
    """The schedule with the server at work as a client would be, in rounds that are averaged; and its data.

    Raises ``ConfigError`` where clients unlearn in such rounds: what the server learns says nothing about that.
    """
    if not rows.server:
        return schedule, None
    phases = [_joined(phase) if phase.rule == "aggregate" else phase for phase in schedule.phases]
    found = encoded(config, loaded, "train" if config.mode == "finetune" else "retain", rows.server)
    return Schedule(tuple(phases)), ClientData(SERVER, {"train": [e for own in found.values() for e in own]})


def _joined(phase: Phase) -> Phase:
    if others := {w.rows for w in phase.work.values()} - {"train"}:
        what = f"in phase {phase.name} clients train on {', '.join(sorted(others))} rows, and the server on plain ones"
        raise ConfigError([f"robust=fltrust: {what}, so it cannot tell a good update; take another rule"])
    work = next(iter(phase.work.values()))
    return replace(phase, work={**phase.work, SERVER: replace(work, shown="root")})


def keep(directory: Path, config: RunConfig, rows: Rows) -> None:
    """Write the ids beside the manifest, where this run drew or found some."""
    ids = _kept(config)
    if ids is None:
        ids = {e["id"] for e in rows.server} if config.robust and isinstance(config.robust.root, int) else set()
    if not ids:
        return
    write_sealed(directory / SERVER_FILE, {"rows": sorted(ids)})
