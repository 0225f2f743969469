"""The rows of a run as token ids, each client's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from unfed.app.build import Rows
from unfed.base.types import Example, Split
from unfed.config.schema import DatasetConfig, RunConfig
from unfed.data.alternates import read_alternates
from unfed.data.chat import EncodedExample, encode_rows
from unfed.data.partition import Partition
from unfed.data.refusals import alternate_answers, load_refusals
from unfed.data.texts import encode_texts
from unfed.federated.client import ClientData
from unfed.models.load import LoadedModel

Encoded = dict[str, list[EncodedExample]]
"""Encoded rows by the id of their data row: a long plain text becomes several."""


def alternates_of(config: RunConfig, rows: Rows) -> list[list[Example]]:
    """The forget rows with other answers: those of ``data.alternate``, one list for each alternate of a question, else
    a refusal each. Rows of plain text have none. Raises ``DataError`` for a file that does not serve."""
    if config.mode != "unlearn" or config.data.forget is None or config.data.forget.question_key is None:
        return []
    if config.data.alternate is not None:
        return read_alternates(config.data.alternate, rows.forget)
    return [alternate_answers(rows.forget, config.seed, load_refusals(config.data.idk))]


def encoded(config: RunConfig, loaded: LoadedModel, split: str, examples: Sequence[Example]) -> Encoded:
    """Rows as ``data.<split>`` has them encoded."""
    spec: DatasetConfig | None = getattr(config.data, split)
    found: Encoded = {}
    if examples and spec is not None and spec.question_key is None:
        made = encode_texts(loaded.tokenizer, examples, spec.max_length)
    else:
        made = encode_rows(loaded.tokenizer, config.model.template_args, examples, spec.max_length if spec else None)
    for e in made:
        found.setdefault(e.example_id, []).append(e)
    return found


def encode_clients(config: RunConfig, loaded: LoadedModel, rows: Rows, partition: Partition) -> dict[str, ClientData]:
    """Tokenise every row once and hand each client its own."""
    encode = partial(encoded, config, loaded)
    train = encode("train", rows.train)
    # Fine-tuning trains on ``train`` alone; ``forget`` marks the rows whose loss is recorded for unlearning.
    marked = {e["id"]: train[e["id"]] for e in rows.forget if e["id"] in train}
    by_split: dict[Split, list[Encoded]] = {"train": [train], "forget": [marked]}
    if config.mode == "unlearn":
        retain = encode("retain", rows.retain)
        alternates = [encode("forget", block) for block in alternates_of(config, rows)]
        # Recovery is plain training on the retain rows, so the retain rows are its ``train`` split.
        by_split = {
            "train": [retain],
            "retain": [retain],
            "forget": [encode("forget", rows.forget)],
            "alternate": [_named(block, k) for k, block in enumerate(alternates)],
        }
    return {
        client: ClientData(
            client,
            {s: [e for found in blocks for i in ids for e in found.get(i, ())] for s, blocks in by_split.items()},
        )
        for client, ids in partition.clients.items()
    }


def _named(block: Encoded, number: int) -> Encoded:
    """The rows of a further block under ids of their own: the reference policy's values are kept by id."""
    if number == 0:
        return block
    return {i: [replace(e, example_id=f"{e.example_id}/{number}") for e in found] for i, found in block.items()}
