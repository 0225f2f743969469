"""The ``unfed`` command: ``unfed <subcommand> [overrides]``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unfed import __version__
from unfed.base.errors import nearest
from unfed.cli.launch import USER_ERROR


@dataclass(frozen=True)
class Command:
    """A subcommand: ``where`` is ``module:function``, imported when it is called. The function takes the remaining
    arguments and returns the exit code."""

    help: str
    where: str


COMMANDS: Mapping[str, Command] = {
    "train": Command("fine-tune an adapter across clients", "unfed.cli.fed_train:finetune"),
    "unlearn": Command("unlearn the target client's forget set", "unfed.cli.fed_train:unlearn"),
    "sequence": Command("meet a file of requests to forget, one after the other", "unfed.cli.sequence:main"),
    "evaluate": Command("score a model or an adapter", "unfed.cli.evaluate:main"),
    "oracle": Command(
        "train and evaluate the model that never saw an unlearning run's forget set", "unfed.cli.show:oracle"
    ),
    "quickstart": Command(
        "learn, forget and measure on a tiny model: three minutes, no network", "unfed.cli.study:quickstart"
    ),
    "real": Command("the same with SmolLM2-135M-Instruct on TOFU", "unfed.cli.study:real"),
    "revert": Command("take an unlearning adapter off again: the adapter beneath it", "unfed.cli.revert:main"),
    "report": Command("write one page that compares finished runs", "unfed.cli.report:report"),
    "compare": Command("put runs that differ in seed together: median and range", "unfed.cli.report:compare"),
    "alternates": Command(
        "have a model write other answers to the forget questions, for AltPO", "unfed.cli.alternates:main"
    ),
    "sweep": Command("runs over methods, recipes, aggregators, ranks and seeds: a row each", "unfed.cli.sweep:sweep"),
    "tune-rank": Command(
        "from a small rank and few modules upwards until a target is met", "unfed.cli.tune_rank:tune_rank"
    ),
    "partition": Command("show who owns what: a table and a picture", "unfed.cli.partition:main"),
    "network": Command(
        "runs across organisations that keep their data: provision, start, submit, ...", "unfed.cli.network:main"
    ),
    "config": Command("print the run that these overrides describe", "unfed.cli.show:config"),
    "plan": Command("print what such a run trains, sends and needs", "unfed.cli.show:plan"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a subcommand; the exit code."""
    parser = _parser()
    given = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    if given.command is None:
        parser.print_help()
        return 0
    command = COMMANDS.get(given.command)
    if command is None:
        print(f"error: unfed {given.command}: no such subcommand{nearest(given.command, COMMANDS)}", file=sys.stderr)
        return USER_ERROR
    module, _, function = command.where.partition(":")
    return int(getattr(importlib.import_module(module), function)(given.rest))


def _parser() -> argparse.ArgumentParser:
    width = max(len(name) for name in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="unfed",
        usage="unfed <subcommand> [key=value ...]",
        description="Federated fine-tuning and unlearning of language models with LoRA adapters.",
        epilog="\n".join(
            [
                "subcommands:",
                *(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()),
                "",
                "Each takes Hydra overrides; unfed <subcommand> --help lists them.",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"unfed {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
