"""The guides: every command composes, those about LoRA and unlearning run, and tables and names agree with the code."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from unfed.base.errors import ConfigError
from unfed.cli import alternates, evaluate, fed_train, network, partition, show, study, sweep, train, tune_rank
from unfed.config import compat, load, schema
from unfed.config.sweep_runs import checked

REPO = Path(__file__).resolve().parents[2]
MODEL = "model.model_args.pretrained_model_name_or_path"
BASE = "meta-llama/Llama-3.2-3B-Instruct"
PAIRS = {
    "README.md": "README.zh-CN.md",
    "docs/lora.md": "docs/lora.zh-CN.md",
    "docs/unlearning.md": "docs/unlearning.zh-CN.md",
    "docs/methods.md": "docs/methods.zh-CN.md",
    "docs/evaluation.md": "docs/evaluation.zh-CN.md",
    "docs/sweeps.md": "docs/sweeps.zh-CN.md",
    "docs/clients.md": "docs/clients.zh-CN.md",
    "docs/engines.md": "docs/engines.zh-CN.md",
    "docs/network.md": "docs/network.zh-CN.md",
    "docs/privacy.md": "docs/privacy.zh-CN.md",
    "docs/robust.md": "docs/robust.zh-CN.md",
    "docs/failures.md": "docs/failures.zh-CN.md",
}
PAGES = [*PAIRS, *PAIRS.values()]
RUN_HERE = ("docs/lora.md", "docs/unlearning.md", "docs/privacy.md", "docs/clients.md")
"""Pages whose commands are run from top to bottom in one directory, as a reader would."""
PROMISED = (
    "python src/fed_train.py --config-name=train-lora.yaml experiment=finetune/tofu/default task_name=SAMPLE_TRAIN",
    (
        "python src/fed_train.py --config-name=unlearn-lora.yaml experiment=unlearn/tofu/default forget_split=forget10 "
        "retain_split=retain90 trainer=FederatedUnlearningTrainer model=Llama-3.2-3B-Instruct-lora "
        f"{MODEL}=saves/finetune/SAMPLE_TRAIN"
    ),
    f"python scripts/run_federated_lora_unlearn.py {MODEL}=saves/finetune/SAMPLE_TRAIN",
    f"{MODEL}={BASE} model.model_args.lora_model_path=saves/finetune/SAMPLE_TRAIN",
)


@dataclass(frozen=True)
class Program:
    """How a command of the guides reaches the code: its primary configuration, and its function."""

    config: str
    main: Callable[[list[str]], int]
    runs: bool = True


PROGRAMS = {
    ("python", "src/fed_train.py"): Program("train-lora.yaml", fed_train.main),
    ("python", "src/train.py"): Program("train.yaml", train.main),
    ("python", "src/eval.py"): Program("eval.yaml", evaluate.main),
    ("python", "scripts/run_federated_lora_unlearn.py"): Program("unlearn-lora.yaml", fed_train.unlearn),
    ("python", "scripts/run_federated_lora_finetune.py"): Program("train-lora.yaml", fed_train.finetune),
    ("unfed", "train"): Program("train-lora.yaml", fed_train.finetune),
    ("unfed", "unlearn"): Program("unlearn-lora.yaml", fed_train.unlearn),
    ("unfed", "evaluate"): Program("eval.yaml", evaluate.main),
    ("unfed", "config"): Program(show.DEFAULT, show.config, runs=False),
    ("unfed", "plan"): Program(show.DEFAULT, show.plan, runs=False),
    ("unfed", "partition"): Program(partition.PRIMARY, partition.main, runs=False),
    ("unfed", "oracle"): Program(show.DEFAULT, show.oracle, runs=False),
    ("unfed", "alternates"): Program(alternates.PRIMARY, alternates.main, runs=False),
}
SEARCHED = 8
"""Of the guide's search: three corners, and the six combinations of method and seed less the one that is a corner."""
OTHERS = {"make", "pip", "source", "python3.11"}
"""Commands that are not ours; test_project.py looks at make's targets."""
AFTERWARDS = {("unfed", "report"), ("unfed", "compare"), ("unfed", "network")}
"""Commands of ours without a configuration."""
MANY = {("unfed", "sweep"): sweep.sweep, ("unfed", "tune-rank"): tune_rank.tune_rank}
"""Commands of ours that make many runs."""


def text(page: str) -> str:
    return (REPO / page).read_text(encoding="utf-8")


def commands(page: str) -> list[tuple[str, ...]]:
    """The commands of a page's shell blocks as words: comments off, continued and chained lines taken apart."""
    found: list[tuple[str, ...]] = []
    for block in re.findall(r"^```bash\n(.*?)^```", text(page), flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            found += [tuple(shlex.split(part, comments=True)) for part in line.split(" && ")]
    return [words for words in found if words]


def program_of(words: tuple[str, ...]) -> Program | None:
    return PROGRAMS.get(words[:2])


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """The tables whose header starts with ``heading``: the first code of each row -> its cells."""
    tables = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text(page), flags=re.M)
    found = {}
    for line in "".join(tables).splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        found[re.findall(r"`([^`]+)`", cells[0])[0]] = cells
    return found


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAIRS)
def test_every_command_is_of_a_known_program(page):
    found = [w for w in commands(page) if program_of(w) is None and w[:2] not in {*AFTERWARDS, *MANY}]
    assert [w for w in found if w[0] not in OTHERS and w[:3] != ("python", "-m", "pytest")] == []


def test_every_command_of_the_readme_composes_into_a_valid_run_as_it_stands():
    composed, problems = set(), []
    for words in commands("README.md"):
        if (program := program_of(words)) is None:
            continue
        try:
            _, cfgs = compat._composed(compat.take_apart(words[2:], program.config))
            composed |= {(c.mode, c.task_name) for c in map(load.from_hydra, cfgs)}
        except ConfigError as e:
            problems.append(f"{shlex.join(words)}: {e}")
    assert not problems
    assert {("finetune", "SAMPLE_TRAIN"), ("unlearn", "by_script"), ("eval", "fed_lora_unlearn")} <= composed


def test_every_command_about_a_network_is_one_and_what_is_submitted_composes():
    submitted = []
    for page in ("docs/network.md", "examples/network/README.md", "examples/network/README.zh-CN.md"):
        for words in (w for w in commands(page) if w[:2] == ("unfed", "network")):
            assert words[2] in network.COMMANDS
            if words[2] != "submit":
                continue
            named = ["--config-name=train-lora.yaml", *(w for w in words if w.startswith("--config-name="))]
            overrides = [w for w in words[3:] if w not in {"--kit", "KIT", *named}]
            submitted.append(compat.resolve([named[-1], "engine=nvflare", *overrides], "train-lora.yaml").mode)
    assert submitted == ["finetune", "unlearn"] * 5


def test_every_command_about_engines_composes_and_every_setting_is_explained():
    found = [compat.resolve(list(w[2:]), p.config) for w in commands("docs/engines.md") if (p := program_of(w))]
    assert [(c.mode, c.engine.name, c.engine.workers) for c in found] == [
        ("finetune", "ray", None), ("unlearn", "ray", 2), ("finetune", "ray", 8),
    ]  # fmt: skip
    assert rows("docs/engines.md", "name").keys() == {f.stem for f in (REPO / "configs" / "engine").glob("*.yaml")}
    explained = {key.removeprefix("engine.") for key in rows("docs/engines.md", "setting")}
    assert explained == read("engine", "ray").keys() - {"name", "keep_checkpoints", "keep_every", "same_versions"}


def test_every_command_about_methods_composes_and_every_method_has_a_section():
    for words in commands("docs/methods.md"):
        program = program_of(words)
        assert program is not None, words
        argv = list(words[2:])
        if words[1] == "alternates":
            while argv[0].startswith("--"):
                argv = argv[2:]
            argv.append("task_name=alternates")
        assert compat.resolve(argv, program.config).mode == "unlearn"
    sections = re.findall(r"^### (\w+)$", text("docs/methods.md"), flags=re.M)
    assert sections[: len(schema.METHODS)] == list(schema.METHODS)


@pytest.mark.parametrize(("english", "chinese"), PAIRS.items())
def test_both_languages_have_the_same_commands_tables_and_sections(english, chinese):
    assert commands(english) == commands(chinese)
    for pattern in (r"^(#+) ", r"^```(\w*)$", r"^(\d+)\. ", r"`(\w+=[\w.-]+)`"):
        assert re.findall(pattern, text(english), re.M) == re.findall(pattern, text(chinese), re.M), pattern
    assert [line.count("|") for line in text(english).splitlines() if line.startswith("|")] == [
        line.count("|") for line in text(chinese).splitlines() if line.startswith("|")
    ]


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_readme_has_the_promised_commands_and_its_first_one_is_quickstart(page):
    found = commands(page)
    assert found[0] == ("make", "quickstart")
    for promised in PROMISED:
        assert any(set(shlex.split(promised)) <= set(words) for words in found), promised


@pytest.mark.parametrize("recipe", [study.QUICKSTART, study.REAL], ids=lambda r: r.name)
def test_the_make_targets_of_the_guides_compose(recipe, tmp_path):
    assert {"base", "finetune", "oracle", *recipe.methods} == study._configs(recipe, tmp_path, "saves/tiny", ()).keys()


# --- running them ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with 12 fictitious rows under TOFU's names."""
    from unfed.data.fictional import split_rows

    root = tmp_path_factory.mktemp("few")
    (root / "tofu").mkdir()
    retain, forget = split_rows("retain90")[:8], split_rows("forget10")[:4]
    files = {"full": [*retain, *forget], "retain90": retain, "forget10": forget}
    rest = ("holdout10", "forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    files |= {name: split_rows(name)[:4] for name in rest}
    for name, found in files.items():
        (root / "tofu" / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return root


def small(words: tuple[str, ...], program: Program, base: Path) -> list[str]:
    """The command's arguments on the tiny model: another base, a step a client and round, little evaluation."""
    argv = [w.replace(BASE, str(base)) for w in words[2:]]
    if words[:2] == ("unfed", "partition"):
        return argv  # it needs no model
    if not any(w.startswith(f"{MODEL}=") for w in argv):
        argv.append(f"{MODEL}={base}")
    if program.runs:
        argv += ["eval.limit=2", "eval.generation.max_new_tokens=2"]
        if program.config != "eval.yaml":
            argv += ["trainer.args.max_steps=1", "trainer.args.report_to=none"]
            if "--config-name=train-lora.yaml" in argv and "trainer.method_args.global_rounds=2" not in argv:
                argv.append("trainer.method_args.global_rounds=1")
            evaluated = {"task_name=fed_lora_unlearn", "task_name=ORACLE"} & set(argv)
            argv += [] if evaluated else ["eval.enabled=false"]
    return argv


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, small_base: Path, few_rows: Path) -> Path:
    """The directory of somebody who ran every command of ``RUN_HERE``; each must have ended in 0."""
    place = tmp_path_factory.mktemp("reader")
    codes: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("UNFED_DATA_DIR", str(few_rows))
        for words in (w for page in RUN_HERE for w in commands(page)):
            program = program_of(words)
            if program is not None and shlex.join(words) not in codes:
                codes[shlex.join(words)] = program.main(small(words, program, small_base))
    assert {c: code for c, code in codes.items() if code != 0} == {}
    assert len(codes) > 15
    return place


def record(place: Path, name: str) -> dict:
    return json.loads((place / "saves" / name / "run.json").read_text(encoding="utf-8"))


def test_every_command_of_the_lora_and_unlearning_guides_runs(reader):
    finished = list((reader / "saves").rglob("run.json"))
    assert {json.loads(f.read_text(encoding="utf-8"))["status"] for f in finished} == {"finished"}
    ranks = {"SAMPLE_TRAIN": 16, "rank32": 32, "search/0": 8, "search/1": 16, "search/2": 64, "search_all_linear_r8": 8}
    made = {name: reader / "saves" / "finetune" / name / "adapter_config.json" for name in ranks}
    assert {name: json.loads(file.read_text(encoding="utf-8"))["r"] for name, file in made.items()} == ranks


def test_every_sweep_of_the_guides_is_checked_without_a_mistake(reader, few_rows, small_base, monkeypatch):
    """As far as the first run, for which the models are not here. Composing takes time: the first and the last are."""

    def ends_only(composer, combinations):
        every = list(combinations)
        first, last = checked(composer, [every[0], every[-1]])
        return [*[first] * (len(every) - 1), last]

    monkeypatch.setattr("unfed.config.sweep_runs.checked", ends_only)
    monkeypatch.chdir(reader)
    monkeypatch.setenv("UNFED_DATA_DIR", str(few_rows))
    monkeypatch.setattr("unfed.app.tiny_base.tiny_base", lambda *_, **__: small_base)
    monkeypatch.setattr("unfed.app.tune_rank.steps_of", list)
    monkeypatch.setattr("unfed.app.search.find_spec", lambda name: name)  # Optuna is an extra, and asked nothing here
    started: dict[str, list[int]] = {"sweep": [], "tune-rank": []}
    monkeypatch.setattr(sweep, "_carry_out", lambda _, runs, *rest: started["sweep"].append(len(runs)) or 0)
    monkeypatch.setattr("unfed.app.tune_rank.climb", lambda runs, *_: started["tune-rank"].append(len(runs)) or [])
    monkeypatch.setattr(tune_rank, "_show", lambda *_: 0)
    for words in (w for w in commands("docs/sweeps.md") if w[:2] in MANY):
        assert MANY[words[:2]](list(words[2:])) == 0, words
    assert started == {"sweep": [8, 8, SEARCHED], "tune-rank": [6, 6]}


def test_they_do_what_the_guides_say(reader):
    assert record(reader, "unlearn/fed_lora_unlearn")["forget_loss_agrees"] is True
    assert record(reader, "unlearn/from_base_and_adapter")["forget_loss_agrees"] is True
    assert "resumed" in record(reader, "finetune/SAMPLE_TRAIN")
    phases = [r["phase"] for r in record(reader, "unlearn/gentle")["rounds"]]
    assert phases == ["unlearn", "recover", "recover", "recover"]
    first = record(reader, "unlearn/fed_lora_unlearn")["rounds"][0]
    assert (first["clients"], first["aggregation_error"]) == (["client_0"], 0.0)
    interleaved = record(reader, "unlearn/interleaved")["rounds"]
    assert [(r["phase"], len(r["clients"])) for r in interleaved] == [("interleaved", 3)] * 5
    assert record(reader, "finetune/FULL")["rounds"][0]["aggregation_error"] is None
    summary = json.loads((reader / "saves/eval/against_oracle/TOFU_SUMMARY.json").read_text(encoding="utf-8"))
    assert {"forget_quality", "privleak", "model_utility"} <= summary.keys()


def test_a_run_leaves_the_files_that_the_readme_lists(reader, small_base, few_rows, monkeypatch):
    monkeypatch.chdir(reader)
    monkeypatch.setenv("UNFED_DATA_DIR", str(few_rows))
    words = next(w for w in commands("README.md") if "task_name=by_script" in w)
    program = program_of(words)
    argv = [a for a in small(words, program, small_base) if "report_to" not in a and "eval.enabled" not in a]
    assert program.main(argv) == 0
    out = reader / "saves" / "unlearn" / "by_script"
    listed = [name for cells in rows("README.md", "file").values() for name in codes(cells[0])]
    assert len(listed) > 8
    assert [name for name in listed if not (out / name).exists()] == []


def test_the_readmes_python_opens_the_result_with_stock_peft(reader, small_base, monkeypatch):
    import torch
    from peft import PeftModel

    from unfed.base.artifacts import read_tensors

    monkeypatch.chdir(reader)
    (block,) = re.findall(r"^```python\n(.*?)^```", text("README.md"), flags=re.M | re.S)
    assert block in text("README.zh-CN.md")
    made: dict = {}
    exec(compile(block.replace(BASE, str(small_base)), "README.md", "exec"), made)  # noqa: S102
    assert isinstance(made["model"], PeftModel)
    own = {n.replace(".default", ""): p for n, p in made["model"].named_parameters() if ".lora_" in n}
    saved = read_tensors(reader / "saves/unlearn/fed_lora_unlearn/adapter_model.safetensors")
    assert own.keys() == set(saved)
    assert all(torch.equal(own[n], t) for n, t in saved.items())


# --- tables and names ------------------------------------------------------------------------------------------------


def read(group: str, name: str) -> dict:
    return yaml.safe_load((REPO / "configs" / group / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("page", "group"), [("README.md", "aggregator"), ("README.md", "method"), ("docs/methods.md", "method")]
)
def test_the_defaults_in_tables_are_those_of_the_configuration(page, group):
    names = {f.stem for f in (REPO / "configs" / group).glob("*.yaml")}
    shown = {name: cells for name, cells in rows(page, "name").items() if name in names}
    assert shown.keys() == names
    for name, cells in shown.items():
        given = {k: str(v) for k, v in read(group, name).items() if k != "name"}
        said = dict(code.split("=") for code in codes(cells[1]))
        assert {k: str(yaml.safe_load(v)) for k, v in said.items()} == given, name


@pytest.mark.parametrize("page", ["README.md", "docs/lora.md"])
def test_the_presets_in_tables_are_those_of_the_configuration(page):
    shown = rows(page, "`lora=`")
    assert shown.keys() == {"quick", "balanced", "high"}
    for name, cells in shown.items():
        given = read("lora", name)["lora_config"]
        assert codes(cells[2]) == given["target_modules"]
        said = dict(code.split("=") for code in codes(cells[1]))
        assert {k: yaml.safe_load(v) for k, v in said.items()} == {k: given[k] for k in said}
        assert said.keys() == {"r", "lora_alpha", "lora_dropout"}


def test_the_presets_parameter_counts_on_llama_3b():
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = 28
    shape = LlamaConfig(vocab_size=16, hidden_size=3072, intermediate_size=8192, num_hidden_layers=1,
                        num_attention_heads=24, num_key_value_heads=8, head_dim=128)  # fmt: skip
    for name, cells in rows("docs/lora.md", "`lora=`").items():
        given = read("lora", name)["lora_config"]
        with torch.device("meta"):
            model = get_peft_model(
                LlamaForCausalLM(shape), LoraConfig(r=given["r"], target_modules=given["target_modules"])
            )
        counted = layers * sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert int(cells[3].replace(",", "")) == counted, name


def test_every_parameter_of_the_adapter_is_explained():
    from dataclasses import fields

    from unfed.models.spec import LoraArgs

    explained = {c for cells in rows("docs/lora.md", "name").values() for c in codes(cells[0])}
    assert explained == {f.name for f in fields(LoraArgs)}


def main_path(page: str) -> list[str]:
    return re.findall(r"^\d+\. `(unfed(?:\.\w+)+)`", text(page), flags=re.M)


def found(dotted: str) -> object:
    """What a dotted name names: modules first, then attributes."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(dotted)


def test_the_main_path_is_printed_and_every_name_on_it_exists():
    path = main_path("README.md")
    assert len(path) == 17
    assert path == main_path("README.zh-CN.md") == main_path("docs/architecture.md")
    assert all(callable(found(name)) for name in path)


@pytest.mark.parametrize("page", [*PAGES, "docs/architecture.md"])
def test_every_dotted_name_and_every_link_of_a_page_exists(page):
    for name in set(re.findall(r"`(unfed(?:\.\w+)+)`", text(page))) - {"unfed.json"}:
        assert found(name) is not None
    for link in re.findall(r"\]\(([^)#:]+)\)", text(page)):
        assert (REPO / page).parent.joinpath(link).exists(), link


def test_the_architecture_names_the_modules_that_there_are():
    source = REPO / "src" / "unfed"
    listed = {package: set(codes(cells[1])) for package, cells in rows("docs/architecture.md", "package").items()}
    there = {
        p.name: {m.stem for m in p.glob("*.py")} - {"__init__"}
        for p in source.iterdir()
        if (p / "__init__.py").is_file()
    }
    listed["cli"].discard("unfed")
    there |= {
        f"{p.parent.name}.{p.name}": {m.stem for m in p.glob("*.py")} - {"__init__"}
        for p in source.glob("*/*/")
        if (p / "__init__.py").is_file()
    }
    assert listed == there


def test_the_messages_that_the_guide_explains_are_said_somewhere():
    said = "".join(p.read_text(encoding="utf-8") for p in (REPO / "src" / "unfed").rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", said)
    table = re.search(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", text("docs/lora.md"), flags=re.M)
    for line in table[1].splitlines():
        for message in codes(line.split("|")[1]):
            for piece in message.split("..."):
                words = piece.strip(" ,=")
                assert words in said, words
