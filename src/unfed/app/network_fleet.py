"""The server's side of a run whose clients are sites of a network: rows by id, what must agree, tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from unfed.app import build
from unfed.app.agreement import refuse_other_base, refuse_other_versions
from unfed.app.fleet import Fleet, Mission
from unfed.app.progress import say
from unfed.app.rundir import PARTITION_FILE, plain
from unfed.app.tasks import task_message
from unfed.app.wire import ServerEnd, wire_of
from unfed.base.artifacts import digest_json
from unfed.base.errors import ClientError, UnfedError
from unfed.base.types import AdapterState, Example, Split
from unfed.config.schema import RunConfig
from unfed.data.chat import EncodedExample
from unfed.data.partition import Partition
from unfed.federated.client import ClientData
from unfed.federated.messages import Message
from unfed.federated.remote import Link, Patience, Remote
from unfed.federated.transport import Transport
from unfed.models.adapter import ADAPTER_NAME
from unfed.models.digest import base_facts
from unfed.models.load import LoadedModel

NOT_FOR_SITES = ("report_to", "run_name", "logging_steps", "output_dir", "eval_strategy")
_SPLITS = ("train", "forget", "retain")


def for_sites(config: RunConfig) -> dict[str, Any]:
    """What the sites are told of a run: the training and the data sets by name, and no path of the server."""
    said = plain(config)
    args = {k: v for k, v in said["trainer"]["args"].items() if k not in NOT_FOR_SITES}
    model = {**said["model"]["model_args"], "pretrained_model_name_or_path": ""}
    for key in ("lora_model_path", "base_model_name_or_path", "gguf_file", "revision"):
        model[key] = None
    data = {split: said["data"][split] for split in _SPLITS}
    return {
        "mode": config.mode,
        "seed": config.seed,
        "trainer": {**said["trainer"], "args": {**args, "report_to": "none"}},
        "method": said["method"],
        "wrapper": said["wrapper"],
        "privacy": said["privacy"],
        "wire": said["wire"],
        "collator": said["collator"],
        "data": {k: v for k, v in data.items() if v is not None},
        "model": {"model_args": model, "template_args": said["model"]["template_args"]},
    }


def patience_of(config: RunConfig) -> Patience:
    """How long sites are waited for."""
    engine = config.engine
    return Patience(work=engine.timeout, ping=engine.ping, misses=engine.misses, rate=engine.rate)


class NetworkFleet(Fleet):
    """Sites reached over ``link``. ``sites``: those that are connected, in order of their names, which are the
    clients' names."""

    has_rows = False

    def __init__(self, link: Link, sites: Sequence[str]) -> None:
        self._link, self._sites = link, sorted(sites)
        self._rows: Mapping[str, Mapping[str, list[str]]] = {}
        self._remote: Remote | None = None

    def resolved(self, config: RunConfig) -> RunConfig:
        """Ask every site for the ids of its rows; the rows to be forgotten are named by their ids from here on."""
        asked = config.trainer.method_args.num_clients if config.trainer is not None else None
        if asked is not None and asked != len(self._sites):
            there = ", ".join(self._sites)
            raise UnfedError(f"num_clients={asked}, and {len(self._sites)} sites take part: {there}")
        self._remote = Remote(self._link, task_message, patience_of(config))
        told = self._ask({site: Message({"do": "describe", "config": for_sites(config)}) for site in self._sites})
        refuse_other_versions({s: m.get("versions", dict) for s, m in told.items()}, strict=config.engine.same_versions)
        self._rows = {site: _ids(site, message) for site, message in told.items()}
        _refuse_twice(self._rows)
        if config.trainer is not None and config.trainer.method_args.target_client_idx is None:
            given = replace(config.trainer.method_args, target_client_idx="all")
            config = replace(config, trainer=replace(config.trainer, method_args=given))
        if config.mode != "unlearn" or config.data.forget_ids:
            return config
        gone = set(config.data.exclude_ids)
        forget = [i for site in self._rows.values() for i in site["forget"] if i not in gone]
        if not forget:
            name = config.data.forget.name if config.data.forget else ""
            raise UnfedError(f"forget_split={name}: no site has a row of it; give forget.ids or forget.clients")
        return replace(config, data=replace(config.data, forget_ids=tuple(forget)))

    def rows(self, config: RunConfig) -> tuple[build.Rows, Partition, str]:
        """Rows by id. A fine-tuning's clients are the sites as they are, an unlearning keeps to its manifest."""
        gone, forget = set(config.data.exclude_ids), set(config.data.forget_ids)
        rows = build.Rows(
            train=self._stubs("train", gone) if config.mode == "finetune" else (),
            forget=self._everywhere(forget) if config.mode == "unlearn" else self._stubs("forget", gone),
            retain=self._stubs("retain", gone | forget) if config.mode == "unlearn" else (),
        )
        named = {split: {e["id"] for e in getattr(rows, split)} for split in _SPLITS}
        for site, own in self._rows.items():
            there = {i for ids in own.values() for i in ids}
            counts = {split: len(there & ids) for split, ids in named.items()}
            say(f"{site}: " + (", ".join(f"{n} {split} rows" for split, n in counts.items() if n) or "no rows of it"))
        if config.mode == "unlearn" and build.find_manifest(config) is not None:
            return rows, *build.settle_partition(config, rows)
        split = "train" if config.mode == "finetune" else "retain"
        clients = {s: tuple(dict.fromkeys([*own[split], *own["forget"]])) for s, own in self._rows.items()}
        known = {e["id"] for e in rows.every()}
        clients = {s: tuple(i for i in ids if i in known) for s, ids in clients.items()}
        clients = {s: ids for s, ids in clients.items() if ids}
        ids = [i for own in clients.values() for i in own]
        return rows, Partition(clients, "sites", config.seed, digest_json(ids)), f"as the {len(clients)} sites have it"

    def clients(
        self, config: RunConfig, loaded: LoadedModel, rows: build.Rows, partition: Partition
    ) -> Mapping[str, ClientData]:
        """Clients whose rows have ids and no tokens."""
        del loaded
        by_split: dict[Split, Sequence[Example]] = {"train": rows.train, "forget": rows.forget}
        if config.mode == "unlearn":
            by_split = {"train": rows.retain, "retain": rows.retain, "forget": rows.forget, "alternate": rows.forget}
        found = {}
        for client, ids in partition.clients.items():
            splits: dict[Split, Sequence[EncodedExample]] = {}
            for split, there in by_split.items():
                named = {e["id"] for e in there}
                splits[split] = [EncodedExample((), (), 0, example_id=i) for i in ids if i in named]
            found[client] = ClientData(client, splits)
        return found

    def keep(self, place: Path, rows: build.Rows, partition: Partition) -> Mapping[str, Any]:
        """Write who owns what; how unlike the sites are cannot be said without their rows."""
        del rows
        partition.write(place / PARTITION_FILE)
        return {}

    @contextmanager
    def transport(self, mission: Mission) -> Iterator[Transport]:
        """Open the run at every site, refuse what does not agree, and bring tasks."""
        assert self._remote is not None
        splits = {"train": mission.rows.train, "forget": mission.rows.forget, "retain": mission.rows.retain}
        engine = mission.config.engine
        head = {
            "do": "open",
            "config": {**for_sites(mission.config), "model": _model(mission)},
            "run": mission.directory.name(),
            "keep": engine.entries_kept,
            "every": engine.keep_every,
        }
        messages = {}
        for site, own in mission.partition.clients.items():
            chosen = {s: [e["id"] for e in rows if e["id"] in set(own)] for s, rows in splits.items()}
            messages[site] = Message({**head, "rows": chosen, "own": list(own)}, {"opened": mission.opened})
        end = ServerEnd(wire_of(mission.config))
        self._remote = Remote(self._link, end.encode, patience_of(mission.config), end.decode)
        here = base_facts(mission.loaded.model, mission.loaded.tokenizer)
        for site, message in self._ask(messages).items():
            refuse_other_base(site, message.get("base", dict), here)
        self._open = list(messages)
        yield self._remote

    def measured(self, state: AdapterState, residual: AdapterState | None) -> Mapping[str, Any]:
        """What the sites tell of how well an adapter knows their rows; those that do not are left out."""
        assert self._remote is not None
        states = {"adapter": state} if residual is None else {"adapter": state, "residual": residual}
        found: dict[str, Any] = {}
        for site, answer in self._remote.ask((s, Message({"do": "measure"}, states)) for s in self._open):
            if isinstance(answer, Message) and isinstance(answer.head.get("measured"), dict):
                found[site] = answer.head["measured"]
                say(f"{site}: {_probabilities(found[site])}")
        return {"sites": found}

    def _ask(self, messages: Mapping[str, Message]) -> dict[str, Message]:
        """Every site's answer; ``UnfedError`` with the reasons of all that gave none."""
        assert self._remote is not None
        found, problems = {}, []
        for site, answer in self._remote.ask(messages.items()):
            if isinstance(answer, ClientError):
                problems.append(f"{site}: {answer}")
            else:
                found[site] = answer
        if problems:
            raise UnfedError("; ".join(problems))
        return found

    def _stubs(self, split: str, without: set[str]) -> tuple[Example, ...]:
        return tuple({"id": i} for own in self._rows.values() for i in own[split] if i not in without)

    def _everywhere(self, ids: set[str]) -> tuple[Example, ...]:
        known = dict.fromkeys(i for own in self._rows.values() for split in _SPLITS for i in own[split])
        return tuple({"id": i} for i in known if i in ids)


def _probabilities(measured: Mapping[str, Any]) -> str:
    """What a site told of its rows, in words; what is no number is left out."""
    told = {k: v.get("probability") for k, v in measured.items() if k in _SPLITS and isinstance(v, Mapping)}
    parts = [f"{k} {v:.3f}" for k, v in told.items() if isinstance(v, float)]
    return f"mean probability of its answers: {', '.join(parts) or 'not told'}"


def _ids(site: str, message: Message) -> dict[str, list[str]]:
    rows = message.head.get("rows")
    found: dict[str, Any] = {s: rows.get(s, []) if isinstance(rows, dict) else None for s in _SPLITS}
    for ids in found.values():
        if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids) or len(set(ids)) < len(ids):
            raise UnfedError(f"{site} names its rows by something else than ids, or one of them twice")
    return found


def _refuse_twice(rows: Mapping[str, Mapping[str, list[str]]]) -> None:
    home: dict[str, str] = {}
    for site, own in rows.items():
        twice = [i for ids in own.values() for i in ids if home.setdefault(i, site) != site]
        if twice:
            raise UnfedError(
                f"{len(twice)} rows of {site} are at {home[twice[0]]} as well (the first: {twice[0]}), and a row has "
                "one owner: take them out at one of the two"
            )


def _model(mission: Mission) -> dict[str, Any]:
    """The model as the sites are to open it: an adapter of the shape that the server's has, wherever that came from."""
    said = for_sites(mission.config)["model"]
    configs = getattr(mission.loaded.model, "peft_config", {})
    if ADAPTER_NAME in configs:
        said["model_args"]["lora_config"] = _shape(configs[ADAPTER_NAME])
    return said


def _shape(own: Any) -> dict[str, Any]:
    def text(value: Any) -> Any:
        return sorted(value) if isinstance(value, set | frozenset) else value

    names = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "rank_pattern", "alpha_pattern")
    lists = ("target_modules", "modules_to_save", "layers_to_transform")
    return {**{n: getattr(own, n) for n in names}, **{n: text(getattr(own, n)) for n in lists}}
