"""Tasks of lm-eval: what a run asks for, what is wrong with that, and the tasks themselves. Imports no model."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from unfed.base.errors import ConfigError, UnfedError
from unfed.base.params import STRICT

WMDP = ("wmdp_bio", "wmdp_cyber", "wmdp_chem")
INSTALL = 'pip install "unfed[benchmarks]"'


@dataclass(frozen=True)
class LmEvalArgs:
    """``eval.lm_eval``: benchmarks that lm-eval runs.

    ``tasks``: its names of tasks, groups or tags. ``num_fewshot``: examples before each question (``None``: as the
    task says; a task that says 0, as WMDP does, keeps 0). ``limit`` keeps the first rows of each task.
    ``include_path``: a folder of task files (YAML) that go before lm-eval's own.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    tasks: tuple[str, ...] = WMDP
    num_fewshot: int | None = None
    limit: int | None = None
    include_path: str | None = None
    batch_size: int = 8
    apply_chat_template: bool = False


def limit_problems(args: LmEvalArgs) -> list[str]:
    """Numbers out of their limits; nothing is imported."""
    found = [] if args.tasks else ["eval.lm_eval.tasks: names no task; give eval.lm_eval.tasks=[wmdp_bio]"]
    found += [f"eval.lm_eval.tasks: {t} is named twice" for t in dict.fromkeys(args.tasks) if args.tasks.count(t) > 1]
    if args.num_fewshot is not None and args.num_fewshot < 0:
        found.append(f"eval.lm_eval.num_fewshot={args.num_fewshot}: must be at least 0")
    numbers = {"limit": args.limit, "batch_size": args.batch_size}
    found += [f"eval.lm_eval.{n}={v}: must be at least 1" for n, v in numbers.items() if v is not None and v < 1]
    return found


def task_problems(args: LmEvalArgs) -> list[str]:
    """What is wrong with ``args`` as far as lm-eval's index and local files tell; no network is asked.

    The index of all of lm-eval's tasks takes about ten seconds to read; it is left alone when ``include_path`` and the
    folders that have a task's name hold every task that is asked for.
    """
    if importlib.util.find_spec("lm_eval") is None:
        return [f"eval=lm_eval: the package lm-eval is not installed; {INSTALL}"]
    if args.include_path is not None and not Path(args.include_path).is_dir():
        return [f"eval.lm_eval.include_path={args.include_path}: there is no such directory"]
    index = _manager(args).task_index
    problems = [_unknown(name, index) for name in args.tasks if name not in index]
    for name in (n for n in args.tasks if n in index):
        problems += [f"eval.lm_eval.tasks: {name}: there is no file {f}" for f in _missing_files(index[name].cfg)]
    return problems


def load_tasks(args: LmEvalArgs) -> tuple[Any, dict[str, list[Any]]]:
    """lm-eval's ``TaskManager``, and for each name of ``args.tasks`` what it stands for, with its data loaded.

    A group is one object, a tag the list of its tasks. Raises ``ConfigError`` for names that do not exist, and
    ``UnfedError`` for a task whose data or modules cannot be had, that runs code which a model has written, that
    needs a metric to be downloaded as code, or that needs more than text.
    """
    if problems := limit_problems(args) or task_problems(args):
        raise ConfigError(problems)
    manager, found = _manager(args), {}
    for name in args.tasks:
        with _without_downloaded_code() as refused:
            try:
                loaded = manager.load([name])
            except Exception as e:  # data sets, the hub and the tasks' own modules raise dozens of unrelated types
                why = _needs_code(name, refused) or f"cannot load {name}: {_reason(e)}"
                raise UnfedError(f"eval.lm_eval.tasks: {why}") from e
        if refused:
            raise UnfedError(f"eval.lm_eval.tasks: {_needs_code(name, refused)}")
        for task in loaded["tasks"].values():
            _refuse(name, task)
        group = loaded["groups"].get(name)
        found[name] = [group] if group is not None else list(loaded["tasks"].values())
    return manager, found


def _manager(args: LmEvalArgs) -> Any:
    own = () if args.include_path is None else (args.include_path,)
    some = _index((*_homes(args.tasks), *own), everything=False)
    return some if all(_whole(name, some.task_index) for name in args.tasks) else _index(own, everything=True)


def _homes(names: Sequence[str]) -> list[str]:
    """lm-eval's folders after which ``names`` are called (``wmdp`` of ``wmdp_bio``), where they usually are."""
    spec = importlib.util.find_spec("lm_eval")
    roots = [Path(p) / "tasks" for p in (spec.submodule_search_locations if spec else None) or ()]
    folders = sorted(f for root in roots for f in root.iterdir() if f.is_dir())
    return [str(f) for f in folders if any(n == f.name or n.startswith(f"{f.name}_") for n in names)]


def _whole(name: str, index: Mapping[str, Any]) -> bool:
    """Whether ``index`` holds a task, or a group with all of its parts. Of a tag nobody knows who else carries it."""
    if name not in index or index[name].cfg is None:
        return False
    parts = index[name].cfg.get("task", ())
    return isinstance(parts, str) or all(
        isinstance(part, str) and part != name and _whole(part, index) for part in parts
    )


@cache
def _index(folders: tuple[str, ...], *, everything: bool) -> Any:
    """The tasks in ``folders``; with ``everything`` behind all that lm-eval has."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=everything)


def _unknown(name: str, index: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, index, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? (" if close else "("
    return f"eval.lm_eval.tasks: lm-eval has no task {name!r}; {hint}`lm-eval ls tasks` prints all {len(index)})"


def _missing_files(config: Mapping[str, Any] | None) -> Iterator[str]:
    """Local data files that a task's own configuration names and that are not there."""
    given = ((config or {}).get("dataset_kwargs") or {}).get("data_files") or {}
    for files in given.values() if isinstance(given, Mapping) else (given,):
        for file in [files] if isinstance(files, str) else files:
            if "://" not in file and not any(c in file for c in "*?[") and not Path(file).is_file():
                yield file


def _refuse(name: str, task: Any) -> None:
    """Tasks that are not run: nothing here executes what a model has written, and the models read text only."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UnfedError(f"eval.lm_eval.tasks: {name} runs code that the model has written; Unfed does not do that")
    if getattr(task, "MULTIMODAL", False):
        raise UnfedError(f"eval.lm_eval.tasks: {name} shows images or sounds; Unfed's models read text only")


@contextmanager
def _without_downloaded_code() -> Iterator[list[str]]:
    """A metric that lm-eval does not know it would fetch from the hub as a Python file and run. Yields those names."""
    import evaluate

    refused: list[str] = []

    def load(path: str, *_: Any, **__: Any) -> Any:
        refused.append(path)
        raise UnfedError(path)  # lm-eval catches it and goes on without the metric

    before, evaluate.load = evaluate.load, load
    try:
        yield refused
    finally:
        evaluate.load = before


def _needs_code(name: str, refused: Sequence[str]) -> str:
    if not refused:
        return ""
    return (
        f"{name} needs the metric {refused[0]!r}, which lm-eval does not have itself and would download as code; "
        "Unfed does not run that"
    )


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, ModuleNotFoundError):
        return f"its module {error.name} is not installed; {INSTALL}, or see lm-eval's page on the task"
    text = f"{type(error).__name__}: {first}"
    if isinstance(error, OSError):
        text += ". Without network: a task file with local data in eval.lm_eval.include_path"
    return text


def known_names(found: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    """For each name that was asked for, the names under which lm-eval reports it.

    Its own; for a tag, and for a group that has no score of its own, those of the tasks.
    """
    return {name: [n for o in objects for n in _reported(o)] for name, objects in found.items()}


def _reported(task: Any) -> list[str]:
    if not hasattr(task, "get_all_tasks"):
        return [task.task_name]
    return [task.name] if task.has_aggregation else [t.task_name for t in task.get_all_tasks()]
