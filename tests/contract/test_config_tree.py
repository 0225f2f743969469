"""Every configuration file composes and passes the border; the files and keys that users know are there."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from unfed.aggregation.registry import AGGREGATORS
from unfed.aggregation.robust_registry import ROBUST_RULES, SCREENING
from unfed.base.errors import ConfigError
from unfed.base.params import hyperparameters
from unfed.config import schema
from unfed.config.compat import resolve
from unfed.config.load import config_dir
from unfed.federated.hostile import ATTACKS
from unfed.federated.wire import WIRES
from unfed.objectives.registry import OBJECTIVES, UNLEARNING_METHODS
from unfed.objectives.wrappers import WRAPPERS
from unfed.unlearning.registry import RECIPES

CONFIGS = config_dir()
MODELS = (
    "Llama-3.2-1B-Instruct", "Llama-3.2-3B-Instruct", "Llama-3.1-8B-Instruct", "Llama-2-7b-chat-hf", "Llama-2-7b-hf",
    "Qwen2.5-1.5B-Instruct", "Qwen2.5-3B-Instruct", "Qwen2.5-7B-Instruct", "Phi-3.5-mini-instruct", "gemma-7b-it",
    "zephyr-7b-beta", "SmolLM2-135M-Instruct", "tiny",
)  # fmt: skip
ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def read(name):
    return yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))


def choices(group):
    return {f.stem for f in (CONFIGS / group).glob("*.yaml")}


def test_the_groups_have_the_files_that_users_name():
    assert choices("model") == {f"{m}{s}" for m in MODELS for s in ("", "-lora")}
    assert choices("trainer") == {"FederatedFinetune", "FederatedUnlearningTrainer", "finetune", *UNLEARNING_METHODS}
    assert choices("method") == set(UNLEARNING_METHODS) == set(schema.METHODS)
    assert choices("wrapper") == set(WRAPPERS) == set(schema.WRAPPERS)
    assert choices("wire") == set(WIRES) == set(schema.WIRES)
    assert choices("recipe") == set(RECIPES) == set(schema.RECIPES)
    assert choices("aggregator") == set(AGGREGATORS) == set(schema.AGGREGATORS)
    assert choices("lora") == {"quick", "balanced", "high"}
    assert choices("partition") == {"target", "iid", "author", "topic", "dirichlet", "quantity", "file"}
    assert {"train", "train-lora", "unlearn", "unlearn-lora", "eval", "quickstart"} <= choices(".")
    assert {"finetune/tofu/default", "unlearn/tofu/default", "eval/tofu/default"} <= {
        str(f.relative_to(CONFIGS / "experiment").with_suffix("")) for f in (CONFIGS / "experiment").rglob("*.yaml")
    }


@pytest.mark.parametrize("name", [f"{m}{s}" for m in MODELS for s in ("", "-lora")])
def test_a_model_file_is_complete(name):
    raw = read(f"model/{name}.yaml")
    raw["model_args"]["pretrained_model_name_or_path"] = "x"
    model = TypeAdapter(schema.ModelConfig).validate_python(raw)
    args, lora = model.model_args, name.endswith("-lora")
    assert args.use_lora is lora
    assert (args.lora_config is not None) is lora
    expected = {f.name for f in dataclasses.fields(schema.TemplateArgs)}
    assert set(raw["template_args"]) == expected
    if lora:
        modules = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] if name.startswith("Phi") else ALL_MODULES
        assert raw["model_args"]["lora_config"] == {
            "r": 16, "lora_alpha": 32, "target_modules": modules, "lora_dropout": 0.1, "bias": "none"
        }  # fmt: skip
        plain = read(f"model/{name.removesuffix('-lora')}.yaml")
        assert plain["template_args"] == raw["template_args"]


def test_the_users_model_file_has_exactly_its_keys():
    assert read("model/Llama-3.2-3B-Instruct-lora.yaml")["model_args"] == {
        "pretrained_model_name_or_path": "meta-llama/Llama-3.2-3B-Instruct",
        "attn_implementation": "flash_attention_2",
        "torch_dtype": "bfloat16",
        "use_lora": True,
        "lora_config": {
            "r": 16, "lora_alpha": 32, "target_modules": ALL_MODULES, "lora_dropout": 0.1, "bias": "none"
        },
        "lora_model_path": None,
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_an_aggregator_file_gives_the_rules_own_defaults(name):
    given = read(f"aggregator/{name}.yaml")
    own = hyperparameters(AGGREGATORS[name])
    assert given.pop("name") == name
    assert {k: float(v) for k, v in given.items()} == {k: own[k] for k in given}


@pytest.mark.parametrize("name", UNLEARNING_METHODS)
def test_a_method_file_gives_the_methods_own_defaults(name):
    given = read(f"method/{name}.yaml")
    own = hyperparameters(OBJECTIVES[name])
    assert given.pop("name") == name
    assert given == {k: list(v) if isinstance(v, tuple) else v for k, v in own.items() if k != "parity"}


@pytest.mark.parametrize("name", sorted(ROBUST_RULES))
def test_a_robust_file_gives_the_rules_own_defaults(name):
    given = read(f"robust/{name}.yaml")
    assert given.pop("name") == name
    assert {given.pop("max_norm_ratio"), given.pop("root", None)} == {None}
    assert given == hyperparameters(ROBUST_RULES[name])


def test_the_robust_and_the_hostile_files_are_all_that_there_is():
    assert choices("robust") == {*ROBUST_RULES, SCREENING, "none"}
    assert set(schema.ROBUST) == {*ROBUST_RULES, SCREENING}
    assert choices("hostile") == {*ATTACKS, "label_flip"}
    assert all(read(f"hostile/{name}.yaml")["name"] == name for name in choices("hostile"))


@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_a_wrapper_file_gives_the_wrappers_own_defaults(name):
    given = read(f"wrapper/{name}.yaml")
    assert given.pop("name") == name
    assert given == hyperparameters(WRAPPERS[name])


@pytest.mark.parametrize("name", sorted(WIRES))
def test_a_wire_file_gives_the_formats_own_defaults(name):
    assert read(f"wire/{name}.yaml") == {"name": name, **hyperparameters(WIRES[name])}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_file_gives_the_recipes_own_defaults_and_passes(name):
    own = hyperparameters(RECIPES[name])
    assert read(f"recipe/{name}.yaml") == {"name": name, **own}
    argv = [f"recipe={name}", "method=NPO", "experiment=unlearn/tofu/default", "task_name=t", "model=tiny"]
    config = resolve(argv, "unlearn-lora.yaml")
    assert (config.recipe.name, dict(config.recipe.params)) == (name, own)


RUNS = {
    "unlearn-lora": ["FederatedUnlearningTrainer", *UNLEARNING_METHODS],
    "unlearn": ["FederatedUnlearningTrainer", *UNLEARNING_METHODS],
    "train-lora": ["FederatedFinetune", "finetune"],
    "train": ["FederatedFinetune", "finetune"],
}


@pytest.mark.parametrize(("primary", "trainer"), [(p, t) for p, trainers in RUNS.items() for t in trainers])
def test_every_primary_configuration_takes_every_trainer_of_its_mode(primary, trainer):
    mode = "finetune" if primary.startswith("train") else "unlearn"
    argv = [f"trainer={trainer}", "task_name=t", f"experiment={mode}/tofu/default"]
    argv += ["data.alternate=alternates.json"] if trainer == "AltPO" else []
    config = resolve(argv, f"{primary}.yaml")
    federated = trainer in schema.FEDERATED_TRAINERS
    assert (config.mode, config.trainer.handler) == (mode, trainer)
    assert (config.aggregator is not None) is federated
    assert (config.method is not None) is (mode == "unlearn")
    assert config.model.model_args.use_lora is primary.endswith("-lora")
    assert config.trainer.args["remove_unused_columns"] is False
    assert Path(config.paths.output_dir) == Path("saves") / mode / "t"
    if trainer in UNLEARNING_METHODS:
        assert config.method.name == trainer


@pytest.mark.parametrize(
    ("method", "aggregator", "partition", "lora"),
    [
        ("GradAscent", "FedAvg", "target", "quick"),
        ("GradDiff", "FedAvgM", "iid", "balanced"),
        ("NPO", "FedProx", "author", "high"),
        ("SimNPO", "FedAdagrad", "dirichlet", "quick"),
        ("NPO", "FedAdam", "quantity", "balanced"),
        ("NPO", "FedYogi", "target", "high"),
    ],
)
def test_every_choice_of_the_other_groups_passes(method, aggregator, partition, lora):
    argv = [f"method={method}", f"aggregator={aggregator}", f"partition={partition}", f"lora={lora}", "task_name=t"]
    config = resolve([*argv, "model=tiny"], "unlearn-lora.yaml")
    assert (config.method.name, config.aggregator.name, config.partition.scheme) == (method, aggregator, partition)
    rank, alpha, dropout = {"quick": (8, 16, 0.1), "balanced": (16, 32, 0.1), "high": (64, 128, 0.05)}[lora]
    chosen = config.model.model_args.lora_config
    assert config.model.model_args.use_lora is True
    assert (chosen.r, chosen.lora_alpha, chosen.lora_dropout) == (rank, alpha, dropout)


EXPERIMENTS = sorted(
    str(f.relative_to(CONFIGS / "experiment").with_suffix("")) for f in (CONFIGS / "experiment").rglob("*.yaml")
)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_passes_and_leaves_the_model_to_the_command_line(experiment):
    mode = experiment.split("/")[0]
    primary = {"finetune": "train-lora", "unlearn": "unlearn-lora", "eval": "eval"}[mode]
    config = resolve([f"experiment={experiment}", "model=SmolLM2-135M-Instruct-lora", "task_name=t"], f"{primary}.yaml")
    assert config.mode == mode
    assert config.model.model_args.pretrained_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config.eval is not None


def test_the_quickstarts_configuration_passes():
    assert resolve([], "quickstart.yaml").data.train.path == "fictional"


def test_a_fine_tuning_in_shards_is_chosen_by_name():
    argv = ["experiment=finetune/tofu/default", "recipe=isolated", "recipe.shards=2", "task_name=t"]
    config = resolve(argv, "train-lora.yaml")
    assert (config.recipe.name, dict(config.recipe.params)) == ("isolated", {"shards": 2})
    with pytest.raises(ConfigError, match=r"recipe=retrain: fine-tuning forgets nothing; leave it out"):
        resolve(["experiment=finetune/tofu/default", "recipe=retrain", "task_name=t"], "train-lora.yaml")
    assert resolve(["experiment=finetune/tofu/default", "task_name=t"], "train-lora.yaml").recipe is None


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_file_gives_the_recipes_own_defaults(name):
    given = read(f"recipe/{name}.yaml")
    assert given.pop("name") == name
    assert given == hyperparameters(RECIPES[name])
