"""A run as one stage of something larger: kept where it is done, gone on with where it was cut short, else started."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unfed.app.recipes import settled
from unfed.app.requests import settle
from unfed.app.rundir import RUN_FILE, plain, run_status, training_identity
from unfed.base.artifacts import read_json, write_json
from unfed.base.errors import ArtifactError, UnfedError
from unfed.config.schema import RunConfig
from unfed.federated.checkpoint import Checkpoints

Start = Callable[[RunConfig], Any]
"""Runs a configuration: :func:`unfed.app.runs.run`."""

ASKED = "asked"
"""Entry of run.json: the configuration that a stage was started with, where the run settled some of it itself."""


def is_done(config: RunConfig) -> bool:
    """Whether the run's directory holds a finished run of this very configuration.

    It is not done if the run that its adapter comes from was finished only after it had started: then what lies there
    was made from another adapter of the same name.
    """
    place = Path(config.paths.output_dir)
    if run_status(place) != "finished":
        return False
    record = _record(place)
    if _lasting(record.get(ASKED) or record.get("config") or {}) != _lasting(plain(config)):
        return False
    return not _is_older_than_its_source(record, config)


def carry_on(config: RunConfig, start: Start) -> None:
    """Run ``config``: from its last round where one of the same training is kept, else from the beginning.

    A run that was cut short and cannot be gone on with is set aside, as a finished one is. What ``oracle=auto`` and a
    recipe that trains again have settled themselves stands in run.json, so what was asked for is added to it.
    """
    resume = _resumable(config)
    start(replace(config, resume=resume, overwrite=not resume))
    place = Path(config.paths.output_dir)
    record = _record(place)
    if record and _lasting(record.get("config") or {}) != _lasting(plain(config)):
        write_json(place / RUN_FILE, {**record, ASKED: plain(config)})


def _resumable(config: RunConfig) -> bool:
    place = Path(config.paths.output_dir)
    if run_status(place) == "finished" or not Checkpoints(place, {}).exist():
        return False
    try:
        Checkpoints(place, training_identity(settled(settle(config)[0])[0])).check()
    except UnfedError:  # rounds of another configuration
        return False
    return not _is_older_than_its_source(_record(place), config)


def _is_older_than_its_source(record: Mapping[str, Any], config: RunConfig) -> bool:
    args = config.model.model_args
    named = (args.lora_model_path, args.pretrained_model_name_or_path)
    ends = [str(_record(Path(p)).get("ended", "")) for p in named if p is not None]
    # Both are UTC in ISO form to the second, so they order as text.
    return any(str(record.get("started", "")) < end for end in ends)


def _record(place: Path) -> Mapping[str, Any]:
    """run.json, empty where there is none that can be read."""
    try:
        found = read_json(place / RUN_FILE)
    except ArtifactError:
        return {}
    return found if isinstance(found, dict) else {}


def _lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what only says how to start."""
    return {k: v for k, v in config.items() if k not in {"resume", "overwrite"}}
