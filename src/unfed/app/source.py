"""The fine-tuning that a run goes back to: where it lies, what it says of itself, and whether it is still the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unfed.aggregation.base import WeightedMean
from unfed.aggregation.registry import build_aggregator
from unfed.app import build
from unfed.app.progress import say
from unfed.app.rundir import RUN_FILE, seen_rows
from unfed.base.artifacts import read_json, read_tensors
from unfed.base.errors import ArtifactError, UnfedError
from unfed.config.schema import RunConfig
from unfed.config.shape import validate
from unfed.federated.history import History
from unfed.models.spec import ADAPTER_WEIGHTS
from unfed.unlearning.base import Recipe, Source


def made_by(config: RunConfig) -> tuple[Path | None, Mapping[str, Any]]:
    """The run that made the model to start from: its directory and its ``run.json`` (``None`` and nothing: no run)."""
    args = config.model.model_args
    for named in (args.lora_model_path, args.pretrained_model_name_or_path):
        place = Path(named) if named is not None else None
        if place is not None and (place / RUN_FILE).is_file():
            record = read_json(place / RUN_FILE)
            return place, record if isinstance(record, Mapping) else {}
    return None, {}


def source_directory(config: RunConfig) -> Path | None:
    """The run directory of the fine-tuning that the adapter comes from, through all unlearning runs in between.

    ``None`` where it is gone, and, with a warning, where another training has taken its place.
    """
    place, record = made_by(config)
    if record.get("mode") == "finetune":
        return place
    if record.get("mode") != "unlearn" or not isinstance(record.get("source"), str):
        return None
    source, known = Path(record["source"]), record.get("source_adapter")
    if not (source / RUN_FILE).is_file():
        return None
    found = read_json(source / RUN_FILE)
    if known is not None and (not isinstance(found, Mapping) or found.get("adapter") != known):
        say(
            f"WARNING: {source}, which {place} was made from, holds another training now, so nothing is taken from it "
            "(one that was set aside is in a directory of that name with a number)"
        )
        return None
    return source


def read_source(place: Path) -> tuple[Source, RunConfig]:
    """A fine-tuning as its ``run.json`` tells it, and its configuration. ``ArtifactError`` when that cannot be read."""
    record = read_json(place / RUN_FILE)
    stored = record.get("config") if isinstance(record, Mapping) else None
    made, problems = validate(stored) if isinstance(stored, dict) else (None, ["it holds no configuration"])
    if made is None or problems:
        raise ArtifactError(f"{place / RUN_FILE} cannot be read as a run of this version: {'; '.join(problems)}")
    rule = build_aggregator(made.aggregator.name, made.aggregator.params) if made.aggregator else None
    args = made.model.model_args
    try:
        rounds = record.get("rounds") or []
        sent = [*rounds, *(record.get("beside_rounds") or {}).values()]
        source = Source(
            directory=place,
            participants=tuple(tuple(r["clients"]) for r in rounds),
            client_steps=int(sum(m.get("steps", 0) for r in rounds for m in r["metrics"].values())),
            nbytes=sum(r["bytes_down"] + r["bytes_up"] for r in sent),
            aggregator=rule.name if rule else "none",
            mean_step=rule.mean_step if rule else None,
            kept=History(place).settings,
            weighting=rule.weighting if isinstance(rule, WeightedMean) else "examples",
            result=record.get("adapter"),
            start_saw=frozenset(seen_rows(args.lora_model_path) | seen_rows(args.pretrained_model_name_or_path)),
        )
    except (KeyError, TypeError, AttributeError) as e:
        what = f"{type(e).__name__}: {e}"
        raise ArtifactError(f"{place / RUN_FILE}: its rounds cannot be read, it was altered ({what})") from e
    return source, made


def refuse_changed(config: RunConfig, recipe: Recipe, source: Source | None, rows: build.Rows) -> None:
    """Raise ``UnfedError`` where what the recipe works with is no longer what the fine-tuning left or had.

    A recipe that trains again needs all rows but those that are to go; one that reckons with the history needs the
    adapter that it led to.
    """
    if source is None:
        return
    if recipe.demands.replay:
        there = rows.ids() | build.left_out(config) | source.start_saw
        if lost := seen_rows(str(source.directory)) - there:
            raise UnfedError(
                f"recipe={recipe.name}: {len(lost)} rows that {source.directory} was fine-tuned on are not in the data "
                "any more, so this would not be that training without the forget rows: give its paths.data_dir, or "
                "name them among what is to be forgotten"
            )
    elif recipe.demands.history and source.direct and source.result is not None:
        file = source.directory / ADAPTER_WEIGHTS
        if file.is_file() and read_tensors(file).digest() != source.result:
            raise ArtifactError(
                f"recipe={recipe.name}: {file} is not the adapter that the fine-tuning saved, to which its history "
                "belongs; use recipe=retrain or recipe=local_then_recover"
            )
