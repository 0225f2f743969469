"""What a training leaves in its directory: the adapter that is served, the tokenizer, and what later runs ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unfed.app.probe import ORIGIN_FILE, forget_loss
from unfed.app.rundir import TRAIN_ROWS_FILE, RunDir
from unfed.base.artifacts import write_json
from unfed.base.errors import ArtifactError
from unfed.base.types import AdapterState
from unfed.federated.client import ClientData
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

    Raises ``ArtifactError`` where the directory cannot be written to.
    """
    save_adapter(loaded.model, adapter, directory.path)
    try:
        loaded.tokenizer.save_pretrained(directory.path)
    except OSError as e:
        raise ArtifactError(f"cannot write the tokenizer to {directory.path}: {e.strerror or e}") from e
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
