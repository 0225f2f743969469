"""Evaluation suites as data, and what an evaluation is asked to do.

A metric says what it needs (columns to score, splits to answer, other metrics) and how it comes of them; the
runner collects the union of the needs in one pass and then asks each metric for its score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from unfed.data.benchmarks import Layout
from unfed.evaluation.cache import EvidenceCache
from unfed.evaluation.logs import ModelLogs
from unfed.evaluation.metric import Suite
from unfed.evaluation.muse import MUSE
from unfed.evaluation.tofu import TOFU
from unfed.models.generate import Budget, Decoding, Progress

SUITES: Mapping[str, Suite] = {"tofu": TOFU, "muse": MUSE}
"""By the name in ``eval.suite``."""


@dataclass(frozen=True)
class SuiteConfig:
    """An evaluation. ``metrics`` names the wanted ones (empty: the suite's default); ``datasets`` maps each
    split to its data set's name, for the record; ``layouts`` to its layout, where it has one of its own.

    ``parity='openunlearning'`` reproduces that code's attention mask, which hides every token equal to the padding id.
    ``progress`` is called with (what, done, total). ``reference`` opens the model that ``mia_reference`` compares with
    and that judges fluency; without it, that is the base beneath an adapter. ``finetuned_logs``: what ``utility``
    divides by. ``classifier``: a sequence classifier's path, for the gibberish metrics. ``cache``: where what the
    model said is looked up and kept.
    """

    metrics: tuple[str, ...] = ()
    suite: Suite = TOFU
    datasets: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    budget: Budget = Budget()
    decoding: Decoding = Decoding()
    max_length: int | None = 512
    parity: Literal["openunlearning"] | None = None
    finetuned_logs: ModelLogs | None = None
    classifier: str | None = None
    progress: Progress | None = field(default=None, compare=False)
    reference: Callable[[], AbstractContextManager[nn.Module]] | None = field(default=None, compare=False)
    cache: EvidenceCache | None = field(default=None, compare=False)
