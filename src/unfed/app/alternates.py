"""``unfed alternates``: the model is asked for other answers to the forget questions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unfed.app.build import forget_rows
from unfed.app.progress import say
from unfed.app.requests import settle
from unfed.app.runs import open_model
from unfed.base.artifacts import atomic_path
from unfed.base.errors import ConfigError, UnfedError
from unfed.base.seeding import derive_seed
from unfed.base.types import Example
from unfed.config.schema import RunConfig
from unfed.data.alternates import cleaned, request
from unfed.data.chat import encode_prompts
from unfed.data.spec import Template
from unfed.models.generate import Decoding, generate_all
from unfed.models.load import LoadedModel

ATTEMPTS = 3
"""How often a question is asked again for answers that were empty, its own, or there already."""


@dataclass(frozen=True)
class Wanted:
    """Five answers of at most 200 tokens, sampled at temperature 1, as in Mekala et al. 2025."""

    count: int = 5
    temperature: float = 1.0
    max_new_tokens: int = 200

    def __post_init__(self) -> None:
        found = [
            f"--{name.replace('_', '-')}={getattr(self, name)}: must be at least 1"
            for name in ("count", "max_new_tokens")
            if getattr(self, name) < 1
        ]
        if not 0 < self.temperature < math.inf:
            found.append(f"--temperature={self.temperature:g}: must be above 0, and finite")
        if found:
            raise ConfigError(found)


def write_alternates(config: RunConfig, output: Path, wanted: Wanted = Wanted()) -> int:
    """Ask the configuration's model for other answers to every forget question; how many lines were written.

    ``output`` gets JSON lines with ``id``, ``question``, ``answer`` and ``alternate``, a line for each alternate, in
    the order of the rows. A seed gives the same file. Raises ``UnfedError`` when a question was left without any.
    """
    config, _ = settle(config)
    spec = config.data.forget
    if spec is None or spec.question_key is None:
        raise ConfigError(["data.forget: alternates are answers to its questions, and it has none"])
    rows = forget_rows(config)
    loaded = open_model(config, trainable=False)
    found = _ask(loaded, config.model.template_args, rows, wanted, config.seed)
    without = [e["question"] for e in rows if not found[e["id"]]]
    if without:
        raise UnfedError(
            f"the model gave no usable other answer to {len(without)} of {len(rows)} questions (the first: "
            f"{without[0]!r}): try --temperature 1.5, a larger model, or write them yourself"
        )
    lines = [
        {"id": e["id"], "question": e["question"], "answer": e["answer"], "alternate": text}
        for e in rows
        for text in found[e["id"]]
    ]
    with atomic_path(output) as part:
        part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    fewer = sum(len(texts) < wanted.count for texts in found.values())
    if fewer:
        say(f"{fewer} of {len(rows)} questions have fewer than {wanted.count} alternates")
    return len(lines)


def _ask(
    loaded: LoadedModel, template: Template, rows: Sequence[Example], wanted: Wanted, seed: int
) -> Mapping[str, list[str]]:
    """Different alternates of each row, at most ``wanted.count``, by the row's id."""
    prompts = encode_prompts(loaded.tokenizer, template, [request(e["question"], e["answer"]) for e in rows])
    found: dict[str, list[str]] = {e["id"]: [] for e in rows}
    for attempt in range(ATTEMPTS):
        asked = [k for k, e in enumerate(rows) for _ in range(wanted.count - len(found[e["id"]]))]
        if not asked:
            break
        say(f"asking for {len(asked)} alternates to {len(set(asked))} questions")
        decoding = Decoding(
            wanted.max_new_tokens, True, wanted.temperature, seed=derive_seed(seed, "alternates", attempt)
        )
        texts = generate_all(loaded.model, loaded.tokenizer, [prompts[k] for k in asked], decoding)
        for k, text in zip(asked, texts, strict=True):
            other, known = cleaned(text, rows[k]["answer"]), found[rows[k]["id"]]
            if other is not None and other not in known:
                known.append(other)
    return found
