"""``unfed plan``: what a run will train, send and need, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from unfed.aggregation.lora import EXACT_LIMIT, lora_pairs
from unfed.app import build
from unfed.app.methods import unlearning_objective
from unfed.app.recipes import recipe_of
from unfed.app.source import read_source, source_directory
from unfed.app.traffic import Traffic, traffic
from unfed.base.artifacts import read_tensors
from unfed.config.schema import RunConfig
from unfed.data.given import clients_of
from unfed.models.adapter import live_tensors, lora_scaling, trainable_parameters
from unfed.models.load import DTYPES
from unfed.models.second import not_plain_lora
from unfed.models.shapes import adapted_shapes, parameter_shapes
from unfed.models.source import resolve_source
from unfed.models.spec import ADAPTER_WEIGHTS
from unfed.training.args import LoopArgs, loop_args
from unfed.unlearning.federaser import FedEraser

MB = 1e6


@dataclass(frozen=True)
class Plan:
    """Counts and bytes, with all clients in each of ``rounds``: what is ``sent`` is the most that it can be. ``memory``
    splits the estimate of one process's peak into its parts."""

    base_parameters: int
    trainable_parameters: int
    adapter_bytes: int
    clients: int
    rounds: int
    sent: Traffic
    memory: dict[str, float]

    @property
    def bytes_per_round(self) -> float:
        """Both ways, the mean of all rounds."""
        return (self.sent.up + self.sent.down) / max(1, self.rounds)

    @property
    def peak_bytes(self) -> float:
        """Sum of the parts."""
        return sum(self.memory.values())

    def lines(self) -> list[tuple[str, str]]:
        """What to print: (label, value)."""
        share = self.trainable_parameters / max(1, self.base_parameters)
        rows = [
            ("base parameters", f"{self.base_parameters:,}"),
            ("trainable parameters", f"{self.trainable_parameters:,} ({share:.2%})"),
            ("adapter", f"{self.adapter_bytes / MB:.2f} MB"),
            ("clients x rounds", f"{self.clients} x {self.rounds}"),
            ("sent in a round, both ways", f"{self.bytes_per_round / MB:.2f} MB"),
            ("sent to the server in the run, at most", f"{self.sent.up / MB:.2f} MB"),
            ("sent to the clients in the run, at most", f"{self.sent.down / MB:.2f} MB"),
        ]
        rows += [(f"memory: {name}", f"{value / MB:,.0f} MB") for name, value in self.memory.items()]
        return [*rows, ("memory: estimate of the peak", f"{self.peak_bytes / MB:,.0f} MB")]


def plan(config: RunConfig) -> Plan:
    """Work out the plan from the model's shapes (no weights are read) and the configuration.

    The memory estimate counts weights, adapter, gradients, AdamW's two moments, the reference adapter where a method
    needs one, and activations at the configured ``max_length``; measured peaks lie below it when rows are shorter.
    """
    args = loop_args(config.trainer.args) if config.trainer else LoopArgs()
    model_args = config.model.model_args
    source = resolve_source(model_args, config.model.tokenizer_args)
    base = parameter_shapes(model_args, source)
    total = sum(p.numel() for p in base.parameters())
    assert isinstance(base, PreTrainedModel)
    dtype = DTYPES.get(model_args.torch_dtype, torch.float32)
    activations = _activation_bytes(base, config, args, dtype)
    trainable = adapted_shapes(model_args, source)
    trained = sum(p.numel() for p in trainable_parameters(trainable).values())
    travels = torch.float32 if model_args.use_lora else dtype
    shapes = {n: t.shape for n, t in live_tensors(trainable).items()}
    adapter = _values(shapes) * travels.itemsize
    frozen = 0
    if source.adapter is not None and (second := _second_adapter(config, trainable, source.adapter)) is not None:
        shapes, trained, frozen = second, _values(second), adapter
        adapter = trained * travels.itemsize
    named, rounds = _extent(config)
    clients = len(named)
    memory = {
        "base weights": float(total * dtype.itemsize + frozen),
        "adapter, gradients, AdamW": float(trained * (travels.itemsize * 2 + 8)),
        "reference adapter": float(adapter) if _needs_reference(config) else 0.0,
        # The aggregation error is exact for up to that many clients, and keeps their adapters until the round's end.
        "server: mean, update, checkpoint": float((3 + (clients if clients <= EXACT_LIMIT else 0)) * adapter),
        "activations and logits": activations,
    }
    return Plan(total, trained, adapter, clients, rounds, traffic(config, shapes, travels, named, rounds), memory)


def _values(shapes: Mapping[str, torch.Size]) -> int:
    return sum(s.numel() for s in shapes.values())


def _second_adapter(config: RunConfig, model: nn.Module, learned: str) -> dict[str, torch.Size] | None:
    """Shapes of the adapter that a recipe trains on the learned one; ``None`` for one that trains that itself."""
    recipe = recipe_of(config) if config.mode == "unlearn" else None
    if recipe is None or not recipe.demands.second_adapter or not_plain_lora(learned) is not None:
        return None
    state = read_tensors(Path(learned) / ADAPTER_WEIGHTS)
    shape, pairs = recipe.second_adapter(state, lora_scaling(model)), lora_pairs(state)
    found = {}
    for a, b in (pairs[module] for module in shape.modules):
        found[a] = torch.Size((shape.r, *state[a].shape[1:]))
        found[b] = torch.Size((state[b].shape[0], shape.r, *state[b].shape[2:]))
    return found


def _activation_bytes(base: PreTrainedModel, config: RunConfig, args: LoopArgs, dtype: torch.dtype) -> float:
    shape = base.config.get_text_config()
    lengths = [d.max_length for d in (config.data.train, config.data.forget, config.data.retain) if d is not None]
    tokens = args.per_device_train_batch_size * max(lengths, default=512)
    hidden, layers = int(shape.hidden_size), int(shape.num_hidden_layers)
    inner = int(getattr(shape, "intermediate_size", 4 * hidden))
    # Kept for the backward pass of one block: about ten tensors of the hidden width and four of the inner one. With
    # checkpointing only the block's input is kept, and one block is alive at a time.
    block = tokens * (10 * hidden + 4 * inner) * dtype.itemsize
    kept = layers * tokens * hidden * dtype.itemsize + block if args.gradient_checkpointing else layers * block
    logits = tokens / 2 * int(shape.vocab_size) * (dtype.itemsize * 2 + 4)
    return float(kept + logits)


def _needs_reference(config: RunConfig) -> bool:
    if config.mode != "unlearn" or config.method is None:
        return False
    needs = unlearning_objective(config).needs
    return needs.reference or needs.reference_distribution


def _extent(config: RunConfig) -> tuple[Sequence[str], int]:
    """The clients' names, and the rounds."""
    if config.trainer is None:
        return ("local",), 0
    given = config.trainer.method_args
    if not build.is_federated(config):
        return ("local",), 1
    rounds = _rounds(config, given.global_rounds) if config.mode == "unlearn" else given.global_rounds
    manifest = build.find_manifest(config)
    if given.num_clients is None and manifest is not None:
        return clients_of(manifest), rounds
    return [f"client_{c}" for c in range(given.num_clients or build.DEFAULT_CLIENTS)], rounds


def _rounds(config: RunConfig, global_rounds: int) -> int:
    """Of an unlearning run, at most: what a recipe that goes back to the fine-tuning can leave out is not looked up."""
    recipe = recipe_of(config)
    place = source_directory(config) if recipe.demands.replay else None
    if place is not None:
        return len(read_source(place)[0].participants) + (recipe.final_rounds if isinstance(recipe, FedEraser) else 0)
    return recipe.rounds_before + global_rounds
