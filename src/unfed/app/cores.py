"""Fed-SB in a run: where its fixed factors come from, what that costs, and the ordinary adapter at the end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel

from unfed.aggregation.adapters.fed_sb import Factors, FedSB, factored, is_fresh, plain, spanned
from unfed.aggregation.base import Aggregator
from unfed.aggregation.lora import lora_pairs
from unfed.app.progress import say
from unfed.app.rundir import RunDir
from unfed.base.errors import AdapterError
from unfed.base.seeding import torch_generator
from unfed.base.types import AdapterState
from unfed.data.chat import EncodedExample
from unfed.federated.client import ClientData
from unfed.models.adapter import restore, snapshot
from unfed.models.core import has_cores, put_cores, take_cores
from unfed.models.load import LoadedModel
from unfed.models.weight_gradient import Sketch, gradient_factors
from unfed.training.loop import Local


def begin(
    directory: RunDir, rule: Aggregator, loaded: LoadedModel, local: Local, clients: Mapping[str, ClientData]
) -> None:
    """Give the model its fixed factors and cores, where the rule asks for them; said, and counted in bytes.

    Of a fresh adapter the clients' gradients make them (of rows to be kept alone), else the adapter itself. The same
    rows give the same factors, so a resumed run makes them again.
    """
    adapters, model = rule.adapters, loaded.model
    if not isinstance(adapters, FedSB) or not isinstance(model, PeftModel):
        return
    opened, up = snapshot(model), 0
    if is_fresh(opened):
        gradients = _gradients(adapters, opened, rule, local, clients)
        up = sum(left.nbytes + right.nbytes for factors, _ in gradients for left, right in factors.values())
        start = spanned(opened, gradients)
        words = f"span the mean gradient over up to {adapters.init_rows} rows of each of {len(gradients)} clients"
    else:
        start = factored(opened)
        words = f"are those of {loaded.adapter_path}, so training stays within what that adapter spans"
    put_cores(model)
    restore(model, start)
    pairs = lora_pairs(start)
    down = len(clients) * sum(start[name].nbytes for pair in pairs.values() for name in pair)
    directory.sent("fixed factors", bytes_up=up, bytes_down=down)
    values = sum(start[a].shape[0] ** 2 for a, _ in pairs.values())
    say(
        f"fed_sb: the fixed factors {words}; sent once, {up / 1e6:.2f} MB up and {down / 1e6:.2f} MB down. In a round "
        f"{values} values travel to and from a client, of {opened.numel} in the adapter"
    )


def _gradients(
    adapters: FedSB, opened: AdapterState, rule: Aggregator, local: Local, clients: Mapping[str, ClientData]
) -> list[tuple[Factors, float]]:
    model = local.model
    assert isinstance(model, PeftModel)
    ranks = {module: opened[a].shape[0] for module, (a, _) in lora_pairs(opened).items()}
    sketch, found = Sketch(ranks, adapters.oversampling, local.seed), []
    for client, data in clients.items():
        rows = data.splits.get("train", ())
        if not rows:
            continue
        drawn = torch.randperm(len(rows), generator=torch_generator(local.seed, "weight-gradient", client))
        chosen = sorted((rows[int(i)] for i in drawn[: adapters.init_rows]), key=len)
        factors = gradient_factors(model, _batches(local, chosen), sketch, local.accelerator.autocast)
        if not all(bool(torch.isfinite(t).all()) for pair in factors.values() for t in pair):
            raise AdapterError(f"aggregator.adapter=fed_sb: the gradient of {client} at the start is not finite")
        found.append((factors, rule.weight(len(rows))))
    return found


def _batches(local: Local, rows: list[EncodedExample]) -> list:
    size = local.args.per_device_train_batch_size
    parts = (rows[i : i + size] for i in range(0, len(rows), size))
    return [local.collation.batch(part).to(local.device) for part in parts]


def end(loaded: LoadedModel, adapter: AdapterState) -> AdapterState:
    """The ordinary adapter that does what ``adapter`` does, with the cores taken off the model."""
    model = loaded.model
    if not isinstance(model, PeftModel) or not has_cores(model):
        return adapter
    take_cores(model)
    return plain(adapter)
