"""Curves to TensorBoard, or any tracker that Accelerate knows, by ``trainer.args.report_to``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from unfed.app.progress import Track, say
from unfed.base.errors import ConfigError, nearest

NONE = {"none", ""}


def tracker_problems(names: Sequence[str]) -> list[str]:
    """Unknown tracker names."""
    known = [*map(str, LOGGER_TYPE_TO_CLASS), "all", "none"]
    return [f"trainer.args.report_to={n}{nearest(n, known)}" for n in names if n not in known and n not in NONE]


@contextlib.contextmanager
def tracking(names: Sequence[str], directory: Path, run_name: str) -> Iterator[Track | None]:
    """Yield a function that logs numbers at a step, or ``None`` when nothing is to be tracked."""
    if problems := tracker_problems(names):
        raise ConfigError(problems)
    wanted = [n for n in names if n not in NONE]
    available = [str(getattr(t, "value", t)) for t in get_available_trackers()]
    if "all" in wanted:
        wanted = available
    for name in [n for n in wanted if n not in available]:
        say(f"report_to: {name} is not installed; nothing is sent to it")
        wanted.remove(name)
    if not wanted:
        yield None
        return
    chosen: list[Any] = list(wanted)
    accelerator = Accelerator(log_with=chosen, project_dir=directory / "logs")
    accelerator.init_trackers(run_name)

    def track(values: Mapping[str, float], step: int) -> None:
        accelerator.log(dict(values), step=step)

    try:
        yield track
    finally:
        accelerator.end_training()
