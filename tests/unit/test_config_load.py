"""The border to Hydra: every problem at once, each with its key, its value and the nearest name."""

import dataclasses

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from unfed.app.plan import _rounds
from unfed.base.errors import ConfigError
from unfed.config.compat import resolve
from unfed.config.load import config_dir, examine, from_hydra
from unfed.config.preflight import preflight
from unfed.config.schema import HostileConfig, MethodConfig, RobustConfig, RunConfig, WrapperConfig


@pytest.fixture(scope="module")
def composed():
    """Compositions that the tests alter copies of."""
    with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
        given = ["model=tiny-lora", "model.model_args.pretrained_model_name_or_path=nobody/nothing", "task_name=t"]
        return {
            "unlearn": compose("unlearn-lora", [*given, "experiment=unlearn/tofu/default"]),
            "finetune": compose("train-lora", [*given, "experiment=finetune/tofu/default"]),
            "central": compose("unlearn", [*given, "trainer=GradDiff"]),
        }


@pytest.fixture
def altered(composed):
    def alter(which="unlearn", **changes):
        cfg = composed[which].copy()
        OmegaConf.set_struct(cfg, value=False)
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value, merge=False)
        return cfg

    return alter


def test_a_composition_becomes_a_run(altered):
    config = from_hydra(altered())
    assert isinstance(config, RunConfig)
    assert config.mode == "unlearn"
    assert config.method == MethodConfig("NPO", {"beta": 0.1, "gamma": 1.0, "alpha": 1.0, "retain_loss_type": "NLL"})
    assert config.aggregator is not None
    assert config.aggregator.params["server_lr"] == 1.0
    assert config.trainer is not None
    assert config.trainer.method_args.unlearn_trainer_cls == "NPO"
    assert (config.trainer.method_args.global_rounds, config.trainer.method_args.unlearn_epochs) == (2, 5)
    assert config.model.model_args.lora_config is not None
    assert config.model.model_args.lora_config.target_modules[0] == "q_proj"
    assert config.data.forget is not None
    assert config.data.forget.name == "forget10"
    assert config.eval is not None
    assert config.eval.holdout_split is None
    assert config.paths.output_dir.endswith("saves/unlearn/t")


def test_a_run_is_frozen(altered):
    with pytest.raises(dataclasses.FrozenInstanceError):
        from_hydra(altered()).seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_fine_tuning_has_no_method_and_one_place_has_no_aggregator(altered):
    finetune, central = from_hydra(altered("finetune")), from_hydra(altered("central"))
    assert finetune.method is None
    assert finetune.trainer is not None
    assert (finetune.trainer.method_args.num_clients, finetune.trainer.method_args.global_rounds) == (3, 5)
    assert central.aggregator is None
    assert central.method is not None
    assert central.method.name == "GradDiff"


@pytest.mark.parametrize(
    ("dtype", "fp16", "bf16"), [("float32", False, False), ("bfloat16", False, True), ("bfloat16", True, False)]
)
def test_mixed_precision_follows_the_model_unless_said(altered, dtype, fp16, bf16):
    config = from_hydra(altered(**{"model.model_args.torch_dtype": dtype, "trainer.args.fp16": fp16}))
    assert config.trainer is not None
    assert config.trainer.args["bf16"] is bf16


def test_a_task_name_that_looks_like_a_number_is_a_name(altered):
    assert from_hydra(altered(task_name=2024)).task_name == "2024"


WRONG = {
    "unknown key": ({"model.model_args.use_loraa": True}, "model.model_args.use_loraa", "'use_lora'"),
    "unknown nested key": (
        {"model.model_args.lora_config.rank": 4},
        "model.model_args.lora_config.rank",
        "r, rank_pattern",
    ),
    "unknown key at the top": ({"sed": 3}, "sed: no such setting", "'seed'"),
    "a choice": ({"partition.scheme": "irid"}, "partition.scheme=irid", "'iid'"),
    "a number": ({"trainer.method_args.global_rounds": "many"}, "trainer.method_args.global_rounds=many", "integer"),
    "an index or all": ({"trainer.method_args.target_client_idx": "first"}, "target_client_idx=first", "'all'"),
    "a training argument": ({"trainer.args.lerning_rate": 1e-4}, "trainer.args.lerning_rate", "'learning_rate'"),
    "an old name": ({"trainer.args.evaluation_strategy": "no"}, "trainer.args.evaluation_strategy", "eval_strategy"),
    "a metric between rounds that needs a log": (
        {"trainer.args.eval_strategy": "round", "eval.round_metrics": ["forget_quality"]},
        "eval.round_metrics: forget_quality",
        "do not read",
    ),
    "no metric between rounds": (
        {"trainer.args.eval_strategy": "phase", "eval.round_metrics": []},
        "eval.round_metrics",
        "eval_strategy=no",
    ),
    "a training value": ({"trainer.args.num_train_epochs": "abc"}, "trainer.args.num_train_epochs", "'abc'"),
    "an optimizer": ({"trainer.args.optim": "adamw_torchh"}, "trainer.args.optim=adamw_torchh", "'adamw_torch'"),
    "a method": ({"method.name": "NPOO"}, "method.name=NPOO", "'NPO'"),
    "a method's parameter": ({"method.bta": 1}, "method.bta", "'beta'"),
    "a method's value": ({"method.beta": -1}, "method.beta", "above 0"),
    "a strategy": ({"aggregator.name": "FedAvgg"}, "aggregator.name=FedAvgg", "'FedAvg'"),
    "another rule's parameter": ({"aggregator.tau": 1e-3}, "aggregator.tau", "FedAvg has no such"),
    "a method's parameter in method_args": ({"trainer.method_args.beta": 1}, "trainer.method_args.beta", "method.beta"),
    "a rule's parameter in method_args": (
        {"trainer.method_args.server_lr": 1},
        "method_args.server_lr",
        "aggregator.server_lr",
    ),
    "no such client": (
        {"trainer.method_args.num_clients": 3, "trainer.method_args.target_client_idx": 3},
        "target_client_idx=3",
        "0 to 2",
    ),
    "no such client, counted backwards": (
        {"trainer.method_args.target_client_idx": -1},
        "target_client_idx=-1",
        "client of the run",
    ),
    "no clients": ({"trainer.method_args.num_clients": 0}, "num_clients=0", "at least 1"),
    "more at least than there are": (
        {"trainer.method_args.num_clients": 2, "trainer.method_args.min_clients": 3},
        "min_clients=3",
        "between 1",
    ),
    "nobody takes part": ({"trainer.method_args.fraction_fit": 0}, "fraction_fit=0", "above 0"),
    "no epochs": ({"trainer.method_args.unlearn_epochs": 0}, "unlearn_epochs=0", "above 0"),
    "negative rounds": ({"trainer.method_args.global_rounds": -1}, "global_rounds=-1", "at least 0"),
    "interleaved without rounds": (
        {"trainer.method_args.global_rounds": 0, "recipe.name": "interleaved"},
        "global_rounds=0",
        "at least 1",
    ),
    "overwriting without rounds": (
        {"trainer.method_args.global_rounds": 0, "recipe.name": "unlearning_adapter", "recipe.forget": "none"},
        "global_rounds=0",
        "at least 1",
    ),
    "one scaled gradient a round": (
        {"recipe.name": "fedosd", "trainer.args.fp16": True},
        "trainer.args.fp16: recipe=fedosd",
        "trainer.args.bf16=true",
    ),
    "two methods": ({"trainer.method_args.unlearn_trainer_cls": "SimNPO"}, "unlearn_trainer_cls=SimNPO", "method=NPO"),
    "two strategies": (
        {"trainer.method_args.aggregation_strategy": "FedYogi"},
        "aggregation_strategy=FedYogi",
        "aggregator=FedAvg",
    ),
    "a trainer": (
        {"trainer.handler": "FederatedUnlearn"},
        "trainer.handler=FederatedUnlearn",
        "'FederatedUnlearningTrainer'",
    ),
    "a trainer of the other mode": (
        {"trainer.handler": "FederatedFinetune"},
        "trainer=FederatedFinetune",
        "train-lora.yaml",
    ),
    "overlapping splits": ({"retain_split": "retain95"}, "forget_split=forget10 and retain_split=retain95", "retain90"),
    "no forget set": ({"data.forget": None}, "data.forget", "experiment=unlearn/tofu/default"),
    "nothing kept": ({"data.forget.limit": 0}, "data.forget.limit=0", "1 or more"),
    "a metric": ({"eval.metrics": ["forget_qualty"]}, "forget_qualty", "'forget_quality'"),
    "a batch of nothing": ({"eval.batch_size": 0}, "eval.batch_size=0", "at least 1"),
    "a rank": ({"model.model_args.lora_config.r": 0}, "model.model_args.lora_config.r=0", "at least 1"),
    "a dropout": ({"model.model_args.lora_config.lora_dropout": 1}, "lora_dropout=1", "below 1"),
    "a concentration": ({"partition.alpha": 0}, "partition.alpha=0", "above 0"),
    "checkpoints": ({"engine.keep_checkpoints": 0}, "engine.keep_checkpoints=0", "at least 1"),
    "every so many checkpoints": ({"engine.keep_every": 0}, "engine.keep_every=0", "at least 1, or null"),
    "a preset's value": ({"lora": {"r": 4}}, "lora: choose a preset", "model.model_args.lora_config.r"),
    "a name that leads away": ({"task_name": "../x"}, "task_name=../x", "must be a name"),
    "no name": ({"task_name": ""}, "task_name=", "must be a name"),
    "a missing value": ({"task_name": "???"}, "task_name: missing", "task_name=..."),
    "a reference to nothing": ({"data.idk": "${idk_file}"}, "data.idk=${idk_file}", "idk_file"),
}


@pytest.mark.parametrize(("changes", "key", "hint"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_named_with_its_key_and_a_way_out(altered, changes, key, hint):
    with pytest.raises(ConfigError) as e:
        from_hydra(altered(**changes))
    (problem,) = e.value.problems
    assert key in problem
    assert hint in problem


@pytest.mark.parametrize(
    ("which", "changes", "key", "hint"),
    [
        ("central", {"method.name": "NPO"}, "trainer=GradDiff and method=NPO", "contradict"),
        ("central", {"aggregator": {"name": "FedAvg"}}, "aggregator=FedAvg", "leave it out"),
        ("central", {"trainer.method_args": {"num_clients": 3}}, "trainer.method_args.num_clients", "without clients"),
        ("finetune", {"method": {"name": "NPO"}}, "method=NPO", "leave it out"),
        ("finetune", {"method": {"beta": 1}}, "method: beta given", "method=NAME"),
        ("finetune", {"data.train": None}, "data.train", "experiment=finetune/tofu/default"),
        ("finetune", {"trainer.method_args.global_rounds": 0}, "global_rounds=0", "at least 1"),
    ],
)
def test_what_does_not_go_with_the_trainer_is_refused(altered, which, changes, key, hint):
    _, problems = examine(altered(which, **changes))
    assert len(problems) == 1
    assert key in problems[0]
    assert hint in problems[0]


def test_a_list_that_is_none_says_how_to_write_one(altered):
    with pytest.raises(
        ConfigError, match=r"forget.clients=client_1: should be a list, as in forget.clients=\[client_1\]"
    ):
        from_hydra(altered(**{"forget.clients": "client_1"}))


@pytest.mark.parametrize(
    ("recipe", "rounds"),
    [
        ({"name": "interleaved"}, 2),
        ({"name": "local_then_recover"}, 3),
        ({"name": "unlearning_adapter", "forget": "none"}, 2),
        ({"name": "pga"}, 3),
        ({"name": "fedosd", "unlearn_rounds": 7}, 9),
        ({"name": "distill", "distill_rounds": 4}, 6),
        ({"name": "subtract"}, 2),
    ],
)
def test_the_plan_counts_the_rounds_of_the_recipe(altered, recipe, rounds):
    assert _rounds(from_hydra(altered(recipe=recipe)), 2) == rounds


def test_all_problems_come_at_once(altered):
    changes = {
        "task_name": "???",
        "sed": 3,
        "model.model_args.torch_dtype": "float31",
        "method.bta": 2,
        "aggregator.tau": 1,
        "trainer.args.lerning_rate": 1,
        "trainer.method_args.num_clients": "three",
    }
    with pytest.raises(ConfigError) as e:
        from_hydra(altered(**changes))
    assert len(e.value.problems) == len(changes)
    for key in changes:
        assert sum(p.startswith((f"{key}:", f"{key}=")) for p in e.value.problems) == 1, key
    assert str(e.value).startswith(f"The configuration has {len(changes)} problems:")


def test_a_base_of_the_border_is_left_alone(altered):
    cfg = altered(task_name="???")
    before = OmegaConf.to_container(cfg, resolve=False)
    examine(cfg)
    assert OmegaConf.to_container(cfg, resolve=False) == before


def test_files_that_are_not_there_are_named_before_anything_starts(altered, tmp_path):
    cfg = altered(**{
        "model.model_args.pretrained_model_name_or_path": f"{tmp_path}/gone",
        "paths.data_dir": f"{tmp_path}/nowhere",
        "retain_logs_path": f"{tmp_path}/log.json",
        "partition.manifest": f"{tmp_path}/partition.json",
    })  # fmt: skip
    problems = preflight(from_hydra(cfg))
    assert len(problems) == 4
    for key in ("pretrained_model_name_or_path=", "paths.data_dir", "retain_logs_path=", "partition.manifest="):
        assert any(key in p for p in problems), key
    assert not list(tmp_path.iterdir())


def test_an_adapter_path_without_an_adapter_is_named(altered, tmp_path):
    (problem,) = preflight(from_hydra(altered(**{"model.model_args.lora_model_path": str(tmp_path)})))
    assert "lora_model_path" in problem
    assert "adapter_config.json" in problem


def test_a_split_that_the_data_root_lacks_is_named(altered, data_dir):
    changes = {"paths.data_dir": str(data_dir), "retain_split": "retain09"}
    (problem,) = preflight(from_hydra(altered(**changes)))
    assert "'retain09'" in problem
    assert "did you mean 'retain" in problem


def test_a_target_beyond_the_partition_is_named(altered, tmp_path):
    from unfed.data.partition import Partition

    Partition({"client_0": ("a",), "client_1": ("b",)}, "iid", 0, "sha256:0").write(tmp_path / "partition.json")
    changes = {"partition.manifest": str(tmp_path / "partition.json"), "trainer.method_args.target_client_idx": 2}
    (problem,) = preflight(from_hydra(altered(**changes)))
    assert "target_client_idx=2" in problem
    assert "0 to 1" in problem


def test_an_output_directory_that_is_a_file_is_refused(altered, tmp_path):
    (tmp_path / "taken").write_text("")
    (problem,) = preflight(from_hydra(altered(**{"paths.output_dir": str(tmp_path / "taken")})))
    assert "is a file" in problem
    (problem,) = preflight(from_hydra(altered(**{"paths.output_dir": str(tmp_path / "taken" / "below")})))
    assert "cannot be written to" in problem


def test_the_holdout_follows_the_forget_split():
    from unfed.data.benchmarks import tofu_splits

    assert tofu_splits("x", "forget01")["holdout"].data.name == "holdout01"
    assert tofu_splits("x", "forget05", "mine")["holdout"].data.name == "mine"
    assert "holdout" not in tofu_splits("x", "letters")


WRAPPED = ["model=tiny-lora", "task_name=t", "model.model_args.pretrained_model_name_or_path=nobody/nothing"]


def test_a_wrapper_goes_around_the_method_by_its_group():
    config = resolve([*WRAPPED, "wrapper=SAM", "wrapper.rho=0.05"], "unlearn-lora.yaml")
    assert config.wrapper == WrapperConfig("SAM", {"rho": 0.05})
    assert config.method == MethodConfig("NPO", {"beta": 0.1, "gamma": 1.0, "alpha": 1.0, "retain_loss_type": "NLL"})
    assert resolve(WRAPPED, "unlearn-lora.yaml").wrapper is None
    assert resolve([*WRAPPED, "wrapper=null"], "unlearn-lora.yaml").wrapper is None
    assert resolve([*WRAPPED, "trainer=GradDiff", "wrapper=GRU"], "unlearn.yaml").wrapper == WrapperConfig(
        "GRU", {"gamma": 0.8}
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["wrapper=SAN"], "wrapper=SAN: no such wrapper; did you mean 'SAM'"),
        (["wire=int8", "wire.fraction=0.1"], "wire.fraction: Int8 has no such hyperparameter; wire=topk would"),
        (
            ["privacy=example", "privacy.adaptive=true"],
            "ExamplePrivacy has no such hyperparameter; privacy=central would",
        ),
        (["wrapper=SAM", "wrapper.roh=1"], "wrapper.roh: SAM has no such hyperparameter; did you mean 'rho'"),
        (["wrapper=GRU", "wrapper.gamma=0"], "wrapper.gamma: must be a number above 0 and at most 1, not 0"),
        (["wrapper.rho=1"], "wrapper: rho given, but no wrapper is chosen; give wrapper=NAME"),
        (["wrapper=GRU", "method=GradAscent"], "wrapper=GRU: needs a retain term, and method=GradAscent has none here"),
        (["wrapper=GRU", "method.alpha=0"], "wrapper=GRU: needs a retain term, and method=NPO has none here"),
        (["wrapper=SAM", "trainer.args.fp16=true"], "wrapper=SAM: adds up gradients of several backward passes"),
        (["wrapper=EWC", "recipe=retrain"], "wrapper=EWC: recipe=retrain trains with no method"),
        (["method=RMU", "method.module_regex='('"], "method.module_regex: '(' is not a regular expression"),
    ],
)
def test_a_wrapper_that_cannot_work_is_named(given, said):
    with pytest.raises(ConfigError) as caught:
        resolve([*WRAPPED, *given], "unlearn-lora.yaml")
    assert said in str(caught.value)


def test_fine_tuning_takes_no_wrapper(altered):
    cfg = altered("finetune", wrapper={"name": "SAM"})
    with pytest.raises(ConfigError, match="wrapper=SAM: goes around an unlearning method, and mode=finetune has none"):
        from_hydra(cfg)


def test_regular_expressions_pass_the_command_line():
    given = ["method=RMU", "method.module_regex=model.layers.3", "method.trainable_params_regex=[.*mlp.*,.*q_proj]"]
    config = resolve([*WRAPPED, *given], "unlearn-lora.yaml")
    assert config.method is not None
    assert config.method.params["module_regex"] == "model.layers.3"
    assert config.method.params["trainable_params_regex"] == [".*mlp.*", ".*q_proj"]


DEALT = ["model=tiny-lora", "model.model_args.pretrained_model_name_or_path=nobody/nothing", "task_name=t"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["partition=topics"], "partition=topics: no such partition; did you mean 'topic'"),
        (["partition.rest=topc"], "partition.rest=topc: no such choice; did you mean 'topic'?"),
        (["partition=dirichlet", "partition.over=authors"], "partition.over=authors"),
        (["partition=topic", "partition.topics=0"], "partition.topics=0: must be at least 1, or null"),
        (["partition=iid", "partition.topics=5"], "partition.topics=5: nothing is dealt by topic"),
        (["partition.over=topic"], "says what partition.rest=dirichlet spreads, and partition.rest=iid"),
        (["partition=author", "partition.over=topic"], "says what partition.scheme=dirichlet spreads"),
        (["partition=file"], "partition.manifest: missing, and has no default; give partition.manifest=..."),
        (["partition.scheme=file"], "partition=file: give partition.manifest=FILE"),
    ],
)
def test_a_partition_that_cannot_be_dealt_is_named(given, said):
    with pytest.raises(ConfigError) as caught:
        resolve([*DEALT, "experiment=finetune/tofu/default", *given], "train-lora.yaml")
    assert said in str(caught.value)


def test_a_manifest_that_is_not_given_is_said_once():
    with pytest.raises(ConfigError) as caught:
        resolve([*DEALT, "experiment=finetune/tofu/default", "partition=file"], "train-lora.yaml", files=True)
    assert str(caught.value).count("partition.manifest") == 2, "its name, and how to give it"
    assert "there is no such file" not in str(caught.value)


def test_topics_may_be_what_is_dealt_beside_the_target():
    given = ["partition.rest=dirichlet", "partition.over=topic", "partition.topics=9"]
    config = resolve([*DEALT, "experiment=finetune/tofu/default", *given], "train-lora.yaml")
    assert (config.partition.scheme, config.partition.rest, config.partition.topics) == ("target", "dirichlet", 9)


FEDERATED = ["experiment=finetune/quickstart", "task_name=t", "model=tiny-lora", "trainer.method_args.num_clients=5"]


def test_robust_rules_and_hostile_clients_are_groups():
    config = resolve([*FEDERATED, "robust=krum", "robust.max_norm_ratio=8", "hostile=scale"], "train-lora.yaml")
    assert config.robust == RobustConfig("krum", {"over": "effective", "num_byzantine": 1}, 8.0)
    assert config.hostile == HostileConfig("scale", factor=10.0)
    given = [*FEDERATED, "robust=fltrust", "robust.root=8", "hostile=sign_flip", "hostile.clients=[1,client_2]"]
    config = resolve(given, "train-lora.yaml")
    assert config.robust == RobustConfig("fltrust", {"over": "effective"}, None, 8)
    assert config.hostile is not None and config.hostile.clients == (1, "client_2")
    plain = resolve(FEDERATED, "train-lora.yaml")
    assert plain.robust is None and plain.hostile is None
    assert resolve([*FEDERATED, "robust=none"], "train-lora.yaml").robust == RobustConfig("screening")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["robust=krumm"], "robust=krumm: no such robust rule; did you mean 'krum'"),
        (
            ["robust=krum", "robust.num_byzantin=1"],
            "robust.num_byzantin: Krum has no such hyperparameter; did you mean",
        ),
        (["robust=krum", "robust.num_byzantine=2"], "robust=krum: with num_byzantine=2 it needs 2 * 2 + 3 = 7 updates"),
        (["robust=multi_krum", "robust.m=5"], "m=5 is more than the 5 - 1 = 4 updates"),
        (["robust=trimmed_mean", "robust.trim=0.1"], "trim=0.1 of 5 updates leaves none out; take at least 0.2"),
        (["robust=median", "trainer.method_args.fraction_fit=0.4"], "the median of 2 updates leaves nobody out"),
        (["robust=median", "robust.over=entries"], "robust.over: unknown value 'entries'"),
        (["robust=screening", "robust.max_norm_ratio=1"], "robust.max_norm_ratio=1: must be above 1, or null"),
        (["robust=screening", "robust.trim=0.2"], "robust.trim: robust=screening has no rule"),
        (["robust.trim=0.2"], "robust: trim given, but no robust is chosen; give robust=NAME"),
        (["robust=fltrust"], "robust.root: the server needs rows of its own"),
        (["robust=fltrust", "robust.root=0"], "robust.root=0: must be at least 1, or a file"),
        (["robust=median", "robust.root=3"], "robust.root=3: belongs to robust=fltrust"),
        (["robust=fltrust", "robust.root=3", "recipe=isolated"], "shards are to see no rows but their own"),
        (["robust=median", "history=sums"], "history=sums: robust=median does not just add up"),
        (["robust=median", "trainer=finetune", "aggregator=null"], "robust=median: there are no clients"),
        (["hostile=signflip"], "hostile=signflip: no such attack; did you mean 'sign_flip'"),
        (["hostile.count=2"], "hostile: count given, but no attack is chosen; give hostile=NAME"),
        (["wire=int4"], "wire=int4: no such wire format; did you mean 'int8'"),
        (["privacy=centre"], "privacy=centre: no such kind of privacy; did you mean 'central'"),
        (["personalise=1"], "personalise=1: has settings of its own, as in personalise.epochs=... (choices: epochs)"),
        (["partition.ranks=many"], "partition.ranks=many: should be a list or a valid integer"),
        (["hostile=scale", "hostile.count=5"], "hostile: 5 of 5 clients; one at least is honest"),
        (["hostile=scale", "hostile.count=0"], "hostile.count=0: must be at least 1"),
        (["hostile=scale", "hostile.factor=-1"], "hostile.factor=-1: must be above 0"),
        (["hostile=label_flip", "hostile.factor=2"], "hostile=label_flip changes rows, and scales nothing"),
        (["hostile=scale", "hostile.fator=2"], "hostile.fator: no such setting; did you mean 'factor'"),
        (["hostile=scale", "trainer=finetune", "aggregator=null"], "hostile=scale: there are no clients"),
    ],
)
def test_what_does_not_go_with_a_robust_rule_or_a_hostile_client(argv, said):
    with pytest.raises(ConfigError) as e:
        resolve([*FEDERATED, *argv], "train-lora.yaml")
    assert any(said in problem for problem in e.value.problems), e.value.problems


@pytest.mark.parametrize("recipe", ["federaser", "fedosd", "task_arithmetic"])
def test_a_recipe_with_a_rule_of_its_own_takes_no_robust_one(recipe):
    with pytest.raises(ConfigError, match=f"robust=median: recipe={recipe} has a server rule of its own"):
        resolve([*WRAPPED, f"recipe={recipe}", "robust=median"], "unlearn-lora.yaml")
