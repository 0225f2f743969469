"""Print what a command line would run: its configuration, or its plan."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unfed.cli.launch import guarded

DEFAULT = "unlearn-lora.yaml"
PRIMARY = {"finetune": "train-lora.yaml", "unlearn": DEFAULT, "eval": "eval.yaml"}
"""The primary configuration of an experiment's folder, that of ``unfed train``, ``unlearn`` and ``evaluate``."""


def config(argv: Sequence[str] | None = None) -> int:
    """``unfed config <the arguments of a run>``: the resolved run as YAML. ``--config-name`` as for the run."""
    return _show("config", "the resolved run", _config, argv)


def plan(argv: Sequence[str] | None = None) -> int:
    """``unfed plan <the arguments of a run>``: parameters, traffic and an estimate of memory."""
    return _show("plan", "parameters, traffic, memory", _plan, argv)


def oracle(argv: Sequence[str] | None = None) -> int:
    """``unfed oracle <the arguments of an unlearning run>``: train and evaluate its oracle; the log's path."""
    return _show(
        "oracle", "the result file of that unlearning run's oracle, trained where it was not yet", _oracle, argv
    )


def _show(command: str, what: str, work: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    given = sys.argv[1:] if argv is None else list(argv)
    if not {"-h", "--help"} & set(given):
        return guarded(lambda: work(given))
    print(
        f"unfed {command} [--config-name=NAME] <the overrides of a run>: print {what}.\n\n"
        f"Example: unfed {command} --config-name={DEFAULT} experiment=unlearn/tofu/default task_name=look\n"
        "Without --config-name the experiment decides: finetune/..., unlearn/... or eval/....\n"
        "The overrides are those of unfed train, unlearn and evaluate; unfed unlearn --help lists them."
    )
    return 0


def _primary(argv: Sequence[str]) -> str:
    """The configuration to begin with where ``--config-name`` names none: the one that the experiment is for."""
    named = [token.partition("=")[2] for token in argv if token.lstrip("+").startswith("experiment=")]
    return PRIMARY.get(named[-1].partition("/")[0], DEFAULT) if named else DEFAULT


def _config(argv: Sequence[str]) -> int:
    import yaml

    from unfed.config.compat import resolve

    print(yaml.safe_dump(_plain(resolve(argv, _primary(argv))), sort_keys=False, allow_unicode=True), end="")
    return 0


def _plan(argv: Sequence[str]) -> int:
    from unfed.app.plan import plan as work_out
    from unfed.config.compat import resolve

    lines = work_out(resolve(argv, _primary(argv))).lines()
    width = max(len(label) for label, _ in lines)
    print("\n".join(f"{label:<{width}}  {value}" for label, value in lines))
    return 0


def _oracle(argv: Sequence[str]) -> int:
    from unfed.app.oracle import oracle_logs
    from unfed.app.runs import run
    from unfed.config.compat import resolve

    named = [] if any(token.lstrip("+").startswith("task_name=") for token in argv) else ["task_name=oracle"]
    print(oracle_logs(resolve([*argv, *named], DEFAULT, files=True), run))
    return 0


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
