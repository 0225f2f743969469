"""Which run is what: the base, the fine-tuned model, the oracle, a model that was to forget.

A run directory says it itself: its mode, the adapter that was evaluated, where unlearning began, and whose log it was
compared with. What the user says goes before that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unfed.base.errors import UnfedError
from unfed.report.contents import KNOWN, Model
from unfed.report.read import Run, check_comparable, locate, mapping, read_run

SAID = {"base": "base=RUN", "finetuned": "--finetuned RUN", "oracle": "--oracle RUN"}


@dataclass(frozen=True)
class Given:
    """A run as the user named it."""

    place: Path
    name: str | None = None
    role: str | None = None


@dataclass(frozen=True)
class Item:
    """A model: the run that trained it (known or not) and the run that evaluated it (if any)."""

    training: Run | None
    evaluated: Run | None
    name: str | None = None
    role: str | None = None

    @property
    def runs(self) -> list[Run]:
        """Both, the evaluated one first."""
        return [r for r in (self.evaluated, self.training) if r is not None]

    @property
    def places(self) -> set[Path]:
        """Where they lie, resolved."""
        return {r.place.resolve() for r in self.runs}


def models(given: Sequence[Given]) -> tuple[list[Model], list[str]]:
    """The models in the order of a page, and remarks for its reader.

    Raises ``UnfedError`` when a directory is no run, or when two runs could have a role that there is one of.
    """
    notes: list[str] = []
    items = _pair([(g, read_run(g.place)) for g in given])
    check_comparable([i.evaluated for i in items if i.evaluated])  # before others are found, so that these are named
    items = _with_named_logs(items, notes)
    items = [replace(i, role=i.role or _role(i, items)) for i in items]
    items = _one_of_each(items, {g.place.resolve(): g.role for g in given if g.role})
    unlearned = [r for i in items if i.role == "unlearned" for r in i.runs]
    for role, find in (("oracle", _oracle_places), ("finetuned", _finetuned_places)):
        if role not in {i.role for i in items}:
            items += _found(role, find(unlearned), unlearned, notes)
    order = (*KNOWN, "unlearned", "other")
    items.sort(key=lambda i: order.index(i.role or "other"))
    names = _names(items)
    found = [_model(i, n) for i, n in zip(items, names, strict=True)]
    for item, model in zip(items, found, strict=True):
        notes += _remarks(item, model.name)
    return found, notes


def _pair(runs: Sequence[tuple[Given, Run]]) -> list[Item]:
    """An evaluation in a directory of its own goes with the run that trained what it evaluated."""
    items: list[Item] = []
    for given, run in [r for r in runs if _trains(r[1])]:
        items.append(Item(run, run if run.suite else None, given.name, given.role))
    for given, run in [r for r in runs if not _trains(r[1])]:
        training = _trained_by(run, [i.training for i in items if i.training])
        k = next((k for k, i in enumerate(items) if i.training is training and i.evaluated in (None, training)), None)
        if training is None or k is None:
            items.append(Item(training or _trained_elsewhere(run), run, given.name, given.role))
        else:
            check_comparable([*items[k].runs[:1], run])
            items[k] = replace(
                items[k], evaluated=run, name=given.name or items[k].name, role=given.role or items[k].role
            )
    return items


def _trains(run: Run) -> bool:
    return run.mode in {"finetune", "unlearn"}


def _trained_by(run: Run, known: Iterable[Run]) -> Run | None:
    adapter = mapping(run.scored.get("digests")).get("adapter")
    source = _source(run)
    for other in known:
        same = adapter is not None and adapter == other.record.get("adapter")
        if same or (adapter is None and source is not None and source == other.place.resolve()):
            return other
    return None


def _trained_elsewhere(run: Run) -> Run | None:
    """The training run that an evaluation's model path leads to, if it is there and its adapter is the same."""
    source = _source(run)
    if source is None or not source.is_dir():
        return None
    other = _readable(source)
    return _trained_by(run, [other]) if other is not None and _trains(other) else None


def _source(run: Run) -> Path | None:
    """Where the model of a run came from: the adapter, if it is named apart."""
    args = mapping(mapping(run.config.get("model")).get("model_args"))
    path = args.get("lora_model_path") or args.get("pretrained_model_name_or_path")
    return locate(str(path), run.place) if path else None


def _log_places(runs: Iterable[Run], key: str) -> list[Path]:
    """Directories of the logs that runs name under ``eval``."""
    logs = [(mapping(r.config.get("eval")).get(key), r.place) for r in runs]
    found = [place.parent for path, seen in logs if path and (place := locate(str(path), seen))]
    return list(dict.fromkeys(found))


def _oracle_places(runs: Iterable[Run]) -> list[Path]:
    """Directories whose log some run was compared with."""
    return _log_places(runs, "retain_logs_path")


def _finetuned_places(runs: Sequence[Run]) -> list[Path]:
    """Directories of the fine-tuned model's log; where none is named, of the models that unlearning began with."""
    return _log_places(runs, "finetuned_logs_path") or _start_places(runs)


def _with_named_logs(items: Sequence[Item], notes: list[str]) -> list[Item]:
    """A training run without an evaluation takes one of its adapter that another run's configuration names.

    ``oracle=auto`` writes such evaluations into directories of their own.
    """
    runs = [r for i in items for r in i.runs]
    places = [*_oracle_places(runs), *_log_places(runs, "finetuned_logs_path")]
    logs = [r for p in places if (r := _readable(p)) is not None and r.suite is not None]
    found = []
    for item in items:
        own = next((r for r in logs if item.training and _trained_by(r, [item.training])), None)
        if item.evaluated is None and own is not None:
            notes.append(f"{item.runs[0].place}: its evaluation was found at {own.place}.")
            found.append(replace(item, evaluated=own))
        else:
            found.append(item)
    return found


def _readable(place: Path) -> Run | None:
    try:
        return read_run(place)
    except UnfedError:
        return None


def _start_places(runs: Iterable[Run]) -> list[Path]:
    """Directories of the models that unlearning began with."""
    return list(dict.fromkeys(s for r in runs if r.mode == "unlearn" and (s := _source(r)) and s.is_dir()))


def _role(item: Item, items: Sequence[Item]) -> str:
    runs = [r for i in items for r in i.runs]
    mode = item.training.mode if item.training else ""
    if mode == "unlearn":
        return "unlearned"
    if item.places & set(_oracle_places(runs)):
        return "oracle"
    if mode == "finetune":
        return "finetuned"
    if item.evaluated is None:
        return "other"
    if _is_base(item.evaluated, runs):
        return "base"
    source = _source(item.evaluated)
    return "finetuned" if source is not None and source in _start_places(runs) else "other"


def _is_base(run: Run, runs: Sequence[Run]) -> bool:
    """An evaluation of the model beneath the others' adapters (a fresh adapter, which changes nothing, counts)."""
    digests = mapping(run.scored.get("digests"))
    if digests.get("base") not in {r.record.get("base_fingerprint") for r in runs} - {None}:
        return False
    source = _source(run)
    whole = source is not None and source.is_dir() and not (source / "adapter_config.json").exists()
    return "adapter" not in digests or whole


def _one_of_each(items: Sequence[Item], said: dict[Path, str | None]) -> list[Item]:
    """At most one model of each role that there is one of: the one that was said, or where unlearning began."""
    out = list(items)
    starts = set(_start_places([r for i in items for r in i.runs]))
    rules: tuple[Callable[[Item], bool], ...] = (
        lambda i: any(said.get(p) == i.role for p in i.places),
        lambda i: i.role == "finetuned" and bool(i.places & starts),
    )
    for role in KNOWN:
        rivals = [i for i in out if i.role == role]
        if len(rivals) < 2:
            continue
        chosen = next((c for rule in rules if len(c := [i for i in rivals if rule(i)]) == 1), None)
        if chosen is None:
            raise UnfedError(_which(role, rivals))
        out = [replace(i, role="other") if i in rivals and i is not chosen[0] else i for i in out]
    return out


def _which(role: str, rivals: Sequence[Item]) -> str:
    names = ", ".join(str(i.runs[0].place) for i in rivals)
    return (
        f"{len(rivals)} runs could be the {role} model: {names}. Say which one it is with {SAID[role]}; runs that "
        "differ in their seed are put together by unfed compare"
    )


def _found(role: str, places: Sequence[Path], beside: Sequence[Run], notes: list[str]) -> list[Item]:
    """The one run that the others' configuration names for a role, if it can be read and stand ``beside`` them."""
    run = _readable(places[0]) if len(places) == 1 else None
    if run is None:
        return []
    if run.suite is None:
        notes.append(f"{role}: {run.place} has no evaluation. Evaluate it and give that run with {SAID[role]}.")
        return []
    try:
        check_comparable([*[r for r in beside if r.suite is not None][:1], run])
    except UnfedError as e:
        notes.append(f"{role}: {run.place} is left out. {e}.")
        return []
    notes.append(f"{role}: found at {run.place}, which the configuration of the unlearning run names.")
    return [Item(run if _trains(run) else _trained_elsewhere(run), run, role=role)]


def _names(items: Sequence[Item]) -> list[str]:
    names: list[str] = []
    for item in items:
        run = item.training or item.runs[0]
        own = item.role if item.role in KNOWN else str(run.record.get("task_name") or run.place.resolve().name)
        base = name = item.name or str(own)
        number = 1
        while name in names:
            number += 1
            name = f"{base} ({number})"
        names.append(name)
    return names


def _model(item: Item, name: str) -> Model:
    run, scored = item.training or item.runs[0], item.evaluated
    lora = mapping(mapping(mapping(run.config.get("model")).get("model_args")).get("lora_config"))
    facts = {
        "method": mapping(run.config.get("method")).get("name"),
        "aggregator": mapping(run.config.get("aggregator")).get("name"),
        "lora_r": lora.get("r"),
        "privacy": (spent := mapping(run.record.get("privacy"))).get("kind"),
        "epsilon": spent.get("epsilon"),
        "delta": spent.get("delta"),
        "seed": run.record.get("seed"),
        "device": mapping(run.record.get("versions")).get("device"),
    }
    return Model(
        name=name,
        role=item.role or "other",
        place=item.runs[0].place,
        summary=scored.summary if scored else {},
        entries=scored.entries if scored else {},
        cost=run.cost(),
        losses=[p for p in run.losses() if p[1] == p[1]],
        points=run.points(),
        facts={k: v for k, v in facts.items() if v is not None},
        privacy=spent,
        suite=scored.suite if scored else None,
        ownership=item.training.ownership() if item.training else None,
    )


def _remarks(item: Item, name: str) -> list[str]:
    found = []
    if item.evaluated is None:
        found.append(f"{name}: {item.runs[0].place} has no evaluation, so only its cost is shown.")
    leak = mapping((item.evaluated.entries if item.evaluated else {}).get("privleak"))
    if item.role != "oracle" and leak.get("agg_value") is not None and leak.get("why"):
        found.append(f"{name}: privleak is no comparison with an oracle: {leak['why']}.")
    for run in {r.place: r for r in item.runs}.values():
        status = run.record.get("status")
        if status not in (None, "finished"):
            found.append(f"{name}: {run.place} is marked {status!r}: it did not come to its end.")
        found += [f"{name}: {words}" for words in run.own_adapters()]
        warnings = run.record.get("warnings")
        found += [f"{name}: {w}" for w in warnings] if isinstance(warnings, list) else []
    return found
