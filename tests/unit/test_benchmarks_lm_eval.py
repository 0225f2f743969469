"""lm-eval on the open model: a local task in WMDP's format, its accuracy worked out again from the model itself."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from unfed.app.runs import run
from unfed.base.errors import ConfigError, UnfedError
from unfed.config import schema
from unfed.config.compat import resolve
from unfed.config.preflight import preflight
from unfed.evaluation import lm_tasks
from unfed.evaluation.lm_tasks import LmEvalArgs
from unfed.models.load import load_model
from unfed.models.spec import ModelArgs, TokenizerArgs

NEEDS = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
LETTERS = "ABCD"
THINGS = ("bread", "boats", "maps", "lamps", "fish", "hats", "keys", "nuts")
DOCS = [
    {
        "question": f"What does {name} {verb}?",
        "choices": [THINGS[(n + k * step) % 8] for k in range(4)],
        "answer": (n * 5 + step) % 4,
    }
    for n, name in enumerate(("Ana", "Bo", "Cleo", "Dag", "Eve", "Fay"))
    for step, verb in ((1, "sell"), (3, "bake"), (5, "paint"), (7, "hide"))
]


def prompt_of(doc):
    """WMDP's template, written out."""
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, doc["choices"], strict=True))
    return f"{doc['question']}{options}\nAnswer:"


def write_task(folder: Path, name, rows=DOCS, **changes):
    """A task file that takes lm-eval's own WMDP template and reads local rows."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in rows), encoding="utf-8")
    template = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / "wmdp" / "_default_template_yaml"
    task = {
        "include": str(template),
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "metadata": {"version": 7},
    } | changes
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    if importlib.util.find_spec("lm_eval") is None:
        return folder
    write_task(folder, "letters")
    write_task(folder, "again", DOCS[:6])
    write_task(folder, "no_column", doc_to_text="{{riddle}}")
    write_task(folder, "runs_code", unsafe_code=True)
    write_task(folder, "odd_metric", metric_list=[{"metric": "seqeval"}])
    write_task(folder, "no_data", dataset_kwargs={"data_files": {"test": str(folder / "gone.jsonl")}})
    (folder / "all.yaml").write_text(
        yaml.safe_dump({"group": "all_letters", "task": ["letters", "again"], "aggregate_metric_list": [
            {"metric": "acc", "aggregation": "mean", "weight_by_size": True}]}), encoding="utf-8")  # fmt: skip
    return folder


def evaluation(tasks, *names, **given):
    return schema.EvalConfig(
        suite="lm_eval", lm_eval=LmEvalArgs(tasks=names or ("letters",), include_path=str(tasks), **given)
    )


@pytest.fixture
def evaluated(tmp_path):
    """Runs an evaluation of a model that stands by itself."""

    def make(model, config):
        return run(
            schema.RunConfig(
                mode="eval",
                task_name="out",
                model=schema.ModelConfig(ModelArgs(str(model))),
                paths=schema.PathsConfig(str(tmp_path), None, str(tmp_path / "out")),
                eval=config,
            )
        )

    return make


@torch.no_grad()
def answers_of(model, tokenizer, docs=DOCS):
    """The most probable letter of each row: one forward pass for each letter, nothing batched, nothing cached."""
    chosen = []
    for doc in docs:
        context = tokenizer(prompt_of(doc))["input_ids"]
        scores = []
        for letter in LETTERS:
            whole = tokenizer(f"{prompt_of(doc)} {letter}")["input_ids"]
            assert whole[: len(context)] == context
            logp = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
            scores.append(sum(logp[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
        chosen.append(int(np.argmax(scores)))
    return chosen


def opened(path, **args):
    loaded = load_model(ModelArgs(str(path), **args), TokenizerArgs(), trainable=False)
    return loaded.model.eval(), loaded.tokenizer


@NEEDS
def test_accuracy_is_that_of_the_models_own_log_likelihoods(small_base, tasks, evaluated):
    result = evaluated(small_base, evaluation(tasks, batch_size=5))
    right = [float(a == d["answer"]) for a, d in zip(answers_of(*opened(small_base)), DOCS, strict=True)]
    assert 0 < sum(right) < len(DOCS)  # otherwise a constant would pass
    written = json.loads((result.directory / "LM_EVAL.json").read_text())
    entry = written["letters/acc"]
    assert [row["score"] for row in entry["value_by_index"].values()] == right
    assert entry["agg_value"] == pytest.approx(np.mean(right))
    assert entry["stderr"] == pytest.approx(np.std(right, ddof=1) / np.sqrt(len(right)))
    assert (entry["n"], entry["version"], entry["num_fewshot"]) == (24, 7, 0)
    assert written["_run"]["settings"]["batch_size"] == 5
    assert set(written["_run"]["digests"]) == {"base", "model"}
    assert written["_run"]["rows"]["letters"].startswith("sha256:")
    summary = json.loads((result.directory / "LM_SUMMARY.json").read_text())
    assert summary == result.summary == {"letters/acc": entry["agg_value"]}
    assert json.loads((result.directory / "run.json").read_text())["summary"] == summary


@NEEDS
def test_the_adapter_that_unlearning_leaves_is_what_is_scored(from_finetuned, tasks, tmp_path):
    config = from_finetuned(
        tmp_path / "forgot", eval=evaluation(tasks), args={"learning_rate": 0.2}, method_args={"global_rounds": 0}
    )
    result = run(config)
    model, tokenizer = opened(result.directory, use_lora=True)
    new = answers_of(model, tokenizer)
    with model.disable_adapter():
        base = answers_of(model, tokenizer)
    assert new != base
    rows = json.loads((result.directory / "LM_EVAL.json").read_text())["letters/acc"]["value_by_index"]
    assert [row["score"] for row in rows.values()] == [float(a == d["answer"]) for a, d in zip(new, DOCS, strict=True)]
    assert [row["score"] for row in rows.values()] != [float(a == d["answer"]) for a, d in zip(base, DOCS, strict=True)]
    run_file = json.loads((result.directory / "run.json").read_text())
    digests = json.loads((result.directory / "LM_EVAL.json").read_text())["_run"]["digests"]
    assert digests["adapter"] == run_file["adapter"]
    assert run_file["summary"] == result.summary


@NEEDS
def test_a_group_is_the_mean_over_its_rows_and_limit_keeps_the_first(small_base, tasks, evaluated):
    result = evaluated(small_base, evaluation(tasks, "all_letters"))
    right = [float(a == d["answer"]) for a, d in zip(answers_of(*opened(small_base)), DOCS, strict=True)]
    scores = json.loads((result.directory / "LM_EVAL.json").read_text())
    assert scores["all_letters/acc"]["agg_value"] == pytest.approx((sum(right) + sum(right[:6])) / 30)
    assert scores["again/acc"]["agg_value"] == pytest.approx(np.mean(right[:6]))
    assert set(result.summary) == {"all_letters/acc"}
    assert len(set(scores["_run"]["rows"].values())) == 2  # six rows are other rows than twenty-four
    limited = evaluated(small_base, evaluation(tasks, limit=10))
    assert limited.summary == {"letters/acc": pytest.approx(np.mean(right[:10]))}
    assert limited.evaluation.scores["letters/acc"].extra["n"] == 10


@torch.no_grad()
def continued(model, tokenizer, text, count):
    """The ``count`` most probable tokens after ``text``, one by one, without a cache."""
    ids = tokenizer(text)["input_ids"]
    start = len(ids)
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@NEEDS
def test_generated_answers_are_those_of_greedy_decoding(small_base, tmp_path, evaluated):
    model, tokenizer = opened(small_base)
    rows = [{"question": d["question"], "target": continued(model, tokenizer, d["question"], 6)} for d in DOCS[:8]]
    assert any(r["target"].strip() for r in rows)
    wrong = [{**r, "target": r["target"] + "z"} for r in rows[:2]] + rows[2:]
    write_task(
        tmp_path,
        "spoken",
        wrong,
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_choice=None,
        doc_to_target="{{target}}",
        generation_kwargs={"max_gen_toks": 6, "until": ["never said"], "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[{"name": "first", "filter": [{"function": "take_first"}]}],
    )
    result = evaluated(small_base, evaluation(tmp_path, "spoken", batch_size=3))
    assert result.summary == {"spoken/exact_match,first": 6 / 8}


@NEEDS
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_column", "'riddle' is undefined"),
        ("runs_code", "runs code that the model has written"),
        ("odd_metric", "needs the metric 'seqeval'"),
    ],
)
def test_a_task_that_cannot_run_says_why(small_base, tasks, evaluated, name, said):
    with pytest.raises(UnfedError) as e:
        evaluated(small_base, evaluation(tasks, name))
    assert said in str(e.value)
    assert "\n" not in str(e.value)


def command(tasks, names="letters"):
    return [
        "experiment=eval/wmdp", f"eval.lm_eval.include_path={tasks}", f"eval.lm_eval.tasks=[{names}]",
        "task_name=t", "model=tiny", "model.model_args.pretrained_model_name_or_path=hub/name",
    ]  # fmt: skip


@NEEDS
def test_unknown_tasks_and_files_are_found_before_the_model_is_opened(tasks, monkeypatch):
    assert resolve(command(tasks), "eval.yaml", files=True).eval.lm_eval.tasks == ("letters",)
    # Reading all of lm-eval's tasks takes ten seconds (the slow test below does): here they are WMDP's.
    index, home = lm_tasks._index, lm_tasks._homes(["wmdp"])
    monkeypatch.setattr(lm_tasks, "_index", lambda folders, everything: index((*home, *folders), everything=False))
    with pytest.raises(ConfigError) as e:
        resolve(command(tasks, "leters,wmdp_bios"), "eval.yaml", files=True)
    first, second = e.value.problems
    assert "no task 'leters'; did you mean letters" in first
    assert "no task 'wmdp_bios'; did you mean wmdp_bio" in second
    (gone,) = preflight(resolve(command(tasks, "no_data"), "eval.yaml"))
    assert gone == f"eval.lm_eval.tasks: no_data: there is no file {tasks / 'gone.jsonl'}"
    (nowhere,) = preflight(resolve(command(tasks / "nowhere"), "eval.yaml"))
    assert f"eval.lm_eval.include_path={tasks / 'nowhere'}: there is no such directory" in nowhere


@NEEDS
def test_wmdp_is_found_without_the_index_of_everything():
    args = resolve(["experiment=eval/wmdp", "task_name=t", "model=tiny"], "eval.yaml").eval.lm_eval
    assert lm_tasks.task_problems(args) == []
    found = lm_tasks._manager(args).task_index
    assert set(args.tasks) <= set(found)
    assert len(found) < 100


@NEEDS
@pytest.mark.slow
def test_what_a_folder_gives_is_what_the_index_of_everything_gives():
    everything = lm_tasks._index((), everything=True).task_index
    assert len(everything) > 5000
    general = resolve(["experiment=eval/general", "task_name=t", "model=tiny"], "eval.yaml").eval.lm_eval
    assert lm_tasks.task_problems(general) == []
    # A group of tags, as mmlu is, may have parts in any folder, so it takes the index of everything.
    assert len(lm_tasks._manager(general).task_index) == len(everything)
    names = ["wmdp", *lm_tasks.WMDP, *(t for t in general.tasks if t != "mmlu")]
    some = lm_tasks._manager(LmEvalArgs(tasks=tuple(names))).task_index
    assert len(some) < 1000
    while names:
        name = names.pop()
        assert some[name].yaml_path == everything[name].yaml_path
        parts = some[name].cfg["task"]
        names += [] if isinstance(parts, str) else parts
    (tag,) = lm_tasks.task_problems(LmEvalArgs(tasks=("ai2_arc", "wmdp_bioo")))  # a tag, of whichever folders
    assert "no task 'wmdp_bioo'; did you mean wmdp_bio" in tag


def test_without_lm_eval_one_message_says_how_to_install_it(tasks, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(lm_tasks.importlib.util, "find_spec", lambda n, *a: None if n == "lm_eval" else real(n, *a))
    with pytest.raises(ConfigError) as e:
        resolve(command(tasks), "eval.yaml", files=True)
    assert e.value.problems == (
        'eval=lm_eval: the package lm-eval is not installed; pip install "unfed[benchmarks]"',
    )  # fmt: skip
    with pytest.raises(ConfigError, match="not installed"):
        lm_tasks.load_tasks(LmEvalArgs(include_path=str(tasks)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("tasks=[]", "eval.lm_eval.tasks: names no task"),
        ("tasks=[a,a]", "eval.lm_eval.tasks: a is named twice"),
        ("limit=0", "eval.lm_eval.limit=0: must be at least 1"),
        ("batch_size=0", "eval.lm_eval.batch_size=0"),
        ("num_fewshot=-1", "eval.lm_eval.num_fewshot=-1"),
        ("shots=1", "eval.lm_eval.shots: no such setting"),
    ],
)
def test_settings_out_of_their_limits(given, said):
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        resolve(["experiment=eval/general", "task_name=t", "model=tiny", f"eval.lm_eval.{given}"], "eval.yaml")


def test_an_unlearning_run_takes_the_suite():
    argv = ["experiment=unlearn/tofu/default", "eval=lm_eval", "task_name=t"]
    config = resolve(argv, "unlearn-lora.yaml")
    assert config.eval.suite == "lm_eval"
    assert config.eval.lm_eval.tasks == ("wmdp_bio", "wmdp_cyber", "wmdp_chem")


@NEEDS
def test_no_bar_is_drawn_where_nobody_looks_and_terminals_keep_them(small_base, tasks, tmp_path, capfd, monkeypatch):
    import tqdm

    from unfed.evaluation.general import evaluate_benchmarks

    model, tokenizer = opened(small_base)
    capfd.readouterr()
    model.train()
    before = tqdm.tqdm.__init__
    monkeypatch.chdir(tmp_path)  # no repository
    args = evaluation(tasks, limit=2).lm_eval
    evaluate_benchmarks(model, tokenizer, args)
    assert not [line for line in capfd.readouterr().err.splitlines() if "it/s" in line or "fatal" in line]
    assert model.training
    assert tqdm.tqdm.__init__ is before
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    evaluate_benchmarks(model, tokenizer, args)
    assert "it/s" in capfd.readouterr().err
