"""The clients' LoRA ranks, and whether the run's adapter and recipe go with them and with the adapter rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from unfed.aggregation.adapters.fedit import FedIT
from unfed.aggregation.adapters.registry import ADAPTER_RULES
from unfed.aggregation.base import Aggregator
from unfed.app.progress import say
from unfed.base.artifacts import read_json
from unfed.base.errors import ConfigError
from unfed.config.checks_ranks import KEY, count_problem, shown
from unfed.config.schema import RunConfig
from unfed.federated.schedule import Schedule
from unfed.models.spec import ADAPTER_CONFIG, LoraArgs

_DORA = "lora_magnitude_vector"


def client_ranks(config: RunConfig, clients: Sequence[str]) -> dict[str, int]:
    """By client: its rank, where it trains another than the adapter's (less; then it trains the first components).

    Raises ``ConfigError`` for ranks that do not go with the clients, the adapter or the adapter rule, and for an
    adapter that the rule cannot average.
    """
    title = _rule(config)
    opened, known = _opened(config)
    problems = _dora(title, str(opened)) if known.get("use_dora") else []
    ranks = config.partition.ranks
    if ranks is None:
        if problems:
            raise ConfigError(problems)
        return {}
    if wrong := count_problem(config, len(clients)):
        raise ConfigError([*problems, wrong])
    every = [ranks] * len(clients) if isinstance(ranks, int) else list(ranks)
    rank = _greatest(config, known)
    if max(every) > rank:
        first = clients[every.index(max(every))]
        way = (
            f"{opened} has that rank, and clients cannot have more"
            if opened is not None
            else f"set model.model_args.lora_config.r={max(every)}: the adapter has the greatest rank, and the others "
            "train its first components"
        )
        problems.append(f"{shown(ranks)}: {first} has rank {max(every)}, the adapter {rank}; {way}")
    other = {c: r for c, r in zip(clients, every, strict=True) if r < rank}
    rule = ADAPTER_RULES[title]
    if other and not rule.unequal_ranks:
        able = ", ".join(n for n, r in ADAPTER_RULES.items() if r.unequal_ranks)
        problems.append(
            f"{shown(ranks)} with aggregator.adapter={title}: cannot take clients of a smaller rank than the adapter's "
            f"({rank}), because {rule.equal_because}; use one of {able}, or leave {KEY} out"
        )
    if problems:
        raise ConfigError(problems)
    return other


def refuse_dora(rule: Aggregator, adapter: Iterable[str]) -> None:
    """Raise ``ConfigError`` where the opened adapter, by the names of its tensors, has DoRA's magnitudes, and the rule
    works on ``B A`` alone."""
    there = any(_DORA in tensor for tensor in adapter)
    if problems := _dora(rule.adapters.name, "the adapter") if there else []:
        raise ConfigError(problems)


def refuse_own_rules(schedule: Schedule, rule: Aggregator) -> None:
    """Raise ``ConfigError`` where clients have ranks of their own and a recipe's own server rule does not know them.

    Says which client's unlearning would cost the adapter the components that it has not.
    """
    ranks = rule.adapters.ranks
    for phase in schedule.phases if ranks else ():
        if not isinstance(phase.rule, str):
            what = f"the recipe's own server rule ({phase.rule.name}) works on factors of one rank"
            raise ConfigError([f"{KEY}: {what}; leave it out, or take recipe=interleaved or local_then_recover"])
        small = [c for c in phase.work if c in ranks]
        if phase.rule == "adopt" and small:
            say(
                f"WARNING: {', '.join(small)} of smaller rank than the adapter begin{'s' * (len(small) == 1)} phase "
                f"{phase.name} with its first components, and what it gives back is taken as it is: the others come "
                "back in the rounds after it at best (recipe=interleaved does without such a phase)"
            )


def _rule(config: RunConfig) -> str:
    given = config.aggregator.params.get("adapter") if config.aggregator is not None else None
    return FedIT.title if given is None else str(given)


def _dora(title: str, what: str) -> list[str]:
    if title == FedIT.title:
        return []
    why = "whose effective weight is not linear in B A (its magnitudes rescale it)"
    return [f"aggregator.adapter={title}: {what} is DoRA, {why}; only adapter=fedit averages it"]


def _opened(config: RunConfig) -> tuple[str | None, dict[str, Any]]:
    """The directory of the adapter that the run opens, and what its configuration says (none, and nothing)."""
    args = config.model.model_args
    for place in (args.lora_model_path, args.pretrained_model_name_or_path):
        if place is not None and (Path(place) / ADAPTER_CONFIG).is_file():
            found = read_json(Path(place) / ADAPTER_CONFIG)
            return place, found if isinstance(found, dict) else {}
    return None, {}


def _greatest(config: RunConfig, known: dict[str, Any]) -> int:
    """The adapter's rank: the greatest of its modules'."""
    if known:
        return max([int(known.get("r", 8)), *(known.get("rank_pattern") or {}).values()])
    lora = config.model.model_args.lora_config or LoraArgs()
    return max([lora.r, *lora.rank_pattern.values()])
