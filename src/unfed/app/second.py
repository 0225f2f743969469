"""A run whose recipe trains a second adapter on the learned one: how it is opened, what it leaves, and the way back."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from unfed.app.probe import ORIGIN_FILE
from unfed.app.progress import say
from unfed.app.rundir import PARTITION_FILE, RUN_FILE, TRAIN_ROWS_FILE, RunDir
from unfed.base.artifacts import atomic_dir, read_json, read_tensors, remove_leftovers, write_json, write_tensors
from unfed.base.errors import ArtifactError, UnfedError
from unfed.base.types import AdapterState
from unfed.config.schema import RunConfig
from unfed.models.adapter import lora_scaling, save_adapter, snapshot
from unfed.models.load import LoadedModel
from unfed.models.second import LEARNED, add_second, as_one, not_plain_lora, ranks_of, unstack
from unfed.models.source import resolve_source
from unfed.models.spec import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from unfed.training.loop import Local
from unfed.unlearning.base import Recipe

SECOND_DIR = "unlearning_adapter"
"""The second adapter alone, below the run's directory."""
NOTE_FILE = "beneath.json"
"""Beside it: what it goes on top of, and how the learned adapter is cut out of the stack."""
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges")


def without_lora(config: RunConfig) -> str | None:
    """Why the run does not start from a learned, plain LoRA adapter, with the way out; ``None`` when it does."""
    args = config.model.model_args
    other = "use recipe=local_then_recover or recipe=retrain"
    if not args.use_lora:
        return (
            "works on a learned LoRA adapter, and model.model_args.use_lora=false trains all parameters: fine-tune "
            f"with LoRA (a -lora model file), or {other}"
        )
    found = resolve_source(args, config.model.tokenizer_args).adapter
    if found is None:
        return (
            f"works on a learned LoRA adapter, and {args.pretrained_model_name_or_path} is a model without one: name "
            f"the directory of a fine-tuned adapter, or {other}"
        )
    reason = not_plain_lora(found)
    return reason and f"works on plain LoRA, and of the adapter {found} one cannot say that: {reason}; {other}"


def put_on(loaded: LoadedModel, recipe: Recipe, seed: int) -> None:
    """Put the recipe's second adapter on the learned one of ``loaded``, which was opened as ``LEARNED``."""
    model = loaded.model
    assert isinstance(model, PeftModel)
    learned, scaling = snapshot(model, LEARNED), lora_scaling(model, LEARNED)
    shape = recipe.second_adapter(learned, scaling)
    add_second(model, shape, seed)
    say(
        f"the learned adapter {loaded.adapter_path} stays frozen; a second one (r={shape.r}, {len(shape.modules)} of "
        f"{len(scaling)} modules) trains on top of it"
    )


def inputs(loaded: LoadedModel) -> dict[str, str]:
    """The digest of the learned adapter beneath, for what a resumed run must share."""
    return {"learned": snapshot(loaded.model, LEARNED).digest()} if _lies_on_another(loaded) else {}


def _lies_on_another(loaded: LoadedModel) -> bool:
    return isinstance(loaded.model, PeftModel) and LEARNED in loaded.model.peft_config


def finish(
    directory: RunDir, loaded: LoadedModel, local: Local, adapter: AdapterState
) -> tuple[LoadedModel, Local, AdapterState]:
    """What is saved and evaluated: model, loop and adapter as they are, or, where the adapter lies on another, those of
    their stack; then the second adapter is written on its own first."""
    model = loaded.model
    if not _lies_on_another(loaded) or not isinstance(model, PeftModel):
        return loaded, local, adapter
    assert loaded.adapter_path is not None
    place, learned = directory.path / SECOND_DIR, snapshot(model, LEARNED)
    remove_leftovers(place)
    save_adapter(model, adapter, place)
    one, stacked = as_one(model, adapter)
    path = str(Path(loaded.adapter_path).resolve())
    beneath = {"path": path, "digest": learned.digest()}
    digests = {"second": adapter.digest(), "stack": stacked.digest()}
    how = {"config": read_json(Path(path) / ADAPTER_CONFIG), "ranks": ranks_of(learned)}
    base = {"base": loaded.base, "base_fingerprint": loaded.fingerprint}
    write_json(place / NOTE_FILE, {"learned": {**beneath, **how}, **digests, **base})
    directory.note(second_adapter={"directory": SECOND_DIR, "learned": beneath, **digests})
    say(f"reversible: the adapter beneath is unchanged in {path}; unfed revert {directory.path} writes it again")
    return replace(loaded, model=one), Local(one, local.args, local.collation, local.seed), stacked


def revert(run: Path, output: Path) -> AdapterState:
    """Write the learned adapter that lies in the stack of ``run`` to ``output``, bit for bit, with tokenizer and
    partition. ``UnfedError`` for a run without a second adapter, one that was altered, or an ``output`` that exists."""
    note_file = run / SECOND_DIR / NOTE_FILE
    if not run.is_dir():
        raise UnfedError(f"{run}: there is no such directory; name the run whose second adapter is to be taken off")
    if not note_file.is_file():
        raise UnfedError(
            f"{run}: no run of recipe=unlearning_adapter or recipe=task_arithmetic (there is no {note_file}): nothing "
            "was put on top of its adapter"
        )
    if output.exists():
        raise UnfedError(f"{output} exists already: name another directory (--output)")
    note: Any = read_json(note_file)
    stacked = read_tensors(run / ADAPTER_WEIGHTS)
    if stacked.digest() != note["stack"]:
        raise ArtifactError(f"{run / ADAPTER_WEIGHTS} is not the stack that {note_file} belongs to")
    learned = unstack(stacked, note["learned"]["ranks"])
    if learned.digest() != note["learned"]["digest"]:
        raise ArtifactError(f"{note_file} was altered: what it cuts out is not the adapter that it names")
    with atomic_dir(output) as part:
        write_tensors(part / ADAPTER_WEIGHTS, learned)
        write_json(part / ADAPTER_CONFIG, note["learned"]["config"])
        write_json(
            part / ORIGIN_FILE, {k: note[k] for k in ("base", "base_fingerprint")} | {"adapter": learned.digest()}
        )
        write_json(part / RUN_FILE, _record_of_reverted(run, learned, output.name))
        for file in run.iterdir():
            if file.is_file() and (file.name.startswith(_TOKENIZER) or file.name in {PARTITION_FILE, TRAIN_ROWS_FILE}):
                shutil.copyfile(file, part / file.name)
    return learned


def _record_of_reverted(run: Path, learned: AdapterState, name: str) -> dict[str, Any]:
    """What ``run.json`` says of a reverted adapter: where it comes from, and what was forgotten before ``run`` alone.
    Without it a later request would take what earlier ones had forgotten for rows to be retained."""
    made: Any = read_json(run / RUN_FILE)
    known = {k: made[k] for k in ("source", "source_adapter") if k in made}
    before = list(made.get("forgotten", ()))[:-1]
    own = {"task_name": name, "mode": "unlearn", "status": "finished", "reverted": str(run.absolute())}
    return {**own, **known, "forgotten": before, "adapter": learned.digest()}
