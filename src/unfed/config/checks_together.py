"""Aggregators, adapter rules, robust rules and privacy against each other: combinations that are not defined."""

from __future__ import annotations

from collections.abc import Iterator

from unfed.config.schema import RunConfig

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
    privacy = config.privacy
    if privacy is not None and privacy.name in ("central", "local") and not _whole_at_server(adapter):
        yield (
            f"privacy={privacy.name} with aggregator.adapter={adapter}: what clients send beside the rounds' updates "
            "would get no noise; use adapter=fedit or ffa, or privacy=example"
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
    from unfed.aggregation.adapters.registry import ADAPTER_RULES

    rule = ADAPTER_RULES.get(str(adapter))
    return rule is None or rule.whole_at_server
