"""Aggregators, adapter rules, robust rules and privacy against each other: combinations that are not defined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from unfed.config.schema import RunConfig

if TYPE_CHECKING:
    from unfed.aggregation.adapters.base import AdapterRule

UNEQUAL_WORK = ("FedNova", "Scaffold")


def combinations(config: RunConfig) -> Iterator[str]:
    """Pairs of settings that each stand alone, with the way out."""
    rule = config.aggregator
    if rule is None:
        return
    adapter = rule.params.get("adapter", "fedit")
    robust = config.robust if config.robust is not None and config.robust.name != "screening" else None
    if robust is not None:
        yield from _robust(config, f"robust={robust.name}", rule.name, adapter)
    if config.partition.ranks is not None:
        yield from _ranks(config, rule.name)
    yield from _privacy(config, adapter)
    yield from _beneath(config, adapter)


def _beneath(config: RunConfig, adapter: object) -> Iterator[str]:
    """Shards are kept and stacked as the adapters that train; what a rule lays beneath those would be lost."""
    found = _rule(adapter)
    if config.recipe is not None and config.recipe.name == "isolated" and found is not None and found.steps == "mean":
        yield (
            f"recipe=isolated with aggregator.adapter={adapter}: what the rule lays beneath the adapter is no part of "
            "a shard; use adapter=fedit (shards are stacked exactly once, at the end)"
        )


def _privacy(config: RunConfig, adapter: object) -> Iterator[str]:
    """Releases that a kind of privacy's noise does not cover, or whose bound is not the one reckoned with."""
    privacy, rule = config.privacy, _rule(adapter)
    if privacy is None or rule is None:
        return
    key = f"privacy={privacy.name} with aggregator.adapter={adapter}"
    if rule.title == "fed_sb" or (privacy.name != "example" and not rule.whole_at_server):
        way = "use adapter=fedit or ffa" + ("" if rule.title == "fed_sb" else ", or privacy=example")
        yield f"{key}: what clients send beside the rounds' updates would get no noise; {way}"
    elif privacy.name == "central" and not rule.linear:
        able = ", ".join(n for n, r in _rules().items() if r.linear and r.whole_at_server)
        yield f"{key}: the rule is no mean of the clients' tensors, so the noise would not hold; use adapter={able}"


def _ranks(config: RunConfig, aggregator: str) -> Iterator[str]:
    """What takes the components that a client of smaller rank has not for a part of its work.

    SCAFFOLD's correction and DP-SGD's noise would move them away from zero while it trains. FedNova lengthens the mean
    step, in which they come as a way back to zero, beyond zero; clipping at the server would shorten work for it.
    """
    key, privacy = "partition.ranks", config.privacy.name if config.privacy is not None else None
    if aggregator == "Scaffold":
        yield f"{key} with aggregator=Scaffold: corrects components that a client has not; use aggregator=FedAvg"
    if aggregator == "FedNova":
        what = "lengthens the step of components that a client has not"
        yield f"{key} with aggregator=FedNova: {what}; use aggregator=FedAvg"
    if privacy == "example":
        yield f"{key} with privacy=example: puts noise on components that a client has not; leave one of them out"
    if privacy == "central":
        yield (
            f"{key} with privacy=central: clips updates whose length is mostly that of components that a client has "
            "not; leave one of them out, or use privacy=local"
        )


def _robust(config: RunConfig, key: str, aggregator: str, adapter: object) -> Iterator[str]:
    if not _whole_at_server(adapter):
        yield (
            f"{key} with aggregator.adapter={adapter}: what a client's factors do together is not known at the server, "
            "so there is nothing to compare; use adapter=fedit, or robust=screening"
        )
    if config.partition.ranks is not None:
        yield (
            f"{key} with partition.ranks: updates of unequal ranks differ by what was cut from their start, which is "
            "no work of the client's; leave one out, or use robust=screening"
        )
    if aggregator in UNEQUAL_WORK:
        yield f"{key} with aggregator={aggregator}: corrects each client's step itself; use aggregator=FedAvg"


def _whole_at_server(adapter: object) -> bool:
    rule = _rule(adapter)
    return rule is None or rule.whole_at_server


def _rule(adapter: object) -> type[AdapterRule] | None:
    return _rules().get(str(adapter))


def _rules() -> Mapping[str, type[AdapterRule]]:
    from unfed.aggregation.adapters.registry import ADAPTER_RULES

    return ADAPTER_RULES
