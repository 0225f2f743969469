"""Plain data against the dataclasses of ``schema``: pydantic's findings in words that name the user's key."""

from __future__ import annotations

import copy
import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from unfed.base.errors import nearest
from unfed.config.schema import RunConfig

UNKNOWN = {"unexpected_keyword_argument", "extra_forbidden"}
ROUNDS_OF_PRUNING = 5


def top_level() -> frozenset[str]:
    """The names a run is made of."""
    return frozenset(f.name for f in dataclasses.fields(RunConfig))


def validate(raw: Mapping[str, Any]) -> tuple[RunConfig | None, list[str]]:
    """A ``RunConfig`` and what is wrong with ``raw``.

    Settings with a problem are left out and the rest is tried again, so that a ``RunConfig`` comes back as long as
    nothing indispensable is missing or wrong.
    """
    problems: list[str] = []
    rest = copy.deepcopy(dict(raw))
    for _ in range(ROUNDS_OF_PRUNING):
        try:
            return _adapter().validate_python(rest), problems
        except ValidationError as e:
            found = _by_key(e.errors(), rest)
            problems += [p for p in (_problem(k, errors, rest) for k, errors in found.items()) if p not in problems]
            pruned = [_prune(rest, key) for key in found]
            if not any(pruned):
                break
    return None, problems


@cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


Key = tuple[str, ...]


def _by_key(errors: Iterable[ErrorDetails], raw: Mapping[str, Any]) -> dict[Key, list[ErrorDetails]]:
    """Findings by the key they are about: a union reports one for each of its members."""
    found: dict[Key, list[ErrorDetails]] = {}
    for error in errors:
        found.setdefault(_key(error, raw), []).append(error)
    return found


def _key(error: ErrorDetails, raw: Any) -> Key:
    """The part of an error's place that is in the data; the rest are pydantic's own tags."""
    parts: list[str] = []
    node: Any = raw
    loc: tuple[Any, ...] = error["loc"]
    for part in loc:
        inside = part in node if isinstance(node, Mapping) else isinstance(node, list) and isinstance(part, int)
        if not inside:
            return (*parts, str(part)) if error["type"] == "missing" else tuple(parts)
        parts.append(str(part))
        node = node[part]
    return tuple(parts)


def _value(raw: Any, key: Key) -> Any:
    node: Any = raw
    for part in key:
        node = node[part] if isinstance(node, Mapping) else node[int(part)]
    return node


def _problem(key: Key, errors: list[ErrorDetails], raw: Mapping[str, Any]) -> str:
    name, kinds = ".".join(key), {e["type"] for e in errors}
    if "missing" in kinds:
        return f"{name}: missing, and has no default"
    if kinds & UNKNOWN:
        return f"{name}: no such setting{_elsewhere(key) or nearest(key[-1], _siblings(key))}"
    value = _value(raw, key)
    if kinds == {"literal_error"}:
        choices = re.findall(r"'([^']*)'", " ".join(str(e.get("ctx", {}).get("expected", "")) for e in errors))
        return f"{name}={_shown(value)}: no such choice{nearest(str(value), choices)}"
    if kinds <= {"tuple_type", "list_type"}:
        return f"{name}={_shown(value)}: should be a list, as in {name}=[{_shown(value)}]"
    if kinds == {"dataclass_type"} and (fields := _siblings((*key, ""))):
        return f"{name}={_shown(value)}: has settings of its own, as in {name}.{fields[0]}=...{nearest('', fields)}"
    said = dict.fromkeys(e["msg"].replace("valid tuple", "list").removeprefix("Input should be ") for e in errors)
    return f"{name}={_shown(value)}: should be {' or '.join(said)}"


def _shown(value: Any) -> str:
    """A value as the user would write it."""
    return {True: "true", False: "false", None: "null"}.get(value, str(value)) if _scalar(value) else str(value)


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _siblings(key: Key) -> list[str]:
    """The names that are valid where ``key`` stands."""
    owner: Any = RunConfig
    for part in key[:-1]:
        hints = typing.get_type_hints(owner) if dataclasses.is_dataclass(owner) else {}
        owner = _dataclass_in(hints.get(part))
    return [f.name for f in dataclasses.fields(owner)] if owner is not None else []


def _dataclass_in(hint: Any) -> Any:
    members = typing.get_args(hint) if typing.get_origin(hint) in {typing.Union, types.UnionType} else (hint,)
    return next((m for m in members if dataclasses.is_dataclass(m)), None)


def _elsewhere(key: Key) -> str | None:
    """Where a hyperparameter belongs that was given in ``trainer.method_args``, or in ``clients``."""
    if key[:-1] == ("clients",):
        homes = {"fraction": "trainer.method_args.fraction_fit", "weighting": "aggregator.weighting"}
        homes |= {n: f"trainer.method_args.{n}" for n in ("fraction_fit", "min_clients", "num_clients")}
        return f"; it is {homes[key[-1]]}" if key[-1] in homes else None
    if key[:-1] != ("trainer", "method_args"):
        return None
    from unfed.aggregation.registry import AGGREGATORS
    from unfed.base.params import hyperparameters
    from unfed.objectives.registry import OBJECTIVES

    for group, classes in (("method", OBJECTIVES), ("aggregator", AGGREGATORS)):
        if any(key[-1] in hyperparameters(cls) for cls in classes.values()):
            return f"; hyperparameters of the {group} are {group}.{key[-1]}"
    return None


def _prune(raw: dict[str, Any], key: Key) -> bool:
    """Take ``key`` out; an entry of a list takes the whole list with it."""
    node: Any = raw
    for depth, part in enumerate(key):
        if not isinstance(node, dict) or part not in node:
            return False
        if depth == len(key) - 1 or not isinstance(node[part], dict):
            del node[part]
            return True
        node = node[part]
    return False
