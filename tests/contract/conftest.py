"""Small run directories, written by hand, for the tests of reports."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fault_fixtures import processes  # noqa: F401 - a fixture

from unfed.base.artifacts import write_json

ROWS = 4
SYSTEM = "system\nYou are a helpful assistant.\nuser\n"
QUESTIONS = ("What did Ada write?", "Who is Bo?", "Where does Cy live?", "When was Di born?")


def scores(forget: float, retain: float = 0.8, **more: float) -> dict[str, float]:
    """Numbers of one model."""
    return {
        "forget_Q_A_Prob": forget, "forget_Q_A_ROUGE": forget, "retain_Q_A_Prob": retain, "retain_Q_A_ROUGE": retain,
        "model_utility": 0.5, **more,
    }  # fmt: skip


def evaluation(name: str, values: dict[str, float], digests: dict[str, str], forget: str = "rows-1") -> dict[str, Any]:
    """A TOFU_EVAL.json: row n of forget has probability ``value * (n + 1) / ROWS``."""
    found: dict[str, Any] = {k: {"agg_value": v} for k, v in values.items()}
    for split in ("forget", "retain"):
        if f"{split}_Q_A_Prob" not in values:
            continue
        prob = values[f"{split}_Q_A_Prob"]
        found[f"{split}_Q_A_Prob"]["value_by_index"] = {str(n): {"prob": prob * (n + 1) / ROWS} for n in range(ROWS)}
        found[f"{split}_Q_A_ROUGE"]["value_by_index"] = {
            str(n): {
                "rougeL_recall": prob,
                "input": f"{SYSTEM}{QUESTIONS[n]}\nassistant\n",
                "ground_truth": f"{split} truth {n}",
                "generation": f"{name} says {n} <b>&amp;",
            }
            for n in range(ROWS)
        }
    splits = {"forget": {"name": "forget10", "rows": ROWS, "digest": forget, "cut": 0}}
    found["_run"] = {"agg_value": None, "splits": splits, "parity": None, "digests": digests}
    return found


def write_run(
    place: Path, mode: str, values: dict[str, float] | None = None, *, config: dict[str, Any] | None = None,
    rounds: int = 2, **record: Any,
) -> Path:  # fmt: skip
    """Write run.json (and the evaluation, if there are values). Each round: 3 s, 1 MB up, 2 MB down."""
    adapter = f"adapter-of-{place.name}"
    digests = record.pop("digests", {"base": "base-1", "adapter": adapter})
    forget = record.pop("forget", "rows-1")
    phases = ["unlearn", *["recover"] * (rounds - 1)] if mode == "unlearn" else ["finetune"] * rounds
    made = [
        {
            "round": n, "phase": phase, "clients": ["c0"], "failures": {}, "seconds": 3.0, "bytes_up": 1_000_000,
            "bytes_down": 2_000_000, "aggregation_error": 0.1 * (n + 1), "metrics": {"c0": {"loss": 2.0 - n}},
        }
        for n, phase in enumerate(phases)
    ]  # fmt: skip
    seed = record.pop("seed", 0)
    named = {"mode": mode, "seed": seed, "task_name": place.name, "paths": {"output_dir": str(place)}}
    body = {
        "task_name": place.name, "mode": mode, "status": "finished", "seed": seed,
        "config": named | (config or {}),
        "base_fingerprint": "base-1", "adapter": adapter, "rounds": [] if mode == "eval" else made,
        "versions": {"device": "CPU, 1 thread(s)"}, **record,
    }  # fmt: skip
    write_json(place / "run.json", body)
    if values is not None:
        write_json(place / "TOFU_EVAL.json", evaluation(place.name, values, digests, forget))
        write_json(place / "TOFU_SUMMARY.json", values)
    return place


def model_at(path: Path | str) -> dict[str, Any]:
    """A configuration that says where the model came from."""
    return {"model": {"model_args": {"pretrained_model_name_or_path": str(path)}}}


def study(root: Path, **unlearned: float) -> dict[str, Path]:
    """base 0.2, fine-tuned 0.9 (evaluated in a directory of its own), oracle 0.3, and an unlearned model."""
    base = root / "model"
    base.mkdir(parents=True)
    found = {"finetune": write_run(root / "finetune", "finetune", config=model_at(base))}
    log = {"eval": {"retain_logs_path": str(root / "oracle" / "TOFU_EVAL.json")}}
    values = scores(0.3, model_utility=0.6)
    found["oracle"] = write_run(root / "oracle", "finetune", values, config=model_at(base))
    found["eval_base"] = write_run(
        root / "eval_base", "eval", scores(0.2, 0.1, forget_quality=0.5, model_utility=0.2),
        config={**model_at(base), **log}, digests={"base": "base-1", "model": "base-1"},
    )  # fmt: skip
    found["eval_finetuned"] = write_run(
        root / "eval_finetuned", "eval", scores(0.9, forget_quality=1e-6),
        config={**model_at(root / "finetune"), **log},
        digests={"base": "base-1", "adapter": "adapter-of-finetune"},
    )  # fmt: skip
    for name, value in (unlearned or {"NPO": 0.32}).items():
        config = {**model_at(root / "finetune"), **log, "method": {"name": name, "params": {"beta": 0.1}}}
        found[name] = write_run(
            root / name, "unlearn", scores(value, 0.72, forget_quality=0.2, mem=0.7, priv=0.6, utility=0.9, agg=0.7),
            config=config,
        )  # fmt: skip
    return found


@pytest.fixture(scope="session")
def by_hand() -> SimpleNamespace:
    """The functions above: tests import no modules of each other."""
    return SimpleNamespace(scores=scores, evaluation=evaluation, write_run=write_run, model_at=model_at, study=study)
