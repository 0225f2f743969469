"""What ``clients.*`` may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from unfed.base.params import STRICT


@dataclass(frozen=True)
class ClientsConfig:
    """Who is asked in each round, who comes back in time, and how much each does.

    ``availability``: for ``sampling=trace``, see :func:`unfed.federated.sampling.read_trace`. ``number``: clients a
    round, instead of ``trainer.method_args.fraction_fit``. ``local_steps``: optimizer steps of a round of plain
    training; ``None``: ``num_train_epochs``. The others: see :class:`unfed.federated.turnout.Conditions`.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    sampling: Literal["uniform", "by_size", "trace"] = "uniform"
    availability: str | None = None
    number: int | None = None
    oversample: float = 1.0
    local_steps: int | None = None
    speed: float | Mapping[str, float] = 1.0
    speed_spread: float = 0.0
    speed_jitter: float = 0.0
    dropout: float = 0.0
    deadline: float | None = None
