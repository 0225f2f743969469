"""Modules of a model by name: finding one, its output without what comes after it, and the weights of some."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unfed.base.errors import ConfigError
from unfed.base.types import Batch
from unfed.models.adapter import trainable_parameters
from unfed.models.forward import causal_lm, head_input, run_labelled
from unfed.objectives.base import Scope

_OF_PEFT = re.compile(r"\.(base_layer|lora_\w+|modules_to_save)(\.|$).*")
_PREFIX = "base_model.model."
MODULE_KEY, WEIGHTS_KEY = "method.module_regex", "method.trainable_params_regex"


def find_module(model: nn.Module, pattern: str) -> tuple[str, nn.Module]:
    """The one module of the base model whose whole name ``pattern`` matches; PEFT's own modules are not looked at.

    ``ConfigError`` when there is none, or more than one.
    """
    modules = _own_modules(model)
    found = [name for name in modules if re.fullmatch(pattern, name)]
    if len(found) == 1:
        return found[0], modules[found[0]]
    said = f"{MODULE_KEY}={pattern}: must match the name of one module"
    if not found:
        raise ConfigError([f"{said}; it matches none of this model's{_blocks(modules)}"])
    raise ConfigError([f"{said}; it matches {len(found)} ({', '.join(found[:4])}{', ...' if len(found) > 4 else ''})"])


def _own_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in causal_lm(model).named_modules() if n and not _OF_PEFT.search(f"{n}.")}


def _blocks(modules: Mapping[str, nn.Module]) -> str:
    lists = [(n, m) for n, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) > 0]
    if not lists:
        return ""
    name, blocks = max(lists, key=lambda item: (len(item[1]), -len(item[0])))
    return f" (its blocks are {name}.0 to {name}.{len(blocks) - 1})"


def _enclosing(model: nn.Module, name: str) -> tuple[str, int] | None:
    """The list of blocks that a module stands in, and the number of its block there."""
    inner: Any = causal_lm(model)
    parts = name.split(".")
    for depth in range(1, len(parts)):
        here = ".".join(parts[:depth])
        if isinstance(inner.get_submodule(here), nn.ModuleList):
            return here, int(parts[depth])
    return None


def module_output(model: nn.Module, batch: Batch, pattern: str) -> Tensor:
    """Output ``(B, T, H)`` of the module that ``pattern`` names, in the model's dtype, with its autograd graph.

    The blocks after the module's own hand their input on, and the head runs on no position, so a layer low in the
    model costs what lies below it. A right-padded batch is run without a mask: entries of padding have no meaning.
    """
    name, module = find_module(model, pattern)
    place = _enclosing(model, name)
    inner: Any = causal_lm(model)
    blocks: Sequence[nn.Module] = [] if place is None else list(inner.get_submodule(place[0]))
    caught: list[Tensor] = []

    def catch(_module: nn.Module, _args: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(catch)
    try:
        with head_input(model, _no_position), _handed_on(blocks, -1 if place is None else place[1]):
            run_labelled(model, batch)
    finally:
        handle.remove()
    return caught[0]


def _no_position(hidden: Tensor) -> Tensor:
    return hidden[:, :0]


@contextmanager
def _handed_on(blocks: Sequence[nn.Module], index: int) -> Iterator[None]:
    """Let the blocks after ``index`` return their input, in the form in which that block returns its output."""
    if index < 0:
        yield
        return
    rest: tuple[Any, ...] | None = None

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal rest
        rest = output[1:] if isinstance(output, tuple) else None

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if rest is None else (hidden, *rest)

    handle = blocks[index].register_forward_hook(look)
    undo = [_replaced(block, forward) for block in blocks[index + 1 :]]
    try:
        yield
    finally:
        handle.remove()
        for back in undo:
            back()


def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Set ``module.forward``, and return what puts it back (Accelerate sets one of its own on a dispatched model)."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward

    def back() -> None:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before

    return back


def base_name(parameter: str) -> tuple[str, str]:
    """A parameter's name in the base model, and its module's: those of the adapted weight for a LoRA factor.

    ``base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight`` is ``model.layers.0.mlp.up_proj.weight``.
    """
    plain = parameter.removeprefix(_PREFIX)
    leaf = plain.rpartition(".")[2]
    module = _OF_PEFT.sub("", plain) if _OF_PEFT.search(plain) else plain.rpartition(".")[0]
    return f"{module}.{leaf}", module


def selected(model: nn.Module, scope: Scope) -> dict[str, nn.Parameter]:
    """The trainable parameters that ``scope.trainable`` matches, by the model's own names.

    ``ConfigError`` when there is none.
    """
    trainable = trainable_parameters(model)
    found = {
        name: parameter
        for name, parameter in trainable.items()
        if any(re.fullmatch(p, n) for p in scope.trainable for n in base_name(name))
    }
    if found:
        return found
    some = sorted({base_name(n)[1] for n in trainable})
    raise ConfigError(
        [
            (
                f"{WEIGHTS_KEY}={list(scope.trainable)}: matches none of the {len(trainable)} weights that are trained "
                f"(the modules {', '.join(some[:3])}{', ...' if len(some) > 3 else ''})"
            )
        ]
    )


def check_scope(model: nn.Module, scope: Scope) -> None:
    """Raise ``ConfigError`` when ``scope`` names no module or weight of the model, or weights that cannot learn.

    Names alone are looked at, so a model on the ``meta`` device will do.
    """
    name, _ = find_module(model, scope.module)
    chosen = [base_name(n)[0] for n in selected(model, scope)]
    place = _enclosing(model, name)
    if not scope.only_below or place is None:
        return
    order = [n for n, _ in causal_lm(model).named_modules()]
    last = max(i for i, n in enumerate(order) if f"{n}.".startswith(f"{place[0]}.{place[1]}."))
    before = {_OF_PEFT.sub("", f"{n}.").rstrip(".") for n in order[: last + 1]}
    if not any(n.rpartition(".")[0] in before for n in chosen):
        trained = f"{', '.join(sorted(chosen)[:3])}{', ...' if len(chosen) > 3 else ''}"
        raise ConfigError(
            [
                (
                    f"{MODULE_KEY}={scope.module}: no trained weight lies in or below {name}, so nothing could learn "
                    f"(trained: {trained}); steer a later module, or adapt earlier blocks as well "
                    "(model.model_args.lora_config)"
                )
            ]
        )


def reached(model: nn.Module, pattern: str, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Which of ``parameters`` the output of the module depends on, found by one backward pass over two tokens."""
    device = next(p.device for p in model.parameters())
    ids = torch.zeros((1, 2), dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            output = module_output(model, Batch(ids, torch.ones_like(ids), ids, ("probe",)), pattern)
            if not output.requires_grad:
                return set()
            grads = torch.autograd.grad(output.float().sum(), list(parameters.values()), allow_unused=True)
    finally:
        model.train(was_training)
    return {name for name, grad in zip(parameters, grads, strict=True) if grad is not None}


@contextmanager
def confined(model: nn.Module, scope: Scope | None) -> Iterator[None]:
    """Inside, only the weights of ``scope`` require a gradient; afterwards all is as before."""
    if scope is None:
        yield
        return
    check_scope(model, scope)
    chosen = set(selected(model, scope))
    if scope.only_below:
        chosen = reached(model, scope.module, selected(model, scope))
    frozen = [p for n, p in trainable_parameters(model).items() if n not in chosen]
    for parameter in frozen:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad = True
