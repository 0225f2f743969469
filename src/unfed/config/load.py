"""The border: a composed Hydra configuration in, a :class:`RunConfig` out, or every problem at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unfed.base.errors import ConfigError, nearest
from unfed.config import checks, shape
from unfed.config.schema import UNSET, RunConfig

CONVENIENCES = frozenset(
    {"dataset", "train_split", "forget_split", "retain_split", "holdout_split", "retain_logs_path"}
)
"""Top-level keys that other keys refer to; they end here."""
NAMED: Mapping[str, tuple[str, ...]] = {
    "method": (), "wrapper": (), "aggregator": (), "recipe": (), "robust": ("max_norm_ratio", "root"),
    "privacy": (), "wire": (),
}  # fmt: skip
"""Groups with a name and hyperparameters; and their settings that are no hyperparameters of what is named."""


def config_dir() -> Path:
    """The Hydra tree: ``configs/`` of a checkout, else ``unfed/_configs`` of the installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parents[1] / "configs"
    found = checkout if (checkout / "unlearn-lora.yaml").is_file() else package / "_configs"
    if not found.is_dir():
        raise ConfigError([f"the configuration files are gone: neither {checkout} nor {found} exists"])
    return found


def from_hydra(cfg: DictConfig) -> RunConfig:
    """Turn a composed configuration into a ``RunConfig``. Nothing on disk is looked at.

    Raises ``ConfigError`` with all problems, each naming the dotted key, its value and the nearest valid names.
    """
    config, problems = examine(cfg)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def examine(cfg: DictConfig) -> tuple[RunConfig | None, list[str]]:
    """As :func:`from_hydra`, but return the problems beside what could be made of the rest.

    A setting that is wrong is left out of the ``RunConfig``, so that the others can still be checked; ``None`` when
    too little is left.
    """
    cfg, problems = _filled(cfg)
    raw = _plain(cfg, "", problems)
    raw.pop("hydra", None)
    problems += _take_unknown(raw)
    config, wrong = shape.validate(_arranged(raw, problems))
    problems += wrong
    if config is not None:
        problems += checks.named_things(config)
        if not problems:
            problems += checks.consistency(config)
    return config, problems


def _filled(cfg: DictConfig) -> tuple[DictConfig, list[str]]:
    """Say what is missing, and put something in its place, so that what refers to it is not a problem as well."""
    missing = list(_missing(OmegaConf.to_container(cfg, resolve=False), ""))
    cfg = cfg.copy() if missing else cfg
    for key in missing:
        OmegaConf.update(cfg, key, UNSET)
    return cfg, [f"{key}: missing, and has no default; give {key}=..." for key in missing]


def _missing(node: Any, prefix: str) -> Iterator[str]:
    """The keys that hold ``???``."""
    for name, value in node.items() if isinstance(node, dict) else ():
        if value == MISSING:
            yield f"{prefix}{name}"
        yield from _missing(value, f"{prefix}{name}.")


def _plain(node: DictConfig, prefix: str, problems: list[str]) -> dict[str, Any]:
    """Resolve leaf by leaf, so that one broken reference does not hide the next."""
    plain: dict[str, Any] = {}
    for name in node:
        key = f"{prefix}{name}"
        try:
            value = node[name]
            if isinstance(value, ListConfig):
                value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as e:
            problems.append(_unresolved(node, str(name), key, e))
            continue
        plain[str(name)] = _plain(value, f"{key}.", problems) if isinstance(value, DictConfig) else value
    return plain


def _unresolved(node: DictConfig, name: str, key: str, error: OmegaConfBaseException) -> str:
    given = OmegaConf.to_container(node, resolve=False)
    assert isinstance(given, dict)
    missing = getattr(error, "__cause__", None) or error
    reason = str(missing).splitlines()[0]
    if key.startswith("trainer.method_args.") and "${method." in str(given[name]):
        reason = "this trainer unlearns, and no method is set; give method=NPO, or take --config-name=unlearn-lora.yaml"
    elif key.startswith("trainer.method_args.") and "${recipe." in str(given[name]):
        reason = "this trainer unlearns, and no recipe is set; give recipe=local_then_recover"
    elif key.startswith("trainer.method_args.") and "${aggregator." in str(given[name]):
        reason = "this trainer has clients, and no aggregator is set; give aggregator=FedAvg"
    return f"{key}={given[name]}: {reason}"


def _take_unknown(raw: dict[str, Any]) -> list[str]:
    """Remove the conveniences and what is not known at the top, and say what was not known."""
    known = shape.top_level()
    problems = []
    for name in list(raw):
        if name in known:
            continue
        raw.pop(name)
        if name == "lora":
            problems.append(
                "lora: choose a preset (lora=quick); single values are model.model_args.lora_config.r, .lora_alpha, ..."
            )
        elif name not in CONVENIENCES:
            problems.append(f"{name}: no such setting{nearest(name, known | CONVENIENCES)}")
    return problems


def _arranged(raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Gather the flat hyperparameters of groups that have a name, and settle what ``null`` stands for."""
    arranged = {name: value for name, value in raw.items() if value is not None}
    if isinstance(arranged.get("task_name"), int | float):
        arranged["task_name"] = str(arranged["task_name"])  # task_name=1 is read as a number
    for group in (*NAMED, "hostile"):
        given = arranged.get(group)
        if isinstance(given, Mapping) and "name" not in given:
            arranged.pop(group)
            what = "attack" if group == "hostile" else group
            problems.append(f"{group}: {', '.join(given)} given, but no {what} is chosen; give {group}=NAME")
        elif isinstance(given, Mapping) and group in NAMED:
            kept = {k: v for k, v in given.items() if k in NAMED[group] or k == "name"}
            arranged[group] = {**kept, "params": {k: v for k, v in given.items() if k not in kept}}
    _settle_precision(arranged)
    return arranged


def _settle_precision(arranged: Mapping[str, Any]) -> None:
    """``trainer.args.bf16: null`` follows the model's dtype."""
    trainer, model = arranged.get("trainer"), arranged.get("model")
    args = trainer.get("args") if isinstance(trainer, Mapping) else None
    if not isinstance(args, dict) or args.get("bf16", True) is not None:
        return
    model_args = model.get("model_args") if isinstance(model, Mapping) else None
    dtype = model_args.get("torch_dtype") if isinstance(model_args, Mapping) else None
    args["bf16"] = dtype == "bfloat16" and not args.get("fp16", False)
