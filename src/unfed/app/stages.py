"""A run as one stage of something larger: kept where it is done, gone on with where it was cut short, else started."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unfed.app.rundir import RUN_FILE, plain, run_status, training_identity
from unfed.base.artifacts import read_json
from unfed.base.errors import ArtifactError, UnfedError
from unfed.config.schema import RunConfig
from unfed.federated.checkpoint import Checkpoints

Start = Callable[[RunConfig], Any]
"""Runs a configuration: :func:`unfed.app.runs.run`."""

FOUND_BY_ORACLE = ("retain_logs_path", "finetuned_logs_path")
"""Settings of ``eval`` that ``oracle=auto`` fills in, so that run.json names what the configuration left open."""


def is_done(config: RunConfig) -> bool:
    """Whether the run's directory holds a finished run of this very configuration.

    It is not done if the run that its adapter comes from was finished only after it had started: then what lies there
    was made from another adapter of the same name.
    """
    place = Path(config.paths.output_dir)
    if run_status(place) != "finished":
        return False
    record = _record(place)
    if _lasting(record.get("config") or {}, config) != _lasting(plain(config), config):
        return False
    return not _is_older_than_its_source(record, config)


def carry_on(config: RunConfig, start: Start) -> Any:
    """Run ``config``: from its last round where one of the same training is kept, else from the beginning.

    A run that was cut short and cannot be gone on with is set aside, as a finished one is.
    """
    resume = _resumable(config)
    return start(replace(config, resume=resume, overwrite=not resume))


def _resumable(config: RunConfig) -> bool:
    place = Path(config.paths.output_dir)
    checkpoints = Checkpoints(place, training_identity(config))
    if run_status(place) == "finished" or not checkpoints.exist():
        return False
    try:
        checkpoints.check()
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


def _lasting(stored: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """A configuration without what only says how to start, and without what ``oracle=auto`` finds out."""
    kept = {k: v for k, v in stored.items() if k not in {"resume", "overwrite"}}
    if config.oracle is not None and config.eval is not None:
        kept.pop("oracle", None)
        found = {k for k in FOUND_BY_ORACLE if getattr(config.eval, k) is None or k == "retain_logs_path"}
        kept["eval"] = {k: v for k, v in (kept.get("eval") or {}).items() if k not in found}
    return kept
