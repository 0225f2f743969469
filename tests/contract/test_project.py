"""What the project promises about itself: sizes, imports, safety, configuration files, commands in its guides."""

import ast
import re
import shlex
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
MODULES = sorted((REPO / "src").rglob("*.py"))
SCRIPTS = sorted(p for d in ("scripts", "benchmarks", "examples") for p in (REPO / d).rglob("*.py"))
CONFIGS = sorted((REPO / "configs").rglob("*.yaml"))
GUIDES = sorted([*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md")])
SHELL = {"bash", "sh", "shell", "console"}
EXTRAS = {"flash_attn", "bitsandbytes", "deepspeed", "nvflare", "ray", "lm_eval", "evaluate", "optuna"}
# Modules that other programs import: their decorators are needed at once, and nothing else imports them so.
BORDERS = {
    "src/unfed/federated/nvflare.py": "nvflare",
    "src/unfed/app/nvflare_app.py": "nvflare",
    "src/unfed/federated/ray.py": "ray",
}
# Parts of a named library that it pins itself.
PARTS = {"pydantic_core": "pydantic"}
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def ids(paths):
    return [str(p.relative_to(REPO)) for p in paths]


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(nodes):
    """(line, dotted module) of every import statement among ``nodes``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def run_at_import(node):
    """Every node below ``node`` that runs when the module is imported: not what stands inside functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not _for_types_only(child):
            yield child
            yield from run_at_import(child)


def _for_types_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=ids([*MODULES, *SCRIPTS]))
def test_module_is_small_and_so_are_its_functions(path):
    problems = []
    if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 300:
        problems.append(f"{lines} lines")
    if path.stem in {"utils", "util", "helpers", "misc", "common"}:
        problems.append("the name says nothing")
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (length := node.end_lineno - node.lineno + 1) > 60:
                problems.append(f"{node.name} has {length} lines")
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if (count := len([a for a in arguments if a not in {"self", "cls"}])) > 6:
                problems.append(f"{node.name} has {count} parameters")
    assert not problems


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_module_unpickles_nothing_and_leaves_optional_libraries_for_later(path):
    problems = [f"line {n}: {m}" for n, m in imports(ast.walk(tree(path))) if m.split(".")[0] in PICKLES]
    early = EXTRAS - {BORDERS.get(str(path.relative_to(REPO)))}
    problems += [f"line {n}: {m}, on import" for n, m in imports(run_at_import(tree(path))) if m.split(".")[0] in early]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            name, said = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in {"torch.load", "yaml.load", "eval", "exec"} or said.get("allow_pickle") == "True":
                problems.append(f"line {node.lineno}: {name}")
            if said.get("trust_remote_code") == "True":
                problems.append(f"line {node.lineno}: trust_remote_code=True")
    assert not problems


def test_only_the_adapter_module_reads_live_peft_tensors():
    users = [p for p in MODULES if "get_peft_model_state_dict" in p.read_text(encoding="utf-8")]
    assert ids(users) == ["src/unfed/models/adapter.py"]


def test_every_library_imported_is_named_in_pyproject():
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {_canonical(re.split(r"[\s<>=!~\[]", d)[0]) for d in project["dependencies"]}
    owners = packages_distributions()
    unnamed = set()
    for path in MODULES:
        for _, module in imports(run_at_import(tree(path))):
            top = PARTS.get(module.split(".")[0], module.split(".")[0])
            if top in sys.stdlib_module_names or top in {"unfed", BORDERS.get(str(path.relative_to(REPO)))}:
                continue
            if not {_canonical(d) for d in owners.get(top, [top])} & named:
                unnamed.add(f"{path.relative_to(REPO)}: {top}")
    assert not unnamed


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "tests/compat/requirements-peft013.txt"])
def test_requirements_are_pinned_exactly(name):
    lines = [line.split("#")[0].strip() for line in (REPO / name).read_text(encoding="utf-8").splitlines()]
    loose = [
        line for line in lines if line and not re.fullmatch(r"[a-z0-9-]+(\[[a-z]+\])?==[0-9][^+\s]*|-e \.|-r \S+", line)
    ]
    assert not loose


def test_requirements_pin_all_that_pyproject_names():
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {_canonical(re.split(r"[\s<>=!~\[]", d)[0]) for d in project["dependencies"]}
    pinned = {line.split("==")[0] for line in (REPO / "requirements.txt").read_text(encoding="utf-8").splitlines()}
    assert not named - pinned


@pytest.mark.skipif(not CONFIGS, reason="no configuration files yet")
@pytest.mark.parametrize("path", CONFIGS, ids=ids(CONFIGS))
def test_configuration_file_is_yaml_with_a_mapping(path):
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert loaded is None or isinstance(loaded, dict)


def commands(path):
    """Commands in the shell blocks of a Markdown file: comments and prompts off, continued lines joined."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for language, text in blocks:
        if language in SHELL:
            for line in text.replace("\\\n", " ").splitlines():
                if command := line.strip().removeprefix("$ ").strip():
                    yield command


def problem_of(command):
    """What is wrong with a command's program, or ``None``; its arguments are other tests' business."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if not words:
        return None
    program, rest = words[0], words[1:]
    if program == "make":
        targets = [w for w in rest if "=" not in w and not w.startswith("-")]
        return next((f"no target {t}" for t in targets if t not in _make_targets()), None)
    if program in {"python", "python3", "accelerate", "torchrun", "bash"}:
        script = next((w for w in rest if w.endswith((".py", "/run"))), None)
        return f"no file {script}" if script and not (REPO / script).is_file() else None
    if program == "unfed":
        return None if _has_entry_point("unfed") else "no entry point"
    return None


@pytest.mark.parametrize("path", GUIDES, ids=ids(GUIDES))
def test_commands_in_guides_name_what_exists(path):
    problems = [f"{c}: {p}" for c in commands(path) if (p := problem_of(c))]
    assert not problems


def test_ci_installs_and_tests_as_the_readme_says():
    readme = REPO / "README.md"
    if not readme.is_file():
        pytest.skip("no README yet")
    ci, said = (REPO / ".ci" / "run").read_text(encoding="utf-8"), readme.read_text(encoding="utf-8")
    for command in ("pip install -r requirements.txt", "python -m pytest"):
        assert command in said
        assert command in ci


@cache
def _make_targets():
    return set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(encoding="utf-8"), flags=re.M))


def _has_entry_point(name):
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, function = project["scripts"][name].split(":")
    path = REPO / "src" / Path(*module.split(".")).with_suffix(".py")
    return path.is_file() and any(isinstance(n, ast.FunctionDef) and n.name == function for n in ast.walk(tree(path)))


def _canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()
