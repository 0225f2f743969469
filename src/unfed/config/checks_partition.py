"""The settings of a partition against each other."""

from __future__ import annotations

import math
from collections.abc import Iterator

from unfed.config.schema import RunConfig


def partition_settings(config: RunConfig) -> Iterator[str]:
    """What is out of range, and what would have no effect."""
    given = config.partition
    scheme, key = (given.rest, "partition.rest") if given.scheme == "target" else (given.scheme, "partition.scheme")
    if not 0 < given.alpha < math.inf:
        yield f"partition.alpha={given.alpha}: must be above 0, and finite"
    if given.scheme == "file" and given.manifest is None:
        yield "partition=file: give partition.manifest=FILE, a partition.json or a file of client -> rows"
    if given.topics is not None and given.topics < 1:
        yield f"partition.topics={given.topics}: must be at least 1, or null"
    if given.over == "topic" and scheme != "dirichlet":
        yield f"partition.over=topic: says what {key}=dirichlet spreads, and {key}={scheme}"
    elif given.topics is not None and scheme != "topic" and given.over != "topic":
        yield f"partition.topics={given.topics}: nothing is dealt by topic; take {key}=topic, or partition.over=topic"
