"""Example answers: what the models say to the same questions, out of their evaluation files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from unfed.report.contents import Answer, Model
from unfed.report.read import mapping

SHOWN: Mapping[str, int] = {"forget": 2, "retain": 1}
"""How many questions of each split."""


def choose(models: Sequence[Model]) -> list[Answer]:
    """The rows on which fine-tuning raised the probability of the right answer most.

    Without a base and a fine-tuned model: the rows on which the probabilities of the models lie farthest apart.
    Models whose evaluation kept no answers are left out.
    """
    found: list[Answer] = []
    for split, count in SHOWN.items():
        texts = {m.name: rows for m in models if (rows := _rows(m, f"{split}_Q_A_ROUGE"))}
        if not texts:
            continue
        speaking = [m for m in models if m.name in texts]
        shared = [i for i in texts[speaking[0].name] if all(i in t for t in texts.values())]
        gain = {i: _difference(speaking, split, i) for i in shared}
        questions = _questions({i: str(mapping(texts[speaking[0].name][i]).get("input", "")) for i in shared})
        for i in sorted(shared, key=lambda i: (-gain[i], int(i) if i.isdigit() else 0))[:count]:
            truth = mapping(texts[speaking[0].name][i]).get("ground_truth", "")
            said = {name: str(mapping(rows[i]).get("generation", "")).strip() for name, rows in texts.items()}
            found.append(Answer(split, questions[i], str(truth), said))
    return found


def _rows(model: Model, metric: str) -> Mapping[str, Any]:
    return mapping(mapping(model.entries.get(metric)).get("value_by_index"))


def _difference(models: Sequence[Model], split: str, row: str) -> float:
    """How much the models differ on a row; 0 where nothing was measured."""
    values: dict[str, float] = {}
    for model in models:
        for metric, key in ((f"{split}_Q_A_Prob", "prob"), (f"{split}_Q_A_ROUGE", "rougeL_recall")):
            value = mapping(_rows(model, metric).get(row)).get(key)
            if isinstance(value, int | float):
                values[model.role if model.role in {"base", "finetuned"} else model.name] = float(value)
                break
    if "base" in values and "finetuned" in values:
        return values["finetuned"] - values["base"]
    return max(values.values()) - min(values.values()) if values else 0.0


def _questions(prompts: Mapping[str, str]) -> dict[str, str]:
    """The questions within the prompts: without the system text and the markers that all prompts share."""
    texts = [t.rstrip() for t in prompts.values()]
    if len(set(texts)) < 2:
        return {i: t.strip() for i, t in prompts.items()}
    before = _beginning(texts)
    start = max([before.rfind("\n"), *(m.end() - 1 for m in re.finditer(r"[.:>]\s", before))]) + 1
    shared = _beginning([t[start:][::-1] for t in texts])[::-1]
    ends = [m.end() for m in re.finditer(r"[?!.](?=\W|\w)", shared)]
    end = len(shared) - (ends[-1] if ends else shared.find("\n")) if ends or "\n" in shared else 0
    return {i: t.rstrip()[start : len(t.rstrip()) - end].strip() for i, t in prompts.items()}


def _beginning(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    for k, letters in enumerate(zip(*texts, strict=False)):
        if len(set(letters)) > 1:
            return texts[0][:k]
    return min(texts, key=len)
