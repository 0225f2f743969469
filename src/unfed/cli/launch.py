"""Start a run from a command line: checked first, then Hydra's own way."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unfed.base.errors import UnfedError
from unfed.base.stopping import Stopped, stoppable
from unfed.config.schema import RunConfig

USER_ERROR = 2
INTERRUPTED = 130
GO_ON = "A training run goes on from its last finished round with resume=true"
KNOWN_WARNINGS = (
    r"`is_gradient_checkpointing` is deprecated",  # transformers about PEFT's use of it
    r"The PEFT config's `base_model_name_or_path` was renamed",  # a path and its absolute form
)
"""Warnings of libraries about each other that a user can do nothing about."""


def guarded(command: Callable[[], int]) -> int:
    """Run a command; what the user can mend ends in its message on stderr and 2, Ctrl-C in 130, SIGTERM in 143."""
    for known in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=known)
    try:
        with stoppable():
            return command()
    except UnfedError as e:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {e}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USER_ERROR
    except Stopped as e:
        print(f"{e}. {e.where or GO_ON}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        print(f"interrupted. {GO_ON}", file=sys.stderr)
        return INTERRUPTED


def launch(argv: Sequence[str] | None, config_name: str, program: str) -> int:
    """Run what a Hydra command line asks for (``--cfg job``, ``--help`` and ``--multirun`` too); the exit code.

    ``program`` names the log file. ``argv=None`` takes the process's own arguments.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    return guarded(lambda: _launch(given, config_name, program))


def _launch(argv: list[str], config_name: str, program: str) -> int:
    import hydra

    from unfed.config.compat import settle
    from unfed.config.load import config_dir

    settled = settle(argv, config_name)
    if not any(token.startswith("hydra.job.name=") for token in settled):
        settled.append(f"hydra.job.name={program}")
    before = sys.argv
    sys.argv = [before[0], *settled]
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(_job)()
    except SystemExit as e:  # of _job, or of Hydra after --help (0) or a traceback (1)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    finally:
        sys.argv = before
    return 0


def _job(cfg: Any) -> None:
    """One run. Hydra would print a traceback for an exception, so a user's error leaves here as an exit."""
    code = guarded(lambda: _run(cfg))
    if code:
        _leave_no_empty_directory()
        raise SystemExit(code)


def _leave_no_empty_directory() -> None:
    """Hydra makes the output directory before the run can be refused; a refused one has nothing in it."""
    from hydra.core.hydra_config import HydraConfig

    with contextlib.suppress(OSError):  # what is not empty stays
        Path(HydraConfig.get().runtime.output_dir).rmdir()


def _run(cfg: Any) -> int:
    from unfed.app.runs import run
    from unfed.config.load import from_hydra

    run(_in_its_own_directory(from_hydra(cfg)))
    return 0


def _in_its_own_directory(config: RunConfig) -> RunConfig:
    """In a sweep, the directory that Hydra made for this run of it."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return config
    return replace(config, paths=replace(config.paths, output_dir=hydra.runtime.output_dir))
