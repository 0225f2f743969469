"""Adapters of the clients' own in a run: FedSA's, whose B stays at its client, and those of local fine-tuning.

They lie under ``clients/<id>/``, each a PEFT directory, and are made of that client's rows alone (and, through what is
shared, of the others'): no server holds them, and nobody but their client is to read them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unfed.aggregation.base import Aggregator
from unfed.app.own_rows import own_probabilities, own_rows
from unfed.app.progress import say
from unfed.app.rundir import RUN_FILE, RunDir
from unfed.base.artifacts import digest_json, read_json
from unfed.base.types import AdapterState, ServerState
from unfed.config.schema import EvalConfig, RunConfig
from unfed.federated.client import ClientData
from unfed.federated.history import private_dir
from unfed.federated.own import OwnFactors
from unfed.federated.store import CLIENTS_DIR, ClientStore, client_dir
from unfed.models.adapter import restore, save_adapter, snapshot
from unfed.models.generate import Budget
from unfed.models.load import LoadedModel
from unfed.models.spec import ADAPTER_WEIGHTS
from unfed.objectives.nll import NLL
from unfed.training.batches import BatchPlan, TrainRows
from unfed.training.context import Companions
from unfed.training.loop import Local, LocalTask

_AFTER_ALL = 1 << 30
"""A round that no run has."""


def own_factors(
    config: RunConfig, directory: Path, rule: Aggregator, start: ServerState, clients: Mapping[str, ClientData]
) -> OwnFactors:
    """What the rule leaves at the clients, with the store that keeps it below ``directory``.

    A client begins with the B that it has in the adapter's directory, where a run with the same rule made that.
    """
    names = rule.broadcast(start, ()).local
    weights = {c: rule.weight(len(rows)) for c, d in clients.items() if (rows := d.splits.get("train"))}
    earlier = _earlier(config) if names else None

    def before(client_id: str, kind: str) -> AdapterState | None:
        found = None if earlier is None else earlier.get(client_id, kind, _AFTER_ALL)
        return None if found is None or set(found) != names else found

    store = ClientStore(directory, config.engine.entries_kept, before, config.engine.keep_every)
    return OwnFactors(names, weights, store)


def inputs(own: OwnFactors) -> dict[str, str]:
    """Digest of what the clients begin with of their own, which a resumed run must share; nothing without any."""
    there = {c: s.digest() for c, s in own.there(0).items()}
    return {"own": digest_json(there)} if there else {}


def _opened(config: RunConfig) -> Path | None:
    """The directory that the run starts from, where it has adapters of clients."""
    args = config.model.model_args
    places = (args.lora_model_path, args.pretrained_model_name_or_path)
    return next((Path(p) for p in places if p is not None and (Path(p) / CLIENTS_DIR).is_dir()), None)


def _earlier(config: RunConfig) -> ClientStore | None:
    place = _opened(config)
    record = read_json(place / RUN_FILE) if place is not None and (place / RUN_FILE).is_file() else {}
    made = record.get("personal") if isinstance(record, dict) else None
    fits = isinstance(made, dict) and made.get("rule") == "fedsa"
    return ClientStore(place) if place is not None and fits else None


def remind(config: RunConfig, targets: tuple[str, ...]) -> list[str]:
    """What is to be said where adapters of clients, made before, still know what is to be forgotten."""
    place = _opened(config)
    if place is None or not targets:
        return []
    found = sorted(d for d in (place / CLIENTS_DIR).iterdir() if (d / ADAPTER_WEIGHTS).is_file())
    theirs = [str(d) for d in found if d.name in {client_dir(t) for t in targets}]
    if not found:
        return []
    what = f"; {', '.join(theirs)} learnt the forget rows and must be deleted" if theirs else ""
    said = f"the clients' own adapters in {place / CLIENTS_DIR} are as they were before this run{what}"
    say(f"WARNING: {said}")
    return [said]


@dataclass(frozen=True)
class Personal:
    """What the adapters of the clients are made with. ``adapter``: what is served."""

    config: RunConfig
    directory: RunDir
    loaded: LoadedModel
    local: Local
    adapter: AdapterState
    clients: Mapping[str, ClientData]

    def finish(self, own: OwnFactors, state: ServerState) -> None:
        """Make, score and keep every client's adapter, and say how they do; the served one is in the model afterwards.

        ``state``: after the last round, before anything was joined for serving. Does nothing where clients have no
        adapter of their own.
        """
        epochs, there = self.config.personalise.epochs, own.there(state.round)
        if not there and epochs <= 0:
            return
        given = self.config.eval or EvalConfig()
        budget, rows = Budget(given.max_tokens, given.batch_size), own_rows(self.clients, given.round_limit)
        rows = {c: r for c, r in rows.items() if epochs > 0 or c in there}
        restore(self.loaded.model, self.adapter)
        before = own_probabilities(self.config, self.loaded, budget, rows)
        entries: dict[str, dict[str, Any]] = {}
        for client in rows:
            adapter = self._tuned(client, own.of(client, state) if there else self.adapter)
            if adapter is None:
                continue
            restore(self.loaded.model, adapter)
            after = own_probabilities(self.config, self.loaded, budget, {client: rows[client]})[client]
            self._keep(client, adapter)
            entries[client] = {"before": before[client], "after": after, "adapter": adapter.digest()}
        restore(self.loaded.model, self.adapter)
        note = {"rule": "fedsa" if own.names else None, "epochs": epochs, "directory": CLIENTS_DIR}
        self.directory.note(personal={**note, **_summary(entries), "clients": entries})
        if own.names:
            self.directory.sent("served", bytes_up=own.nbytes(state.round))
        self._say(entries, own.nbytes(state.round) if own.names else None)

    def _tuned(self, client: str, start: AdapterState) -> AdapterState | None:
        """``start``, fine-tuned on the client's retained rows; ``None`` where that left numbers that are not finite."""
        epochs = self.config.personalise.epochs
        if epochs <= 0:
            return start
        restore(self.loaded.model, start)
        args, objective = self.local.args, NLL()
        plan = BatchPlan(
            rows=TrainRows({"train": self.clients[client].splits["train"]}),
            driver="train",
            needs=objective.needs.splits,
            batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            seed_path=("personal", client),
            workers=args.dataloader_num_workers,
        )
        self.local.train(LocalTask(plan, objective, epochs), Companions())
        adapter = snapshot(self.loaded.model)
        if all(bool(torch.isfinite(t).all()) for t in adapter.values() if t.is_floating_point()):
            return adapter
        say(f"WARNING: {client} gets no adapter of its own: fine-tuning it gave values that are not finite")
        return None

    def _keep(self, client: str, adapter: AdapterState) -> None:
        root = self.directory.path / CLIENTS_DIR
        private_dir(root)
        place = root / client_dir(client)
        private_dir(place)
        save_adapter(self.loaded.model, adapter, place)
        for file in place.iterdir():
            if file.is_file():
                file.chmod(0o600)

    def _say(self, entries: Mapping[str, Mapping[str, Any]], sent: int | None) -> None:
        place = self.directory.path / CLIENTS_DIR
        if sent is not None:
            say(
                "fedsa: what is served is the shared A with the mean of the clients' B, which they sent once, after "
                f"the last round ({sent / 1e6:.2f} MB up)"
            )
        if entries:
            mean = _summary(entries)
            say(
                f"{len(entries)} adapters of the clients' own, in {place} (not the server's; their client's alone): "
                f"probability of their own answers {mean['before_mean']:.3f} with the served adapter, "
                f"{mean['after_mean']:.3f} with their own; worst {mean['before_worst']:.3f} and "
                f"{mean['after_worst']:.3f}"
            )


def _summary(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    found = {}
    for when in ("before", "after"):
        if values := [float(e[when]) for e in entries.values()]:
            found |= {f"{when}_mean": math.fsum(values) / len(values), f"{when}_worst": min(values)}
    return found
