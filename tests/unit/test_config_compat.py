"""The command line before Hydra: what is rewritten, what is refused, and that nothing is written."""

import pytest

from unfed.base.errors import ConfigError
from unfed.config.compat import resolve, settle, take_apart

MODEL = ["model=tiny-lora", "model.model_args.pretrained_model_name_or_path=nobody/nothing"]
BASE = ["experiment=unlearn/tofu/default", "task_name=t", *MODEL]
STRATEGY, METHOD = "trainer.method_args.aggregation_strategy", "trainer.method_args.unlearn_trainer_cls"
UNLEARN = "unlearn-lora.yaml"


def problems_of(*overrides, base=BASE):
    with pytest.raises(ConfigError) as e:
        settle([*base, *overrides], UNLEARN)
    return e.value.problems


def names(config):
    a = config.trainer.method_args
    assert (a.aggregation_strategy, a.unlearn_trainer_cls) == (config.aggregator.name, config.method.name)
    return config.aggregator.name, config.method.name


def test_the_strategy_and_method_of_method_args_are_those_of_the_groups():
    argv = [*BASE, f"{STRATEGY}=FedYogi", f"{METHOD}=SimNPO"]
    config = resolve(argv, UNLEARN)
    assert names(config) == ("FedYogi", "SimNPO")
    assert config.aggregator.params["beta2"] == 0.99
    assert config.method.params["beta"] == 4.5
    settled = settle(argv, UNLEARN)
    assert {"aggregator=FedYogi", "method=SimNPO"} <= set(settled)
    assert not any(a.startswith((STRATEGY, METHOD)) for a in settled)


def test_a_method_survives_the_choice_of_a_trainer():
    argv = [*BASE, "method=GradDiff", "method.alpha=2", "trainer=FederatedUnlearningTrainer"]
    config = resolve(argv, UNLEARN)
    assert names(config) == ("FedAvg", "GradDiff")
    assert config.method.params["alpha"] == 2


def test_the_same_name_twice_is_no_contradiction():
    assert names(resolve([*BASE, f"{STRATEGY}=FedProx", "aggregator=FedProx"], UNLEARN)) == ("FedProx", "NPO")


def test_two_names_for_one_thing_are_refused():
    (problem,) = problems_of(f"{STRATEGY}=FedYogi", "aggregator=FedAvg")
    assert f"{STRATEGY}=FedYogi" in problem
    assert "aggregator=FedAvg" in problem


def test_an_experiment_may_name_strategy_and_method_and_the_command_line_wins(tmp_path):
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "# @package _global_\n"
        "trainer: {method_args: {aggregation_strategy: FedAdam, unlearn_trainer_cls: GradDiff}}\n"
        "forget_split: forget05\nretain_split: retain95\n"
    )
    argv = [f"--config-dir={tmp_path}", "experiment=mine", "task_name=t", *MODEL]
    config = resolve(argv, UNLEARN)
    assert names(config) == ("FedAdam", "GradDiff")
    assert config.data.forget.name == config.eval.forget_split == "forget05"
    assert names(resolve([*argv, "aggregator=FedAvgM"], UNLEARN)) == ("FedAvgM", "GradDiff")
    changed = resolve([*argv, f"{METHOD}=NPO", "forget_split=forget01", "retain_split=retain99"], UNLEARN)
    assert names(changed) == ("FedAdam", "NPO")
    assert changed.data.forget.name == changed.eval.forget_split == "forget01"


@pytest.mark.parametrize(
    ("override", "said", "meant"),
    [
        (f"{STRATEGY}=FedAvgg", f"{STRATEGY}=FedAvgg: no such aggregation strategy", "FedAvg"),
        (f"{METHOD}=NPOO", f"{METHOD}=NPOO: no such unlearning method", "NPO"),
        ("aggregator=FedAvgg", "aggregator=FedAvgg: no such aggregation strategy", "FedAvg"),
        ("model=Llama-3.2-3B-Instruct-lorra", "model=Llama-3.2-3B-Instruct-lorra", "Llama-3.2-3B-Instruct-lora"),
        ("experiment=unlearn/toffu/default", "experiment=unlearn/toffu/default", "unlearn/tofu/default"),
        ("lora=quik", "lora=quik", "quick"),
        ("modle=tiny", "modle: no such setting", "mode"),
        ("forget_splitt=forget05", "forget_splitt: no such setting", "forget_split"),
        ("tainer.args.seed=1", "tainer: no such setting", "trainer"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(override, said, meant):
    (problem,) = problems_of(override)
    assert problem.startswith(said)
    assert f"did you mean '{meant}'?" in problem


def test_the_primary_configuration_may_have_its_suffix_or_not_but_must_exist():
    assert take_apart(["--config-name=unlearn-lora"], UNLEARN).primary == "unlearn-lora"
    assert take_apart(["--config-name", "train.yaml"], UNLEARN).primary == "train"
    (problem,) = problems_of("--config-name=unlearn-lorra.yaml")
    assert "did you mean 'unlearn-lora'?" in problem


def test_experiments_and_groups_may_have_their_suffix():
    argv = ["experiment=unlearn/tofu/default.yaml", "task_name=t", *MODEL, "method=GradDiff.yaml"]
    assert names(resolve(argv, "unlearn-lora")) == ("FedAvg", "GradDiff")


@pytest.mark.parametrize(
    ("override", "hint"),
    [("method.beta=[1", "cannot be read as key=value"), ("a b", "cannot be read"), ("task_name=a,b", "--multirun")],
)
def test_a_broken_override_is_named(override, hint):
    (problem,) = problems_of(override)
    assert override in problem
    assert hint in problem


def test_several_unknown_choices_come_together():
    assert len(problems_of("method=NPOO", "aggregator=FedAvgg", "model=tinny", "x=[")) == 4


def test_keys_that_no_file_mentions_need_no_plus():
    argv = [*BASE, "trainer.args.adam_beta1=0.8", "model.model_args.lora_config.use_rslora=true", "data.retain.limit=7"]
    config = resolve(argv, UNLEARN)
    assert config.trainer.args["adam_beta1"] == 0.8
    assert config.model.model_args.lora_config.use_rslora is True
    assert config.data.retain.limit == 7


def test_the_keys_of_every_run_can_be_set_without_a_plus():
    given = ["seed=3", "resume=true", "overwrite=true", "forget_split=forget01", "retain_split=retain99"]
    given += ["holdout_split=holdout01", "retain_logs_path=x.json", "dataset=fictional"]
    config = resolve([*BASE, *given], UNLEARN)
    assert (config.seed, config.resume, config.overwrite) == (3, True, True)
    assert (config.data.forget.name, config.data.retain.name) == ("forget01", "retain99")
    assert (config.eval.forget_split, config.eval.holdout_split) == ("forget01", "holdout01")
    assert (config.eval.retain_logs_path, config.eval.path, config.data.forget.path) == ("x.json", *["fictional"] * 2)
    assert config.trainer.args["seed"] == 3


def test_a_preset_overrides_the_model_and_a_value_overrides_the_preset():
    lora = resolve([*BASE, "lora=quick", "model.model_args.lora_config.r=4"], UNLEARN).model.model_args.lora_config
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (4, 16, ("q_proj", "v_proj"))


def test_a_group_may_be_switched_off_with_null():
    config = resolve([*BASE, "eval=null", "lora=null"], UNLEARN)
    assert not config.eval.enabled
    assert config.model.model_args.lora_config.r == 16


def test_an_evaluation_switched_off_stays_off_where_an_experiment_sets_it_up():
    assert not resolve(["task_name=t", "experiment=finetune/real", "eval=null"], "train-lora").eval.enabled
    with pytest.raises(ConfigError, match=r"eval\.enabled=false"):
        resolve(["task_name=t", "eval=null"], "eval")


def test_a_sweep_is_rewritten_and_every_run_of_it_checked():
    argv = [*BASE, "--multirun", f"{STRATEGY}=FedAvg,FedYogi", "method=NPO,SimNPO"]
    settled = settle(argv, UNLEARN)
    assert settled[0] == "--multirun"
    assert {"aggregator=FedAvg,FedYogi", "method=NPO,SimNPO"} <= set(settled)
    (problem,) = problems_of("-m", f"{STRATEGY}=FedAvg,FedYogii")
    assert "FedYogii" in problem
    (problem,) = problems_of("-m", "aggregator=FedAvg,FedYogi", "aggregator.beta2=0.9")
    assert "FedAvg has no such hyperparameter" in problem


def test_flags_of_hydra_pass_and_show_what_is_not_complete_yet():
    assert settle(["--hydra-help"], UNLEARN) == ["--hydra-help"]
    settled = settle(["--cfg", "job", f"{STRATEGY}=FedProx"], UNLEARN)
    assert settled == ["--cfg", "job", "aggregator=FedProx"]


def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settle(BASE, UNLEARN)
    problems_of("method=NPOO")
    problems_of("seed=abc")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("eval.generation.temperature=0", "must be above 0"),
        ("eval.generation.top_p=7", "at most 1"),
        ("trainer.args.num_train_epochs=inf", "finite"),
        ("trainer.args.weight_decay=-1", "at least 0"),
        ("trainer.args.bf16=maybe", "not true or false"),
        ("partition.alpha=inf", "finite"),
        ("trainer.args.learning_rate=1e400", "above 0"),
        ("trainer.method_args.unlearn_epochs=nan", "above 0"),
        ("trainer.method_args.unlearn_epochs=inf", "above 0"),
        ("collator.pad_to_multiple_of=-8", "at least 1"),
    ],
)
def test_numbers_out_of_their_limits(override, said):
    with pytest.raises(ConfigError) as caught:
        resolve([*BASE, override], UNLEARN)
    (problem,) = caught.value.problems
    assert override.split("=")[0] in problem and said in problem


def test_the_directory_of_all_runs_is_no_run():
    with pytest.raises(ConfigError, match=r"task_name=\.: must be a name"):
        resolve(["task_name=."], UNLEARN)


def test_a_broken_file_of_the_evaluation_is_found_before_the_training(tmp_path):
    from unfed.config.preflight import preflight
    from unfed.data.fictional import write_tofu_folder

    write_tofu_folder(tmp_path / "tofu")
    given = ["task_name=t", "experiment=unlearn/tofu/default", f"paths.data_dir={tmp_path}"]
    given += ["forget_split=forget25", "retain_split=retain75", f"paths.output_dir={tmp_path / 'out'}"]
    assert not [p for p in preflight(resolve(given, UNLEARN)) if "tofu" in p]
    file = tmp_path / "tofu" / "retain_perturbed.json"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], "{oops", *lines[2:]]))
    assert [p for p in preflight(resolve(given, UNLEARN)) if f"{file}:2" in p]
    assert not [p for p in preflight(resolve([*given, "eval=null"], UNLEARN)) if f"{file}:2" in p]
