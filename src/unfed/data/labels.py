"""Wrong answers on purpose, for studies of hostile clients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unfed.base.types import Example


def exchanged_answers(examples: Sequence[Example], rng: np.random.Generator) -> list[Example]:
    """The same questions, each with the answer of another row (of one alone: its own); a random cycle through all."""
    order = rng.permutation(len(examples))
    after = {int(row): int(order[(place + 1) % len(order)]) for place, row in enumerate(order)}
    return [{**e, "answer": examples[after[n]]["answer"]} for n, e in enumerate(examples)]
