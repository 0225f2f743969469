"""Where clients work, as a part of the whole configuration (:mod:`unfed.config.schema`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from unfed.base.params import STRICT


@dataclass(frozen=True)
class EngineConfig:
    """Where clients work. The last ``keep_checkpoints`` rounds stay on disk and each ``keep_every``-th. ``timeout``:
    the seconds that a client (of ``nvflare``: a site) may take for its part of a round. ``same_versions``: a site or
    worker with another release of a package that decides numbers is refused.

    Of ``nvflare``: ``ping`` are the seconds that a site may leave a question unanswered, ``misses`` how often in a row,
    ``rate`` the bytes a second that a connection carries at least.

    Of ``ray``: ``workers`` are the processes with a base model each (``None``: one for each GPU, or one where there is
    none), ``gpus_per_worker`` what each is given (``None``: 1 where there is a GPU), ``threads`` its CPU threads
    (``None``: as many as this process has), ``address`` the host and port of a Ray cluster that runs already, or
    ``auto`` (``None``: one is started on this machine for the run).
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    name: Literal["inprocess", "ray", "nvflare"] = "inprocess"
    keep_checkpoints: int = 2
    keep_every: int | None = None
    timeout: float = 3600.0
    ping: float = 3.0
    misses: int = 2
    rate: float = 1e6
    same_versions: bool = True
    workers: int | None = None
    gpus_per_worker: float | None = None
    threads: int | None = None
    address: str | None = None

    @property
    def entries_kept(self) -> int:
        """Rounds of what a client keeps for itself: a run may resume at any of the last checkpoints, and needs what the
        client had before it."""
        return self.keep_checkpoints + 1
