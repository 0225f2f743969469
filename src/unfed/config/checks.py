"""What types cannot say: names against their registries, and settings against each other."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from unfed.base.errors import nearest
from unfed.config.checks_clients import client_settings
from unfed.config.checks_engine import engine_settings
from unfed.config.checks_eval import evaluation_settings, metric_names
from unfed.config.checks_partition import partition_settings
from unfed.config.checks_personal import personal_settings
from unfed.config.checks_privacy import privacy_settings
from unfed.config.checks_ranks import lora_settings, ranks_and_rules
from unfed.config.checks_recipe import in_one_place, recipe_settings
from unfed.config.checks_robust import hostile_settings, robust_settings
from unfed.config.checks_together import combinations
from unfed.config.schema import (
    AGGREGATORS,
    FEDERATED_TRAINERS,
    METHODS,
    PRIVACY,
    RECIPES,
    ROBUST,
    WIRES,
    WRAPPERS,
    DatasetConfig,
    MethodArgs,
    RecipeConfig,
    RunConfig,
    TrainerConfig,
)
from unfed.objectives.names import GENERATED_ALTERNATES, WITH_ALTERNATES

FINETUNERS = ("FederatedFinetune", "finetune")
UNLEARNERS = ("FederatedUnlearningTrainer", *METHODS)
RENAMED_ARGS = {
    "evaluation_strategy": "is called eval_strategy now (no, round or phase)",
    "per_gpu_train_batch_size": "is called per_device_train_batch_size now",
    "no_cuda": "is called use_cpu now",
    "logging_dir": "is not used; logs lie in the run directory (task_name, paths.output_dir)",
    "bf16_full_eval": "is not used; model.model_args.torch_dtype decides",
    "per_device_eval_batch_size": "is not used; set eval.batch_size",
}

NAMED: Mapping[str, tuple[str, Sequence[str], str]] = {
    "method": ("method", METHODS, "unfed.objectives.registry:objective_problems"),
    "wrapper": ("wrapper", WRAPPERS, "unfed.objectives.wrappers:wrapper_problems"),
    "aggregator": ("aggregation strategy", AGGREGATORS, "unfed.aggregation.registry:aggregator_problems"),
    "recipe": ("recipe", RECIPES, "unfed.unlearning.registry:recipe_problems"),
    "privacy": ("kind of privacy", PRIVACY, "unfed.aggregation.privacy:privacy_problems"),
    "robust": ("robust rule", ROBUST, "unfed.aggregation.robust_registry:robust_problems"),
    "wire": ("wire format", WIRES, "unfed.federated.wire:wire_problems"),
}
"""Groups with a name and hyperparameters: what they are called, the names, and what checks the hyperparameters."""


def named_things(config: RunConfig) -> list[str]:
    """Names and hyperparameters that a registry knows: method, aggregator, trainer arguments, metrics."""
    problems: list[str] = []
    for group, (what, known, checker) in NAMED.items():
        given = getattr(config, group)
        if given is None:
            continue
        if given.name not in known:
            problems.append(f"{group}.name={given.name}: no such {what}{nearest(given.name, known)}")
        else:  # the registries bring torch, which a mistake in a name should not wait for
            module, _, function = checker.partition(":")
            problems += getattr(importlib.import_module(module), function)(given.name, given.params)
    if config.trainer is not None:
        problems += _trainer_args(config.trainer)
    if config.eval is not None:
        problems += metric_names(config.eval)
    return problems


def _trainer_args(trainer: TrainerConfig) -> list[str]:
    from unfed.training.args import HARMLESS, arg_problems

    old = [n for n in trainer.args if n in RENAMED_ARGS and n not in HARMLESS]
    rest = {n: v for n, v in trainer.args.items() if n not in old}
    return [f"trainer.args.{n}: {RENAMED_ARGS[n]}" for n in old] + arg_problems(rest)


def consistency(config: RunConfig) -> list[str]:
    """Settings that are valid one by one and do not go together, and numbers out of their limits."""
    return [problem for check in CHECKS for problem in check(config)]


def _trainer(config: RunConfig) -> Iterator[str]:
    trainer = config.trainer
    if config.mode == "eval":
        return
    fitting = FINETUNERS if config.mode == "finetune" else UNLEARNERS
    if trainer is None:
        yield f"trainer: mode {config.mode} needs one; give trainer={fitting[0]}"
        return
    handler, everyone = trainer.handler, (*FINETUNERS, *UNLEARNERS)
    if handler not in everyone:
        yield f"trainer.handler={handler}: no such trainer{nearest(handler, everyone)}"
    elif handler not in fitting:
        other = "unlearn-lora" if config.mode == "finetune" else "train-lora"
        yield (
            f"trainer={handler}: does not fit mode={config.mode}; take --config-name={other}.yaml, "
            f"or trainer={fitting[0]}"
        )
    elif config.mode == "unlearn" and config.method is None:
        yield f"method: unlearning needs one{nearest('', METHODS)}"
    elif config.mode == "finetune" and config.method is not None:
        yield f"method={config.method.name}: fine-tuning has no unlearning method; leave it out"
    elif config.mode == "finetune" and config.recipe is not None and config.recipe.name != "isolated":
        yield f"recipe={config.recipe.name}: fine-tuning forgets nothing; leave it out, or take recipe=isolated"
    elif handler in METHODS and config.method is not None and config.method.name != handler:
        yield f"trainer={handler} and method={config.method.name} contradict each other: name one method"
    if handler in everyone and handler not in FEDERATED_TRAINERS:
        yield from _centralised(config, trainer)


def _centralised(config: RunConfig, trainer: TrainerConfig) -> Iterator[str]:
    if config.aggregator is not None:
        yield (
            f"aggregator={config.aggregator.name}: trainer={trainer.handler} works in one place and averages nothing; "
            "leave it out"
        )
    yield from in_one_place(config, trainer.handler)
    usual = MethodArgs()
    given = [n for n in usual.__dataclass_fields__ if getattr(trainer.method_args, n) != getattr(usual, n)]
    yield from (
        f"trainer.method_args.{n}: trainer={trainer.handler} works in one place, without clients; leave it out"
        for n in given
    )


def _wrapper(config: RunConfig) -> Iterator[str]:
    if config.wrapper is None:
        return
    name = config.wrapper.name
    if config.mode != "unlearn":
        yield f"wrapper={name}: goes around an unlearning method, and mode={config.mode} has none; leave it out"
    elif config.method is not None:
        from unfed.objectives.registry import build_objective
        from unfed.objectives.wrappers import WRAPPERS as CLASSES
        from unfed.objectives.wrappers import misfits
        from unfed.unlearning.registry import RECIPES as RULES

        yield from misfits(name, build_objective(config.method.name, config.method.params))
        if config.recipe is not None and not RULES[config.recipe.name].demands.method:
            yield f"wrapper={name}: recipe={config.recipe.name} trains with no method, so there is nothing to go around"
        if CLASSES[name].own_gradient and config.trainer is not None and config.trainer.args.get("fp16"):
            yield (
                f"wrapper={name}: adds up gradients of several backward passes, which fp16's loss scaling would spoil; "
                "use trainer.args.bf16=true"
            )


def _federation(config: RunConfig) -> Iterator[str]:
    trainer = config.trainer
    if trainer is None or trainer.handler not in FEDERATED_TRAINERS:
        return
    a, prefix = trainer.method_args, "trainer.method_args"
    if config.aggregator is None:
        yield f"aggregator: trainer={trainer.handler} needs one{nearest('', AGGREGATORS)}"
    elif a.aggregation_strategy not in {None, config.aggregator.name}:
        yield f"{prefix}.aggregation_strategy={a.aggregation_strategy} contradicts aggregator={config.aggregator.name}"
    if config.method is not None and a.unlearn_trainer_cls not in {None, config.method.name}:
        yield f"{prefix}.unlearn_trainer_cls={a.unlearn_trainer_cls} contradicts method={config.method.name}"
    clients = a.num_clients
    if clients is not None and clients < 1:
        yield f"{prefix}.num_clients={clients}: must be at least 1"
    elif isinstance(a.target_client_idx, int) and not 0 <= a.target_client_idx < (clients or 10**9):
        last = f"0 to {clients - 1}" if clients else "0, 1, ..."
        yield f"{prefix}.target_client_idx={a.target_client_idx}: must be a client of the run ({last}), or all"
    if a.min_clients < 1 or (clients is not None and 1 <= clients < a.min_clients):
        yield f"{prefix}.min_clients={a.min_clients}: must be between 1 and num_clients ({clients})"
    if not 0 < a.fraction_fit <= 1:
        yield f"{prefix}.fraction_fit={a.fraction_fit}: must be above 0 and at most 1"
    fewest = 0 if config.mode == "unlearn" and config.recipe and not _all_in_rounds(config.recipe) else 1
    if a.global_rounds < fewest:
        yield f"{prefix}.global_rounds={a.global_rounds}: must be at least {fewest}"
    if a.unlearn_epochs is not None and not 0 < a.unlearn_epochs < math.inf:
        yield f"{prefix}.unlearn_epochs={a.unlearn_epochs}: must be above 0, and finite"


def _all_in_rounds(recipe: RecipeConfig) -> bool:
    """Whether the recipe does all its work in the global rounds, so that it needs one at least."""
    return recipe.name in ("interleaved", "not_lora") or recipe.params.get("forget") == "none"


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    if config.mode == "finetune" and data.train is None:
        yield "data.train: fine-tuning needs a training set; take experiment=finetune/tofu/default or data=finetune"
    if config.oracle is not None and config.mode != "unlearn":
        yield f"oracle={config.oracle}: belongs to an unlearning run, this one has mode={config.mode}"
    elif config.oracle is not None and config.eval is not None and config.eval.retain_logs_path is not None:
        yield f"oracle={config.oracle} and retain_logs_path={config.eval.retain_logs_path}: give one of them"
    if config.forget.given and config.mode != "unlearn":
        yield f"forget: belongs to an unlearning run, this one has mode={config.mode}"
    if not 0 < config.forget.topic_threshold <= 1:
        yield f"forget.topic_threshold={config.forget.topic_threshold}: must be above 0 and at most 1 (a cosine)"
    if config.mode == "unlearn" and not config.forget.given:
        yield from (
            f"data.{split}: unlearning needs it; take experiment=unlearn/tofu/default or data=unlearn"
            for split in ("forget", "retain")
            if getattr(data, split) is None
        )
        if data.forget is not None and data.retain is not None and (both := _overlap(data.forget, data.retain)):
            yield both
    for key, dataset in datasets(config):
        if dataset.max_length < 1:
            yield f"{key}.max_length={dataset.max_length}: must be at least 1"
        if dataset.limit is not None and dataset.limit < 1:
            yield f"{key}.limit={dataset.limit}: keeps no row; use 1 or more, or null"


def alternate_problems(config: RunConfig) -> Iterator[str]:
    """A method that trains on other answers to the forget questions has some."""
    data, method = config.data, config.method.name if config.method is not None else None
    if config.mode != "unlearn" or data.forget is None:
        return
    if data.alternate is not None and data.idk is not None:
        yield f"data.alternate={data.alternate} and data.idk={data.idk}: give one of them"
    if method in WITH_ALTERNATES and data.forget.question_key is None:
        yield (
            f"method={method}: teaches another answer to each forget question, and plain text "
            "(data.forget.question_key=null) has no questions; take a method that needs none (method=NPO)"
        )
    elif method in GENERATED_ALTERNATES and data.alternate is None:
        model = config.model.model_args.pretrained_model_name_or_path
        yield (
            f"method={method}: needs data.alternate=FILE, other answers to the forget questions. With the same "
            "overrides as this run, this writes it: unfed alternates --output FILE "
            f"model.model_args.pretrained_model_name_or_path={model} forget_split={data.forget.name} "
            "(method=DPO does the same with refusals)"
        )


def _overlap(forget: DatasetConfig, retain: DatasetConfig) -> str | None:
    """TOFU's numbers are percent of its authors: forget10 and retain95 have 5 percent in common."""
    a, b = re.fullmatch(r"forget(\d\d)", forget.name), re.fullmatch(r"retain(\d\d)", retain.name)
    if forget.path != retain.path or a is None or b is None or int(a[1]) + int(b[1]) <= 100:
        return None
    return (
        f"forget_split={forget.name} and retain_split={retain.name} have rows in common; "
        f"take retain_split=retain{100 - int(a[1]):02d}"
    )


def datasets(config: RunConfig) -> list[tuple[str, DatasetConfig]]:
    """The data sets that a run reads, with their keys. Where ``forget.*`` is given, rows are the fine-tuning's."""
    own = ("exclude",) if config.forget.given else ("train", "forget", "retain", "exclude")
    return [(f"data.{name}", dataset) for name in own if (dataset := getattr(config.data, name)) is not None]


def _limits(config: RunConfig) -> Iterator[str]:
    parts = Path(config.task_name).parts  # "." has none: its directory would be the one that holds all runs
    if not config.task_name.strip() or not parts or Path(config.task_name).is_absolute() or ".." in parts:
        yield f"task_name={config.task_name}: must be a name, or a path below saves/{config.mode}"
    multiple = config.collator.pad_to_multiple_of
    if multiple is not None and multiple < 1:
        yield f"collator.pad_to_multiple_of={multiple}: must be at least 1"


CHECKS = (
    _trainer,
    _wrapper,
    recipe_settings,
    privacy_settings,
    personal_settings,
    _federation,
    robust_settings,
    hostile_settings,
    ranks_and_rules,
    client_settings,
    lora_settings,
    combinations,
    _data,
    alternate_problems,
    _limits,
    partition_settings,
    evaluation_settings,
    engine_settings,
)
