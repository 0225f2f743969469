"""The loss of a few forget rows, at the end of a run and at the start of the next: a lost adapter shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unfed.app.progress import say
from unfed.base.artifacts import read_json
from unfed.federated.client import ClientData
from unfed.models.load import LoadedModel
from unfed.training.loop import Local, mean_nll

ORIGIN_FILE = "unfed.json"
PROBE_ROWS = 8


def origin_of(adapter: str | Path | None) -> Mapping[str, Any]:
    """What the run that made an adapter wrote beside it (nothing for an adapter from elsewhere)."""
    if adapter is None or not (Path(adapter) / ORIGIN_FILE).is_file():
        return {}
    found = read_json(Path(adapter) / ORIGIN_FILE)
    return found if isinstance(found, Mapping) else {}


def forget_loss(local: Local, clients: Mapping[str, ClientData]) -> dict[str, Any] | None:
    """Mean loss of the first forget rows in the order of their ids (the same rows whoever asks), and those ids."""
    by_id = {e.example_id: e for d in clients.values() for e in d.splits.get("forget", ())}
    ids = sorted(by_id)[:PROBE_ROWS]
    return {"ids": ids, "value": mean_nll(local, [by_id[i] for i in ids])} if ids else None


def probe_forget_loss(
    local: Local, clients: Mapping[str, ClientData], targets: Sequence[str], loaded: LoadedModel
) -> dict[str, Any]:
    """The forget loss at the start of unlearning beside the one that fine-tuning left, so a lost adapter shows."""
    if not targets:
        return {}
    probe = forget_loss(local, clients)
    assert probe is not None  # a target owns forget rows
    now, stored = probe["value"], origin_of(loaded.adapter_path).get("forget_loss")
    agrees = None
    if stored is not None and stored.get("ids") == probe["ids"]:
        agrees = bool(abs(now - stored["value"]) <= 0.1 + 0.1 * abs(stored["value"]))
    if agrees is False and stored is not None:
        say(
            f"WARNING: the forget rows have loss {now:.3f} now and had {stored['value']:.3f} after fine-tuning: the "
            "adapter, its base or the chat template is not the one that was trained"
        )
    say(f"forget loss at the start: {now:.4f} nats a token" + (" (as after fine-tuning)" if agrees else ""))
    return {"forget_loss_at_start": now, "forget_loss_stored": stored, "forget_loss_agrees": agrees}
