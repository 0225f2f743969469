"""``unfed sequence``: a file of requests to forget, met one after the other on one model."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unfed.base.errors import ConfigError, UnfedError, nearest
from unfed.cli.launch import guarded
from unfed.config.schema import RunConfig

CONFIG = "unlearn-lora.yaml"
UNITS = ("ids", "clients", "authors", "topics")
KEYS = ("name", *UNITS, "topic_threshold", "forget_split", "retain_split", "recipe", "method", "overrides")
EPILOG = f"""\
REQUESTS.yaml is a list. Each request says what to forget ({", ".join(UNITS)}, or forget_split with retain_split) and
may have a name, a recipe, a method and overrides. Further arguments are Hydra overrides for every request, as for
unfed unlearn; model.model_args.pretrained_model_name_or_path is the model to start from.
"""


def main(argv: Sequence[str]) -> int:
    """``unfed sequence REQUESTS.yaml [overrides]``; the exit code."""
    parser = argparse.ArgumentParser(
        prog="unfed sequence", description="Forget one request after the other, and see what is left after each.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("requests", metavar="REQUESTS.yaml", type=Path, help="the requests, in order")
    parser.add_argument("--directory", type=Path, help="where everything goes (default: saves/sequence/REQUESTS)")
    given, overrides = parser.parse_known_args(list(argv))
    return guarded(lambda: _run(given.requests, given.directory, overrides))


def _run(file: Path, directory: Path | None, overrides: Sequence[str]) -> int:
    asked = read_requests(file)
    where = directory or Path("saves") / "sequence" / file.stem
    steps = configurations(asked, where, overrides, file)
    from unfed.app.progress import say
    from unfed.app.sequence import SEQUENCE_FILE, Plan, run_sequence

    command = " ".join(["unfed", "sequence", str(file), *overrides])
    report = run_sequence(Plan(f"{len(steps)} requests to forget: {file.stem}", command, where, steps))
    for sentence in report.sentences():
        say(sentence)
    say(f"\nreport: {where / 'sequence.html'}    numbers: {where / SEQUENCE_FILE}")
    return 0


def read_requests(file: Path) -> list[dict[str, Any]]:
    """The requests of a file, each with a ``name``. Raises ``UnfedError`` or ``ConfigError`` with all that is wrong."""
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise UnfedError(f"{file}: cannot be read: {e.strerror or e}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UnfedError(f"{file}: not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(found, list) or not found:
        raise UnfedError(f"{file}: must be a list of requests (- clients: [client_1])")
    requests = [dict(r) if isinstance(r, Mapping) else {"": r} for r in found]
    for n, request in enumerate(requests, 1):
        request["name"] = str(request.get("name", f"request_{n}"))
    problems = [f"{file}: request {n}: {p}" for n, r in enumerate(requests, 1) for p in _problems(r)]
    names = [r["name"] for r in requests]
    problems += [f"{file}: two requests are called {n}" for n in dict.fromkeys(names) if names.count(n) > 1]
    if problems:
        raise ConfigError(problems)
    return requests


def _problems(request: Mapping[str, Any]) -> list[str]:
    if "" in request:
        return [f"{request['']!r} is not a mapping (clients: [client_1])"]
    found = [f"{key}: no such key{nearest(str(key), KEYS)}" for key in request if key not in KEYS]
    if not re.fullmatch(r"\w[\w.-]*", request["name"]) or request["name"] == "start":
        found.append(f"name={request['name']}: letters, digits, . _ and - (and not start)")
    units = [u for u in UNITS if request.get(u)]
    if not units and "forget_split" not in request:
        found.append(f"says nothing to forget; give {', '.join(UNITS)} or forget_split")
    if units and "forget_split" in request:
        found.append(f"{units[0]} and forget_split: give one of them")
    if not isinstance(request.get("overrides", []), list):
        found.append("overrides: must be a list (- trainer.method_args.unlearn_epochs=3)")
    return found


def configurations(
    asked: Sequence[Mapping[str, Any]], directory: Path, overrides: Sequence[str], file: Path
) -> dict[str, RunConfig]:
    """The run of every request, on the model to start from. Raises ``ConfigError`` with every request's problems."""
    from unfed.config.compat import resolve

    found: dict[str, RunConfig] = {}
    problems: list[str] = []
    for n, request in enumerate(asked, 1):
        name = request["name"]
        own = tokens(request)
        keys = {_key(o) for o in own}
        place = [f"task_name={quoted(name)}", f"paths.output_dir={quoted(str(directory / f'{n:02d}_{name}'))}"]
        argv = [*(o for o in overrides if _key(o) not in keys | {"task_name", "paths.output_dir"}), *own, *place]
        try:
            found[name] = resolve(argv, CONFIG, files=True)
        except ConfigError as e:
            problems += [f"{file}: request {name}: {p}" for p in e.problems]
    if problems:
        raise ConfigError(problems)
    return {name: replace(c, overwrite=False, resume=False) for name, c in found.items()}


def tokens(request: Mapping[str, Any]) -> list[str]:
    """A request as Hydra overrides."""
    found = []
    for unit in UNITS:
        given = request.get(unit) or ()
        values = given if isinstance(given, list | tuple) else [given]
        if values:
            found.append(
                f"forget.{unit}=[{','.join(str(v) if isinstance(v, int) else quoted(str(v)) for v in values)}]"
            )
    if "topic_threshold" in request:
        found.append(f"forget.topic_threshold={request['topic_threshold']}")
    found += [f"{k}={quoted(str(request[k]))}" for k in ("forget_split", "retain_split") if k in request]
    found += [f"{k}={request[k]}" for k in ("recipe", "method") if k in request]
    return [*found, *map(str, request.get("overrides", ()))]


def quoted(text: str) -> str:
    """A value that Hydra reads as this very text: a backslash is one unless it stands before a quote."""
    return '"' + re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), text) + '"'


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]
