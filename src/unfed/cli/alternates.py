"""``unfed alternates``: a file of other answers for ``data.alternate``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from unfed.cli.launch import guarded

PRIMARY = "unlearn-lora.yaml"
NOT_USED = ("method", "trainer", "aggregator", "data.alternate", "trainer.method_args.unlearn_trainer_cls")
"""Overrides of the run to come that have no say in this: the one that needs the file would be refused without it."""


def main(argv: Sequence[str] | None = None) -> int:
    """``unfed alternates <the overrides of an unlearning run>``: ask its model for other answers; the exit code."""
    parser = argparse.ArgumentParser(
        prog="unfed alternates",
        usage="unfed alternates [--output FILE] [options] <the overrides of an unlearning run>",
        description="Ask the model for plausible other answers to the forget questions, for data.alternate=FILE.",
        epilog="Overrides are those of unfed unlearn: model, its path, the forget split. AltPO needs such a file.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: saves/alternates/<what is forgotten>.json"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--count", type=int, default=5, help="answers to each question (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="of an answer (default: %(default)s)")
    given, overrides = parser.parse_known_args(argv)
    return guarded(lambda: _run(given, overrides))


def _run(given: argparse.Namespace, overrides: Sequence[str]) -> int:
    from unfed.base.errors import UnfedError
    from unfed.config.compat import resolve

    fitting = [o for o in overrides if o.startswith("-") or not _not_used(o)]
    named = [] if any(o.lstrip("+").startswith("task_name=") for o in fitting) else ["task_name=alternates"]
    config = resolve([*fitting, *named, "eval.enabled=false"], PRIMARY, files=True)
    from unfed.app.requests import words

    split = re.sub(r"[^A-Za-z0-9]+", "_", words(config)).strip("_")
    output = given.output or Path("saves") / "alternates" / f"{split}.json"
    if output.exists() and not given.overwrite:
        raise UnfedError(f"--output={output}: is there already; name another file, or add --overwrite")
    from unfed.app.alternates import Wanted, write_alternates

    wanted = Wanted(given.count, given.temperature, given.max_new_tokens)
    written = write_alternates(config, output, wanted)
    print(f"{written} alternates: {output}    use them with data.alternate={output}")
    return 0


def _not_used(override: str) -> bool:
    key = override.lstrip("+~").split("=", maxsplit=1)[0]
    return key in NOT_USED or key.startswith(("method.", "aggregator."))
