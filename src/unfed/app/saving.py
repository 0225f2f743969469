"""What a training leaves in its directory: the adapter that is served, the tokenizer, and what later runs ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unfed.app.probe import ORIGIN_FILE, forget_loss
from unfed.app.progress import say
from unfed.app.rundir import TRAIN_ROWS_FILE, RunDir
from unfed.base.artifacts import write_json
from unfed.base.errors import WriteError
from unfed.base.types import AdapterState, ServerState
from unfed.config.schema import RunConfig
from unfed.federated.checkpoint import Checkpoints
from unfed.federated.client import ClientData
from unfed.federated.rounds import RunKeeper
from unfed.models.adapter import save_adapter
from unfed.models.load import LoadedModel
from unfed.training.loop import Local


def save_run(
    directory: RunDir,
    loaded: LoadedModel,
    local: Local,
    adapter: AdapterState,
    clients: Mapping[str, ClientData],
    seen: Sequence[str],
) -> None:
    """Write ``adapter`` into the model and to disk; ``seen`` are the ids of all rows that it was trained on.

    Raises ``WriteError`` where the directory cannot be written to.
    """
    save_adapter(loaded.model, adapter, directory.path)
    try:
        loaded.tokenizer.save_pretrained(directory.path)
    except OSError as e:
        raise WriteError(f"cannot write the tokenizer to {directory.path}: {e.strerror or e}") from e
    origin: dict[str, Any] = {
        "base": loaded.base,
        "base_fingerprint": loaded.fingerprint,
        "adapter": adapter.digest(),
    }
    write_json(directory.path / TRAIN_ROWS_FILE, list(seen))
    probe = forget_loss(local, clients)  # save_adapter has written the final adapter into the model
    if probe is not None:
        origin["forget_loss"] = probe
    write_json(directory.path / ORIGIN_FILE, origin)


def resumed(config: RunConfig, checkpoints: Checkpoints, fresh: ServerState) -> tuple[ServerState, RunKeeper]:
    """Where the rounds begin: after the last checkpoint of a run that is resumed, else with ``fresh``."""
    found = checkpoints.latest() if config.resume else None
    if found is None:
        if config.resume:
            lost = "no checkpoint can be read" if checkpoints.exist() else "no round was finished yet"
            say(f"resume=true: {lost}, starting with the first round")
        return fresh, RunKeeper(checkpoints=checkpoints)
    state, records = found
    say(f"resuming after round {state.round}")
    return state, RunKeeper(records=records, checkpoints=checkpoints)
