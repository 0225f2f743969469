"""``unfed tune-rank``: the smallest adapter with which unlearning meets a target."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unfed.cli.launch import guarded

if TYPE_CHECKING:  # they bring torch, which takes seconds that a mistake should not
    from unfed.app.targets import Target
    from unfed.app.tune_rank import Tried
    from unfed.config.sweep_runs import Composer

DEFAULT = "unlearn-lora.yaml"
NOT_MET = 1
SHORT = {name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
EPILOG = """\
Targets are METRIC>=NUMBER or METRIC<=NUMBER; a number may be a share of what another model scores, which has the same
rank and modules: 'model_utility>=0.95*finetuned', 'forget_Q_A_Prob<=1.1*oracle'.

Each step fine-tunes, unlearns and evaluates. Without --finetune both stages are those of unfed quickstart: its tiny
model, its invented people, no network; further arguments are overrides of both. With --finetune, that holds the
overrides of the fine-tuning, and the other arguments are those of the unlearning. The same command again keeps the
steps that are done.

Exit code: 0 a step meets the targets, 1 none does (the nearest is named), 2 a mistake was found before the first step.
"""


def tune_rank(argv: Sequence[str]) -> int:
    """``unfed tune-rank --target ... <overrides>``; the exit code."""
    parser = _parser()
    given, overrides = parser.parse_known_args(list(argv))
    command = shlex.join(["unfed", "tune-rank", *argv])
    return guarded(lambda: _tune(given, overrides, command))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unfed tune-rank", usage="unfed tune-rank --target TARGET [options] [key=value ...]", allow_abbrev=False,
        description="Go from a small rank and few modules upwards until the targets hold.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--target", action="append", default=[], metavar="TARGET", help="what has to hold (may be given again)")
    add("--ranks", metavar="R,R", help="for each --modules in turn (default: 4,8,16 on q,v, then 16,32,64 on all)")
    add("--modules", action="append", metavar="NAME,NAME", help="where adapters go; q stands for q_proj, and so on; "
        "all: what the model's configuration names (may be given again)")  # fmt: skip
    add("--name", default="default", help="names the directory (default: %(default)s)")
    add("--directory", type=Path, default=Path("saves/tune_rank"), help="where they lie (default: %(default)s)")
    add("--finetune", metavar="'OVERRIDES'", help="overrides of the fine-tuning (default: the quickstart's)")
    add("--finetune-config", default="train-lora.yaml", metavar="NAME", help="its kind (default: %(default)s)")
    add("--config-name", default=DEFAULT, help="what kind of unlearning (default: %(default)s)")
    return parser


def _tune(given: argparse.Namespace, overrides: Sequence[str], command: str) -> int:
    from unfed.app.runs import run
    from unfed.app.sweep import Ledger
    from unfed.app.targets import FINETUNED, known_metrics, read_target
    from unfed.app.tune_rank import climb, step_values, steps_of
    from unfed.base.errors import ConfigError
    from unfed.config.sweep_runs import checked

    if not given.target:
        raise ConfigError(["there is no target; give for example --target 'model_utility>=0.55'"])
    targets = [read_target(text) for text in given.target]
    ladder = [step_values(rank, modules) for rank, modules in _ladder(given)]
    _not_given([*overrides, *shlex.split(given.finetune or "")])
    composer = _composer(given, list(overrides), targets, list({k: k for values in ladder for k in values}))
    runs = checked(composer, ladder)
    known_metrics(runs[0].config, [t.metric for t in targets])
    if compared := [t.metric for t in targets if t.of == FINETUNED]:
        assert runs[0].finetune is not None
        known_metrics(runs[0].finetune, compared)
    tried = climb(steps_of(runs), targets, Ledger(composer.directory, command), run)
    return _show(tried, targets, composer.directory)


def _ladder(given: argparse.Namespace) -> list[tuple[int, tuple[str, ...] | None]]:
    from unfed.app.tune_rank import ATTENTION, LADDER
    from unfed.base.errors import ConfigError

    if given.ranks is None and given.modules is None:
        return list(LADDER)
    texts = (given.ranks or "4,8,16,32,64").split(",")
    wrong = [t for t in texts if not t.strip().isdigit() or int(t) < 1]
    if wrong:
        raise ConfigError([f"--ranks {given.ranks}: {t!r} should be a whole number of 1 or more" for t in wrong])
    modules = [_modules(text) for text in given.modules] if given.modules else [ATTENTION, None]
    return [(int(rank), named) for named in modules for rank in texts]


def _modules(text: str) -> tuple[str, ...] | None:
    from unfed.base.errors import ConfigError, nearest

    names = tuple(SHORT.get(n.strip(), n.strip()) for n in text.split(","))
    if names == ("all",):
        return None
    if wrong := [n for n in names if not n.replace(".", "_").isidentifier()]:
        raise ConfigError([f"--modules {text}: {n!r} is no module{nearest(n, [*SHORT, 'all'])}" for n in wrong])
    return names


def _not_given(overrides: Sequence[str]) -> None:
    from unfed.app.tune_rank import LORA
    from unfed.base.errors import ConfigError

    own = {f"{LORA}.r": "--ranks", f"{LORA}.lora_alpha": "--ranks", f"{LORA}.target_modules": "--modules"}
    taken = [o for o in overrides if o.lstrip("+").partition("=")[0] in own]
    if taken:
        raise ConfigError([f"{o}: each step has its own; see {own[o.lstrip('+').partition('=')[0]]}" for o in taken])


def _composer(given: argparse.Namespace, overrides: list[str], targets: list[Target], keys: list[str]) -> Composer:
    """Both stages' overrides: the quickstart's, or those of ``--finetune`` and of the command line."""
    from unfed.app.targets import FINETUNED
    from unfed.config.sweep import Choice, Sweep
    from unfed.config.sweep_runs import Composer, FineTuning

    directory = given.directory / given.name
    first = shlex.split(given.finetune) if given.finetune is not None else None
    if first is None:
        first, overrides = _quickstart(directory, overrides, targets)
    if not any(t.of == FINETUNED for t in targets):
        first.append("eval.enabled=false")  # nobody asks how the fine-tuned model scores
    if any(t.needs_oracle for t in targets) and not any(o.startswith("oracle=") for o in overrides):
        overrides = [*overrides, "oracle=auto"]
    sweep = Sweep(tuple(overrides), dict.fromkeys(keys, Choice(())), (), {k: k for k in keys})
    tuning = FineTuning(tuple(first), tuple(keys), given.finetune_config)
    return Composer(directory, sweep, given.config_name, tuning)


def _quickstart(directory: Path, overrides: list[str], targets: Sequence[Target]) -> tuple[list[str], list[str]]:
    """The overrides of the quickstart's fine-tuning and unlearning; its model is made where it is not there."""
    import torch

    from unfed.app.progress import say
    from unfed.app.targets import FINETUNED, known_metrics
    from unfed.app.tiny_base import tiny_base
    from unfed.cli.study import PATH, QUICKSTART
    from unfed.config.compat import resolve

    shared = [f"model={QUICKSTART.model}-lora", *overrides]
    learn = [f"experiment=finetune/{QUICKSTART.experiment}", *shared]
    forget = [f"experiment=unlearn/{QUICKSTART.experiment}", *shared]
    unmade = [f"{PATH}=made-after-this-check", "task_name=checked"]
    learning = resolve([*learn, *unmade], "train-lora")
    known_metrics(resolve([*forget, *unmade], "unlearn-lora"), [t.metric for t in targets])
    if compared := [t.metric for t in targets if t.of == FINETUNED]:
        known_metrics(learning, compared)
    torch.set_num_threads(QUICKSTART.threads or torch.get_num_threads())
    base = tiny_base(directory / "base", progress=say)
    return [*learn, f"{PATH}={base}"], forget


def _show(tried: Sequence[Tried], targets: Sequence[Target], directory: Path) -> int:
    from unfed.app.tune_rank import TUNE_FILE, nearest_step, overrides_of

    _print(tried, targets)
    best = nearest_step(tried)
    asked = " and ".join(map(str, targets))
    if best is None:
        print(f"No step could be scored against {asked}: see {directory / TUNE_FILE}.")
        return NOT_MET
    modules = ",".join(best.step.modules)
    if best.met:
        print(f"Rank {best.step.rank} on {modules} meets {asked}.")
    else:
        print(f"No step meets {asked}. Rank {best.step.rank} on {modules} came nearest: {_missing(best, targets)}.")
    print(f"to use it: {shlex.join(overrides_of(best))}")
    print(f"the trail: {directory / TUNE_FILE}")
    return 0 if best.met else NOT_MET


def _missing(best: Tried, targets: Sequence[Target]) -> str:
    said = []
    for target, bound in zip(targets, best.bounds, strict=True):
        value = best.row.metrics.get(target.metric)
        if value is not None and bound is not None and target.shortfall(value, bound) > 0:
            said.append(
                f"{target.metric} is {value:.3g}, and should be at {'least' if target.at_least else 'most'} {bound:.3g}"
            )
    return "; ".join(said)


def _print(tried: Sequence[Tried], targets: Sequence[Target]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from unfed.report.labels import label, number

    metrics = list(dict.fromkeys(t.metric for t in targets))
    table = Table(title="rank and modules, step by step", title_justify="left", show_edge=False)
    for column in ("rank", "modules", "parameters", "MB a round", *map(label, metrics), "met", "seconds"):
        table.add_column(column, justify="left" if column == "modules" else "right", overflow="fold")
    for t in tried:
        names = " ".join(m.removesuffix("_proj") for m in t.step.modules)
        scores = [number(m, t.row.metrics.get(m)) for m in metrics]
        met = ("yes" if t.met else "no") if t.row.status == "finished" else "failed"
        size = f"{t.step.bytes_per_round / 1e6:.3g}"
        row = (str(t.step.rank), names, f"{t.step.trainable_parameters:,}", size, *scores, met, f"{t.seconds:.0f}")
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)
    for t in tried:
        if t.row.reason:
            print(f"failed: {t.row.name}: {t.row.reason}")
