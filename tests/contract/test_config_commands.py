"""The programs: exit codes, one message and no traceback, and nothing heavy for a question."""

import json
import subprocess
import sys

import pytest
import yaml

from unfed.cli import launch
from unfed.cli.main import COMMANDS, main

RUN = ["experiment=unlearn/tofu/default", "task_name=t", "model=tiny-lora"]
MODEL = "model.model_args.pretrained_model_name_or_path"


def run_in(folder, *command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True, check=False)


def test_a_mistake_ends_in_one_message_and_2_before_anything_is_made_or_loaded(repo_root, tmp_path):
    script = repo_root / "src" / "fed_train.py"
    watch = (
        "import runpy, sys, json\nsys.argv = sys.argv[1:]\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    watch += "except SystemExit as e:\n    print(json.dumps([e.code, 'torch' in sys.modules]))\n"
    given = [script, "--config-name=unlearn-lora.yaml", *RUN, "trainer.method_args.aggregation_strategy=FedAvgg"]
    done = run_in(tmp_path, "-c", watch, *given)
    assert json.loads(done.stdout) == [2, False]
    assert "trainer.method_args.aggregation_strategy=FedAvgg" in done.stderr
    assert "did you mean 'FedAvg'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "script",
    ["src/train.py", "src/eval.py", "scripts/run_federated_lora_unlearn.py", "scripts/run_federated_lora_finetune.py"],
)
def test_a_script_answers_from_anywhere(script, repo_root, tmp_path):
    done = run_in(tmp_path, repo_root / script, "--cfg", "job", "task_name=t")
    assert done.returncode == 0, done.stderr
    mode = {"src/train.py": "finetune", "src/eval.py": "eval"}.get(script, script.split("_")[-1].removesuffix(".py"))
    assert yaml.safe_load(done.stdout)["mode"] == mode
    assert not list(tmp_path.iterdir())


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What reaches the application, with nothing run."""
    from unfed.app import runs

    configs = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "run", configs.append)
    return configs


def test_a_command_line_reaches_the_application_as_one_run(started, tiny_model_dir, tmp_path):
    argv = [*RUN, f"{MODEL}={tiny_model_dir}", "trainer.method_args.aggregation_strategy=FedYogi"]
    assert main(["unlearn", *argv]) == 0
    (config,) = started
    assert (config.mode, config.aggregator.name, config.trainer.method_args.aggregation_strategy) == (
        "unlearn", "FedYogi", "FedYogi",
    )  # fmt: skip
    assert [p.name for p in tmp_path.rglob("*")] == ["saves", "unlearn", "t"]


def test_each_run_of_a_sweep_has_its_own_directory(started, tiny_model_dir):
    assert main(["unlearn", *RUN, f"{MODEL}={tiny_model_dir}", "--multirun", "method=NPO,GradDiff"]) == 0
    assert [c.method.name for c in started] == ["NPO", "GradDiff"]
    assert [c.paths.output_dir.rsplit("/", 2)[1:] for c in started] == [["t", "0"], ["t", "1"]]


def test_a_users_error_in_the_run_is_its_message_and_2(monkeypatch, started, tiny_model_dir, tmp_path, capsys):
    from unfed.app import runs
    from unfed.base.errors import AdapterError

    def fail(config):
        raise AdapterError("the adapter is for another base")

    monkeypatch.setattr(runs, "run", fail)
    assert main(["unlearn", *RUN, f"{MODEL}={tiny_model_dir}"]) == 2
    assert capsys.readouterr().err.strip().endswith("error: the adapter is for another base")
    assert [p.name for p in tmp_path.rglob("*")] == ["saves", "unlearn"], "no empty directory of a run that never was"


def test_an_interrupted_command_ends_in_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert launch.guarded(interrupted) == 130
    assert "resume=true" in capsys.readouterr().err


def test_config_prints_the_resolved_run(capsys):
    assert main(["config", *RUN, f"{MODEL}=nobody/nothing", "lora=quick", "method=SimNPO"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["model_args"]["lora_config"]["r"] == 8
    assert shown["method"] == {"name": "SimNPO", "params": {
        "beta": 4.5, "delta": 0.0, "gamma": 0.125, "alpha": 1.0, "retain_loss_type": "NLL"}}  # fmt: skip


def test_config_says_what_is_wrong(capsys):
    assert main(["config", *RUN, "method.bta=1", "seed=x"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "method.bta" in said.err
    assert "seed=x" in said.err


def test_an_unknown_subcommand_and_help(capsys):
    assert main(["unlern"]) == 2
    assert "did you mean 'unlearn'?" in capsys.readouterr().err
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS)


@pytest.mark.parametrize("command", ["config", "plan"])
def test_help_of_the_commands_that_only_print(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"unfed {command}" in capsys.readouterr().out


def test_every_subcommand_exists():
    import importlib

    for command in COMMANDS.values():
        module, _, function = command.where.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        (["experiment=finetune/quickstart"], "finetune"),
        (["experiment=unlearn/quickstart"], "unlearn"),
        (["experiment=eval/quickstart"], "eval"),
        (["--config-name=train-lora.yaml", "experiment=finetune/quickstart"], "finetune"),
    ],
)
def test_what_is_shown_is_the_run_that_its_experiment_is_for(given, mode, capsys):
    assert main(["config", *given, "task_name=t", "model=tiny-lora", f"{MODEL}=nobody/nothing"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["mode"] == mode
