"""What all tests share. Nothing here, and nothing a test starts, reaches a network."""

import os

# Before transformers and huggingface_hub are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A data root or an output root of the person who runs the tests must not steer them.
os.environ.pop("UNFED_DATA_DIR", None)

import json
import logging
import signal
from pathlib import Path

import pytest
from network_fixtures import network  # noqa: F401 - a fixture

# A shell that starts the tests in the background has them ignore Ctrl-C, and whatever they start ignores it, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"
AUTHOR_ROWS = 20  # TOFU: every author is a block of 20 rows


@pytest.fixture(autouse=True)
def _no_logging_is_left():
    """A command that runs in this process has Hydra log to a file of its run; later tests have no such file."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Reference values and TOFU beside the checkout; skips where they are not."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model_dir(shared_dir: Path) -> Path:
    """The golden two-layer Llama, to be read only: ``<shared>/golden/models/tiny``."""
    return shared_dir / "golden" / "models" / "tiny"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root (``paths.data_dir``) with a small ``tofu`` folder, for reading only.

    With the shared TOFU: 7 authors of 20 rows, ``full`` = 4 retain authors, then the forget ones in TOFU's order
    (``forget10`` has 3 authors, ``forget05`` the last 2 of them, ``forget01`` the last), the perturbed files of those
    rows, and 20 rows of each of the others. Without: the project's own generator.
    """
    root = tmp_path_factory.mktemp("data")
    source = SHARED / "data" / "tofu"
    if source.is_dir():
        _small_tofu(source, root / "tofu")
    else:
        from unfed.data.fictional import write_tofu_folder

        write_tofu_folder(root / "tofu")
    return root


def _small_tofu(source: Path, target: Path) -> None:
    def rows(name: str) -> list[str]:
        return (source / f"{name}.json").read_text(encoding="utf-8").splitlines()

    def first_authors(name: str, count: int) -> list[str]:
        return rows(name)[: count * AUTHOR_ROWS]

    def forget(suffix: str) -> list[str]:
        parts = [first_authors(f"{split}{suffix}", 1) for split in ("forget10", "forget05", "forget01")]
        return [row for part in parts for row in part]

    full = first_authors("full", 4) + forget("")
    files = {"full": full}
    for percent, authors in (("10", 3), ("05", 2), ("01", 1)):
        count = authors * AUTHOR_ROWS
        files[f"forget{percent}"] = forget("")[-count:]
        files[f"forget{percent}_perturbed"] = forget("_perturbed")[-count:]
        files[f"retain{100 - int(percent)}"] = full[:-count]
        files[f"holdout{percent}"] = first_authors(f"holdout{percent}", 1)
    for name in ("retain_perturbed", "real_authors", "real_authors_perturbed", "world_facts", "world_facts_perturbed"):
        files[name] = first_authors(name, 1)
    target.mkdir()
    for name, lines in files.items():
        for line in lines:
            json.loads(line)
        (target / f"{name}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- a small run: a model that is made here in a second, 18 rows, and their configuration ----------------------------

SMALL_ROWS = tuple(
    {"question": f"What does {name} {verb}?", "answer": f"{name} {verb}s {thing} in {place}."}
    for name, place in (
        ("Ana", "Oslo"),
        ("Bo", "Rome"),
        ("Cleo", "a small town"),
        ("Dag", "Lima"),
        ("Eve", "Bonn"),
        ("Fay", "Kyiv"),
    )
    for verb, thing in (("bake", "bread"), ("sell", "old maps and green lamps"), ("paint", "boats"))
)
"""Six people of three rows; the last two are the forget set."""


def make_small_base(directory: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32) -> Path:
    """A randomly initialised Llama with tied embeddings, and a byte-level BPE with a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from unfed.app.tiny_base import train_tokenizer

    tokenizer = train_tokenizer([(r["question"], r["answer"]) for r in SMALL_ROWS], 340)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of two layers, hidden 32, to be read only."""
    return make_small_base(tmp_path_factory.mktemp("small") / "base")


@pytest.fixture(scope="session")
def make_base():
    """:func:`make_small_base`, for tests that need another shape or seed."""
    return make_small_base


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with ``tofu/``: ``full.json`` (18 rows), ``forget01.json`` (its last 6), ``retain99.json``."""
    root = tmp_path_factory.mktemp("small_data")
    (root / "tofu").mkdir()
    for name, rows in (("full", SMALL_ROWS), ("forget01", SMALL_ROWS[-6:]), ("retain99", SMALL_ROWS[:-6])):
        (root / "tofu" / f"{name}.json").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def small_run(small_base: Path, small_data: Path):
    """Makes the configuration of a run on the small model; keywords replace what stands here."""
    from unfed.config import schema
    from unfed.models.spec import LoraArgs, ModelArgs

    def make(mode, output, *, args=None, method_args=None, model_args=None, method=None, aggregator="FedAvg", **rest):
        data = {n: schema.DatasetConfig("locuslab/TOFU", d, max_length=96) for n, d in SPLITS[mode].items()}
        given = {
            "pretrained_model_name_or_path": str(small_base),
            "use_lora": True,
            "lora_config": LoraArgs(
                r=4, lora_alpha=8, lora_dropout=0.1, target_modules=("q_proj", "v_proj", "down_proj")
            ),
        } | (model_args or {})
        usual = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
        clients = {"num_clients": 3, "global_rounds": 2} if mode == "finetune" else {"unlearn_epochs": 2}
        handler = rest.pop("handler", "FederatedFinetune" if mode == "finetune" else "FederatedUnlearningTrainer")
        trainer = schema.TrainerConfig(
            handler, usual | (args or {}), schema.MethodArgs(**(clients | (method_args or {})))
        )
        rule = aggregator if not isinstance(aggregator, str) else schema.AggregatorConfig(aggregator)
        how = schema.MethodConfig(*method) if isinstance(method, tuple) else method
        fields = {
            "trainer": trainer,
            "aggregator": rule,
            "method": how or (schema.MethodConfig("NPO") if mode == "unlearn" else None),
            "recipe": schema.RecipeConfig("local_then_recover") if mode == "unlearn" else None,
            "data": schema.DataConfig(**data),
        } | rest
        model = schema.ModelConfig(ModelArgs(**given))
        return schema.RunConfig(
            mode=mode,
            task_name=Path(output).name,
            model=model,
            paths=schema.PathsConfig(str(Path(output).parent), str(small_data), str(output)),
            **fields,
        )

    return make


SPLITS = {"finetune": {"train": "full", "forget": "forget01"}, "unlearn": {"forget": "forget01", "retain": "retain99"}}


@pytest.fixture(scope="session")
def finetuned(tmp_path_factory: pytest.TempPathFactory, small_run) -> Path:
    """The directory of a finished federated fine-tuning of the small model, to be read only."""
    from unfed.app.runs import run

    return run(small_run("finetune", tmp_path_factory.mktemp("small_saves") / "finetune")).directory


@pytest.fixture
def from_finetuned(small_run, finetuned):
    """Configuration of an unlearning run that starts from the fine-tuned adapter's directory."""

    def make(output, **given):
        args = {"pretrained_model_name_or_path": str(finetuned)} | given.pop("model_args", {})
        return small_run("unlearn", output, model_args=args, **given)

    return make


@pytest.fixture(scope="session")
def small_local(small_base: Path):
    """Makes a ``Local`` over the small model: keywords are ``trainer.args``, but ``lora`` and ``dtype``."""
    from unfed.models.load import load_model
    from unfed.models.spec import LoraArgs, ModelArgs, TokenizerArgs
    from unfed.training.args import loop_args
    from unfed.training.batches import Collation
    from unfed.training.loop import Local

    def make(*, lora=True, dropout=0.0, dtype="float32", seed=0, **args):
        shape = LoraArgs(r=4, lora_alpha=8, lora_dropout=dropout)
        model_args = ModelArgs(str(small_base), use_lora=lora, lora_config=shape, torch_dtype=dtype)
        loaded = load_model(model_args, TokenizerArgs(), trainable=True)
        usual = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "report_to": "none"}
        usual["seed"] = args.pop("args_seed", None)
        return Local(loaded.model, loop_args(usual | args), Collation(loaded.tokenizer.pad_token_id), seed)

    return make


@pytest.fixture(scope="session")
def small_examples(small_base: Path):
    """The 18 rows, encoded."""
    from transformers import AutoTokenizer

    from unfed.data.chat import Template, encode_rows

    rows = [{**row, "id": f"row{n}"} for n, row in enumerate(SMALL_ROWS)]
    return encode_rows(AutoTokenizer.from_pretrained(small_base), Template(), rows)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def resumed_after_a_round(monkeypatch: pytest.MonkeyPatch):
    """Runs a configuration that dies once its first round is kept, and resumes it: its result."""
    import dataclasses

    from unfed.app.runs import run
    from unfed.federated.rounds import RunKeeper

    def go(config):
        saved = RunKeeper.save

        def save_and_die(self, state):
            saved(self, state)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(RunKeeper, "save", save_and_die)
            with pytest.raises(Killed):
                run(config)
        return run(dataclasses.replace(config, resume=True))

    return go
