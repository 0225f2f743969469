"""Requests to forget: which rows of a fine-tuning they name, and what earlier requests on the same model named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unfed.app import build
from unfed.app.progress import say
from unfed.app.recipes import recipe_of
from unfed.app.rundir import PARTITION_FILE, RUN_FILE, plain, seen_rows
from unfed.app.source import made_by, read_source, source_directory
from unfed.base.errors import ArtifactError, ConfigError, DataError, UnfedError, nearest
from unfed.base.types import Example
from unfed.config.schema import ForgetConfig, RunConfig
from unfed.data.partition import Partition
from unfed.data.select import rows_of_author, topic_scores
from unfed.unlearning.base import Source

Forgotten = Mapping[str, Any]
"""One request in ``run.json``: ``name``, ``run`` (its directory), ``what`` (in words), ``recipe``, ``method``, ``ids``
and ``clients`` (rows by owner)."""


@dataclass(frozen=True)
class Selection:
    """The rows that a request names. ``found``: rows by the target that names them (``author Ann Lee``); a row may
    stand under several. ``gone``: rows among them that an earlier request had forgotten, which are not in ``ids``."""

    ids: tuple[str, ...]
    found: Mapping[str, int]
    gone: int = 0


def select(asked: ForgetConfig, rows: Sequence[Example], partition: Partition, before: set[str]) -> Selection:
    """The rows of a fine-tuning that ``asked`` names, in data order.

    Raises ``ConfigError`` with every target that names nothing (and the nearest that would), ``UnfedError`` when
    nothing is left to forget, or nothing to keep.
    """
    place = {row["id"]: n for n, row in enumerate(rows)}
    named: dict[str, list[int]] = {}
    problems: list[str] = []
    if strange := [i for i in asked.ids if i not in place]:
        close = nearest(strange[0], place).partition(" (choices")[0]
        problems.append(
            f"forget.ids: {len(strange)} of {len(asked.ids)} are no rows of the fine-tuning: {strange[0]}{close}"
        )
    elif asked.ids:
        named["ids"] = [place[i] for i in asked.ids]
    for client in asked.clients:
        name = _client(client, partition)
        if name is None:
            problems.append(f"forget.clients={client}: no such client{nearest(str(client), partition.clients)}")
        else:
            named[name] = [place[i] for i in partition.clients[name] if i in place]
    for author in asked.authors:
        try:
            named[f"author {author}"] = rows_of_author(author, rows)
        except DataError as e:
            problems.append(f"forget.authors={author}: {e}")
    for topic in asked.topics:
        try:
            (scores,) = topic_scores([topic], rows)
        except DataError as e:
            problems.append(f"forget.topics={topic}: {e}")
            continue
        named[f"topic {topic}"] = found = [n for n, s in enumerate(scores) if s >= asked.topic_threshold]
        if not found:
            problems.append(
                f"forget.topics={topic}: no row comes up to forget.topic_threshold={asked.topic_threshold:g}; the "
                f"nearest has {scores.max():.3f}"
            )
    if problems:
        raise ConfigError(problems)
    wanted = {rows[n]["id"] for own in named.values() for n in own}
    ids = tuple(i for i in place if i in wanted and i not in before)
    _refuse_all_or_nothing(ids, wanted, set(place) - before)
    return Selection(ids, {what: len(own) for what, own in named.items()}, len(wanted & before))


def _client(given: int | str, partition: Partition) -> str | None:
    names = partition.client_ids
    if given in names:
        return str(given)
    if isinstance(given, int) or given.isdecimal():
        return names[int(given)] if 0 <= int(given) < len(names) else None
    return None


def _refuse_all_or_nothing(ids: Sequence[str], wanted: set[str], there: set[str]) -> None:
    if not ids:
        raise UnfedError(f"forget: all of the {len(wanted)} rows were forgotten before; nothing is left of them")
    if len(ids) == len(there):
        raise UnfedError(f"forget: names all of the {len(there)} rows that are left; a model keeps one at least")


def settle(config: RunConfig, since: Sequence[Forgotten] = ()) -> tuple[RunConfig, tuple[Forgotten, ...]]:
    """The configuration with the rows that it forgets and leaves out by their ids, and the requests before this one.

    Where ``forget.*`` names anything, the rows are those of the fine-tuning that the adapter comes from: the named ones
    to be forgotten, all others to be retained. Whatever was forgotten before is not retained in either case, and not
    forgotten again. What was found is printed. A settled configuration comes back as it is. ``since``: requests that
    will have been met by then, and stand in no ``run.json`` yet.
    """
    if config.mode != "unlearn":
        return config, ()
    before = (*forgotten_before(config), *since)
    gone = {i for request in before for i in request["ids"]}
    data = replace(config.data, exclude_ids=tuple(sorted(gone | set(config.data.exclude_ids))))
    config = replace(config, data=data)
    if data.forget_ids or (not config.forget.given and not gone):
        return config, before
    if not config.forget.given and build.rows_are_elsewhere(config):
        return config, before  # the sites say which rows these are
    if not config.forget.given:
        return replace(config, data=replace(data, forget_ids=_not_again(config, gone))), before
    found, made, partition = selected(config, gone)
    _tell(found, partition)
    train, gone = made.data.train, set(data.exclude_ids) | build.left_out(made)
    data = replace(data, forget=train, retain=train, forget_ids=found.ids, exclude_ids=tuple(sorted(gone)))
    return replace(config, data=data), before


def _not_again(config: RunConfig, gone: set[str]) -> tuple[str, ...]:
    """Ids of the rows of ``data.forget`` that are not forgotten yet; none where that is all of them."""
    asked = [row["id"] for row in build.forget_rows(config)]
    left = tuple(i for i in asked if i not in gone)
    if not left:
        raise UnfedError(f"forget_split: all of its {len(asked)} rows were forgotten before; nothing is left of them")
    if len(left) == len(asked):
        return ()
    say(f"forget: {len(left)} rows of forget_split; {len(asked) - len(left)} more were forgotten before")
    return left


def selected(config: RunConfig, before: set[str]) -> tuple[Selection, RunConfig, Partition]:
    """What ``forget.*`` names; with the fine-tuning whose rows they are (read where this run has its data), and whose
    row each is."""
    place = source_directory(config)
    if place is None:
        args = config.model.model_args
        raise UnfedError(
            f"forget: {args.lora_model_path or args.pretrained_model_name_or_path} does not say what it was fine-tuned "
            "on (there is no run.json of a fine-tuning), so its rows cannot be named: name a directory that unfed "
            "train or unfed unlearn made, or give forget_split and retain_split"
        )
    _, made = read_source(place)
    made = replace(made, paths=config.paths)
    partition = Partition.read(place / PARTITION_FILE)
    if build.rows_are_elsewhere(config):
        rows: Sequence[Example] = [{"id": i} for ids in partition.clients.values() for i in ids]
        return select(config.forget, rows, partition, before), made, partition
    rows = build.read_rows(made).train
    partition.owners(row["id"] for row in rows)  # refuses rows that are not those that were dealt
    return select(config.forget, rows, partition, before), made, partition


def _tell(found: Selection, partition: Partition) -> None:
    owners = {c: len(ids) for c, ids in partition.owners(found.ids).items()}
    say("forget: " + "; ".join(f"{what}: {n} rows" for what, n in found.found.items()))
    held = ", ".join(f"{client} {n} of {len(partition.clients[client])}" for client, n in owners.items())
    again = f"; {found.gone} more were forgotten before" if found.gone else ""
    say(f"  {len(found.ids)} rows of {len(owners)} client{'s' * (len(owners) != 1)} ({held}){again}")


def forgotten_before(config: RunConfig) -> tuple[Forgotten, ...]:
    """The requests that the model to start from has behind it, the first one first."""
    place, record = made_by(config)
    if place is None or record.get("mode") != "unlearn":
        return ()
    if "forgotten" not in record:
        say(
            f"WARNING: {place} does not say which rows it forgot (an earlier version made it): they are not left out "
            "of the rows that are retained now, unless retain_split leaves them out"
        )
    found = record.get("forgotten", ())
    whole = isinstance(found, Sequence) and all(
        isinstance(r, Mapping) and isinstance(r.get("ids"), list) for r in found
    )
    if not whole:
        raise ArtifactError(f"{place / RUN_FILE}: what it says was forgotten cannot be read, it was altered")
    return tuple(found)


def note(
    config: RunConfig, forget: Sequence[Example], partition: Partition, before: Sequence[Forgotten]
) -> dict[str, Any]:
    """What ``run.json`` is to keep of an unlearning run, as ``forgotten``: the requests before, and this run's own."""
    if config.mode != "unlearn":
        return {}
    ids = [row["id"] for row in forget]
    own = {
        "name": config.task_name,
        "run": config.paths.output_dir,
        "what": words(config),
        "recipe": config.recipe.name if config.recipe else None,
        "method": config.method.name if config.method else None,
        "ids": ids,
        "clients": {c: len(rows) for c, rows in partition.owners(ids).items()},
    }
    return {"forgotten": [*before, own]}


def words(config: RunConfig) -> str:
    """What a run is asked to forget, in a few words."""
    asked = config.forget
    if not asked.given:
        return config.data.forget.name if config.data.forget else ""
    parts = [f"{len(asked.ids)} rows"] if asked.ids else []
    parts += [f"client_{c}" if isinstance(c, int) else c for c in asked.clients]
    return ", ".join([*parts, *asked.authors, *(f"topic {t}" for t in asked.topics)])


def seen_after(config: RunConfig, rows: build.Rows, adapter: str | None, source: Source | None) -> list[str]:
    """Ids of all rows that the result of a run was trained on; ``adapter`` is the directory that it started from.

    The result of an exact recipe saw what the fine-tuning's own start had seen, and the rows that are retained.
    """
    if config.mode == "unlearn" and source is not None and recipe_of(config).promise.kind == "exact":
        return sorted(source.start_saw | {row["id"] for row in rows.retain})
    return sorted(seen_rows(adapter) | rows.ids())


def request_record(config: RunConfig) -> dict[str, Any]:
    """The targets as they were asked for, for a record."""
    return {k: v for k, v in plain(config.forget).items() if v and k != "topic_threshold"}
