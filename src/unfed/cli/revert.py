"""``unfed revert RUN``: take a second adapter off again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from unfed.cli.launch import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Write the learned adapter beneath the second one of a run again, bit for bit; the exit code."""
    parser = argparse.ArgumentParser(
        prog="unfed revert",
        description="Write the adapter that lies beneath a run's second adapter (recipe=unlearning_adapter or "
        "task_arithmetic) again, bit for bit.",
    )
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("--output", type=Path, help="where to (RUN_reverted beside it unless given)")
    given = parser.parse_args(argv)
    return guarded(lambda: _revert(given.run, given.output))


def _revert(run: Path, output: Path | None) -> int:
    from unfed.app.second import revert

    place = run.with_name(f"{run.name}_reverted") if output is None else output
    digest = revert(run, place).digest()
    print(f"reverted: the adapter beneath {run} is {place} again ({digest})")
    return 0
