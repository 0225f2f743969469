"""Keeping, while the rounds run, what :mod:`unfed.federated.history` reads later."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from unfed.aggregation.base import Aggregator
from unfed.aggregation.tree import delta, full_like, moved, zip_map
from unfed.base.artifacts import digest_file, read_tensors, remove_leftovers, write_json
from unfed.base.errors import ArtifactError, UnfedError
from unfed.base.types import SERVER, AdapterState, ClientUpdate, ServerState
from unfed.federated.checkpoint import RESIDUAL_FILE
from unfed.federated.history import (
    HISTORY_DIR,
    HISTORY_KINDS,
    KEPT_SUMS,
    START_FILE,
    History,
    HistorySettings,
    Sums,
    file_name,
    numbered,
    private_dir,
    round_dir,
    write_private,
)
from unfed.federated.schedule import FitTask


class HistoryWriter:
    """Keeps what ``settings`` ask for under ``directory/history`` while the rounds run.

    ``sums`` assume that the server adds a fixed multiple of the clients' mean update (FedAvg, FedProx); other rules
    are refused with ``UnfedError``. A few adapters are in memory at a time, whatever the number of clients.
    """

    def __init__(self, directory: Path, settings: HistorySettings, rule: Aggregator) -> None:
        if "sums" in settings.keep and rule.mean_step is None:
            raise UnfedError(
                f"history=sums: {rule.name} with aggregator.adapter={rule.adapters.name} does not just add up the "
                "clients' mean updates, so no sum of a client's updates says what it contributed; use "
                "aggregator=FedAvg or FedProx with adapter=fedit, ffa or rolora, or history=updates"
            )
        self._root = directory / HISTORY_DIR
        self._settings, self._rule = settings, rule
        self._pending = self._root / ".pending"
        self._examples: dict[str, int] = {}

    def begin(self, state: ServerState) -> None:
        """Before the first round, or before a resumed run goes on: what is of later rounds is dropped."""
        if not self._settings.keep:
            return
        private_dir(self._root)
        self._sweep()
        for kind in HISTORY_KINDS:
            for number, place in numbered(self._root / kind):
                if number > state.round or (kind == "updates" and number == state.round):
                    shutil.rmtree(place, ignore_errors=True)
        if state.round == 0:
            write_private(self._root / START_FILE, state.adapter)
            self._write_settings(digest_file(self._root / START_FILE))
            self._write_state(state)
        else:
            self._refuse_gaps(state.round)

    def _sweep(self) -> None:
        """Remove what a killed process was writing: parts of clients' updates, which nobody would ever delete."""
        shutil.rmtree(self._pending, ignore_errors=True)
        for place in (self._root, *(self._root / kind for kind in HISTORY_KINDS)):
            remove_leftovers(place)

    def _write_settings(self, start: str) -> None:
        known = {"keep": self._settings.keep, "every": self._settings.every, "start": start}
        write_json(self._root / "history.json", known)
        (self._root / "history.json").chmod(0o600)

    def _refuse_gaps(self, done: int) -> None:
        """Raise ``ArtifactError`` where what a resumed run would add to is gone: the rest would be wrong unnoticed."""
        reader = History(self._root.parent)
        reader.start()
        gone = [
            kind
            for kind, there in (("sums", reader.sum_rounds()), ("rounds", reader.rounds()))
            if kind in self._settings.keep and done not in there
        ]
        if gone:
            raise ArtifactError(
                f"{self._root}: the {gone[0]} after round {done} are gone, so the history cannot be gone on with; "
                "start afresh with overwrite=true"
            )

    def of_round(self, task: FitTask, state: ServerState, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """Pass the updates on; they are set aside until the round has ended."""
        self._task, self._before, self._examples = task, state, {}
        wanted = self._settings.due(task.round) or "sums" in self._settings.keep
        shutil.rmtree(self._pending, ignore_errors=True)
        for update in updates:
            if wanted and update.client_id != SERVER:
                self._examples[update.client_id] = update.num_examples
                private_dir(self._pending)
                write_private(self._pending_file(update.client_id), delta(update.adapter, state.adapter))
            yield update

    def end_round(self, state: ServerState, client_ids: Sequence[str]) -> None:
        """After the server's step; ``client_ids`` are those whose updates counted."""
        counted = [c for c in client_ids if c in self._examples]
        if "sums" in self._settings.keep and counted:
            self._add_up(state.round, counted)
        if self._settings.due(self._task.round):
            examples = {c: self._examples[c] for c in counted}
            with round_dir(self._root / "updates", self._task.round, {"num_examples": examples}) as part:
                for client in counted:
                    shutil.move(self._pending_file(client), part / file_name(counted.index(client)))
        shutil.rmtree(self._pending, ignore_errors=True)
        self._write_state(state)

    def _pending_file(self, client_id: str) -> Path:
        return self._pending / file_name(list(self._examples).index(client_id))

    def _write_state(self, state: ServerState) -> None:
        if "rounds" not in self._settings.keep:
            return
        with round_dir(self._root / "rounds", state.round, {"slots": sorted(state.opt_state)}) as part:
            write_private(part / "adapter.safetensors", state.adapter)
            if state.base_residual is not None:
                write_private(part / RESIDUAL_FILE, state.base_residual)
            for slot, values in state.opt_state.items():
                write_private(part / f"opt_{slot}.safetensors", values)

    def _add_up(self, number: int, counted: Sequence[str]) -> None:
        """Two sums of every client after this round. One client's tensors are in memory at a time, beside the mean."""
        weights = {c: self._rule.weight(self._examples[c]) for c in counted}
        shares = {c: w / sum(weights.values()) for c, w in weights.items()}
        mean = full_like(self._before.adapter, 0.0)
        for client in counted:
            mean = moved(mean, read_tensors(self._pending_file(client)), shares[client], mean)
        reader = History(self._root.parent)
        known = reader.summed_clients()
        clients = sorted({*known, *counted})
        with round_dir(self._root / "sums", number, {"clients": clients}) as part:
            for index, client in enumerate(clients):
                old = reader.sums(client) if client in known else self._silent_so_far(reader)
                update = read_tensors(self._pending_file(client)) if client in shares else None
                new = self._next_sums(old, mean, update, shares.get(client, 0.0))
                write_private(part / f"own_{file_name(index)}", new.own)
                write_private(part / f"others_{file_name(index)}", new.others)
        for _, place in numbered(self._root / "sums")[:-KEPT_SUMS]:
            shutil.rmtree(place, ignore_errors=True)

    def _silent_so_far(self, reader: History) -> Sums:
        """Of a client that takes part for the first time: all the way so far was the others'."""
        return Sums(full_like(self._before.adapter, 0.0), delta(self._before.adapter, reader.start()))

    def _next_sums(self, old: Sums, mean: AdapterState, update: AdapterState | None, share: float) -> Sums:
        step = self._rule.mean_step
        assert step is not None
        if update is None:
            return Sums(old.own, moved(old.others, mean, step, old.others))
        own = moved(old.own, update, step * share, old.own)
        if share >= 1.0:  # without this client the round would not have been
            return Sums(own, old.others)
        without = zip_map(lambda m, u: (m - share * u) / (1.0 - share), mean, update)
        return Sums(own, moved(old.others, without, step, old.others))
