"""Who owns what: written beside a run's adapter, said at its start, and shown without running anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unfed.app import build, recipes, requests, server_rows
from unfed.app.progress import say
from unfed.app.rundir import PARTITION_FILE, plain
from unfed.base.artifacts import RUN_FILE
from unfed.base.errors import UnfedError, nearest
from unfed.config.schema import RunConfig
from unfed.data.ownership import OWNERSHIP_FILE, Ownership, ownership_of
from unfed.data.partition import Partition


def keep(place: Path, rows: build.Rows, partition: Partition) -> Mapping[str, Any]:
    """Write ``partition.json`` and ``ownership.json``, say how unlike the clients are, and return that for run.json.

    One client alone is like the whole: nothing is said, and nothing returned.
    """
    partition.write(place / PARTITION_FILE)
    if len(partition.clients) < 2:
        return {}
    found = ownership_of(partition, rows.every(), [e["id"] for e in rows.forget])
    found.write(place / OWNERSHIP_FILE)
    say(found.heterogeneity.line())
    return {"heterogeneity": plain(found.heterogeneity)}


def of_run(place: Path) -> Ownership:
    """What a run recorded. Raises ``UnfedError`` for a directory that is no run of several clients."""
    if not (place / RUN_FILE).is_file():
        beside = [p.name for p in place.parent.iterdir() if (p / RUN_FILE).is_file()] if place.parent.is_dir() else []
        raise UnfedError(f"RUN={place}: not a run: it has no {RUN_FILE}{nearest(place.name, beside)}")
    if not (place / OWNERSHIP_FILE).is_file():
        raise UnfedError(
            f"RUN={place}: it has no {OWNERSHIP_FILE}, so it has one client, trained nothing, or is older than this "
            "file; give the overrides of its run and partition.manifest="
            f"{place / PARTITION_FILE} instead"
        )
    return Ownership.read(place / OWNERSHIP_FILE)


def of_settings(config: RunConfig) -> tuple[Ownership, str]:
    """What a run with these settings would deal, and where that comes from; no model is loaded.

    The rows to forget are those of ``data.forget`` where the run itself would not need them to deal. Raises
    ``UnfedError`` as the run would.
    """
    if config.trainer is None:
        raise UnfedError("an evaluation deals no rows: give --config-name of a fine-tuning or unlearning run")
    config, _ = requests.settle(config)
    config, _ = recipes.settled(config)
    rows = server_rows.apart(config, build.read_rows(config))
    partition, where = build.settle_partition(config, rows)
    forget = rows.forget or build.forget_rows(config)
    return ownership_of(partition, rows.every(), [e["id"] for e in forget]), where
