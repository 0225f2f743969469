"""The one pass over the model: every answer of every split scored once, every question answered once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from unfed.base.errors import DataError
from unfed.base.types import Example
from unfed.data.chat import EncodedExample, encode_pairs, encode_prompts
from unfed.evaluation.gradients import gradient_norms
from unfed.evaluation.scoring import Column, Pass, score
from unfed.metrics.probability import avg_loss
from unfed.metrics.stats import Array, TokenStats
from unfed.models.generate import generate, inference, pad_id


@dataclass(frozen=True)
class Answers:
    """The scored answers of one column.

    ``counts`` ``(rows,)`` says how many answers belong to each row; ``listed`` that the data holds a list
    there. ``cut`` counts the answers that ``max_length`` shortened. ``reference`` and ``gradient_norms`` are there
    where they were asked for (and a reference model exists).
    """

    stats: TokenStats
    texts: tuple[str, ...]
    counts: Array
    listed: bool
    cut: int
    reference: TokenStats | None = None
    gradient_norms: Array | None = None

    @property
    def losses(self) -> Array:
        """``avg_loss`` of each answer, in the order of rows."""
        return avg_loss(self.stats)

    @property
    def losses_by_row(self) -> list[Array]:
        """``avg_loss`` of each row's answers."""
        return np.split(self.losses, np.cumsum(self.counts)[:-1])


@dataclass(frozen=True)
class Generations:
    """Prompts (as text) and generated answers of one split, in the order of rows.

    ``answers``: by column, what the generations are compared with; a text for each row, or a list of texts.
    """

    prompts: tuple[str, ...]
    answers: Mapping[str, tuple[str | Sequence[str], ...]]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """All that the metrics look at. ``missing`` says why a column or a split's generations are not there."""

    answers: Mapping[Column, Answers]
    generations: Mapping[str, Generations]
    missing: Mapping[Column, str] = field(default_factory=dict)


def column_problem(rows: Sequence[Example], split: str, column: str) -> str | None:
    """Why a column cannot be scored: the split has no rows, or none of them has the column.

    Raises ``DataError`` when only some rows have it, or when one holds something else than text.
    """
    if not rows:
        return f"there are no rows for {split}"
    without = [i for i, row in enumerate(rows) if column not in row]
    if len(without) == len(rows):
        return f"the {split} rows have no column {column!r}"
    if without:
        raise DataError(f"{split}: row {without[0] + 1} has no column {column!r}, though other rows have it")
    listed = isinstance(rows[0][column], list)
    for i, row in enumerate(rows):
        value = row[column]
        texts = value if isinstance(value, list) else [value]
        if isinstance(value, list) != listed or not texts or not all(isinstance(t, str) for t in texts):
            kind = "a list of texts" if listed else "a text"
            raise DataError(f"{split}: row {i + 1} has no answer in {column!r}; it should be {kind}")
    return None


def collect(
    given: Pass,
    rows_by_split: Mapping[str, Sequence[Example]],
    columns: Sequence[Column],
    generated: Sequence[Column],
) -> Evidence:
    """Score the ``columns``, and answer the questions of the splits whose columns are in ``generated``.

    Answers are batched by length across columns and splits; every result stands in the order of the rows and
    does not depend on the batches beyond float32 rounding. The model's mode is restored, no gradient is kept.
    """
    missing: dict[Column, str] = {}
    for split, column in dict.fromkeys([*columns, *generated]):
        problem = column_problem(rows_by_split.get(split, ()), split, column)
        if problem is not None:
            missing[split, column] = problem
    wanted = [c for c in dict.fromkeys(columns) if c not in missing]
    compared = [c for c in dict.fromkeys(generated) if c not in missing]
    with inference(given.model):
        answers = _score_columns(given, rows_by_split, wanted)
        generations = _generate_splits(given, rows_by_split, compared)
    return Evidence(answers, generations, missing)


def _score_columns(
    given: Pass, rows_by_split: Mapping[str, Sequence[Example]], columns: Sequence[Column]
) -> dict[Column, Answers]:
    encoded = {c: _encode(given, rows_by_split[c[0]], c[1]) for c in columns}
    details = [given.wants("details", c) for c in columns for _ in encoded[c]]
    stats = _by_column(score(given, [e for own in encoded.values() for e in own], details), encoded)
    out = {}
    for (split, column), own in encoded.items():
        values = [row[column] for row in rows_by_split[split]]
        listed = isinstance(values[0], list)
        out[split, column] = Answers(
            stats=stats[split, column],
            texts=tuple(t for v in values for t in (v if listed else [v])),
            counts=np.array([len(v) if listed else 1 for v in values]),
            listed=listed,
            cut=sum(e.truncated for e in own),
        )
    return _with_extras(given, encoded, out)


def _by_column(stats: TokenStats, encoded: Mapping[Column, Sequence[EncodedExample]]) -> dict[Column, TokenStats]:
    ends = np.cumsum([len(own) for own in encoded.values()])
    return {c: stats.slice(int(end) - len(own), int(end)) for (c, own), end in zip(encoded.items(), ends, strict=True)}


def _with_extras(
    given: Pass, encoded: Mapping[Column, Sequence[EncodedExample]], answers: dict[Column, Answers]
) -> dict[Column, Answers]:
    """Add what only some metrics ask for: the reference model's statistics, gradient norms."""
    referred = {c: own for c, own in encoded.items() if given.wants("reference", c)}
    if referred and given.reference is not None:
        flat = [e for own in referred.values() for e in own]
        with given.reference() as model, inference(model):
            stats = score(replace(given, model=model), flat, [False] * len(flat))
        for c, found in _by_column(stats, referred).items():
            answers[c] = replace(answers[c], reference=found)
    pad = pad_id(given.tokenizer)
    for c, own in encoded.items():
        if given.wants("gradients", c):

            def told(done: int, total: int = len(own)) -> None:
                given.tell("taking gradients", done, total)

            answers[c] = replace(answers[c], gradient_norms=gradient_norms(given.model, own, pad, told))
    return answers


def _encode(given: Pass, rows: Sequence[Example], column: str) -> list[EncodedExample]:
    pairs: list[tuple[str, str]] = []
    ids: list[str] = []
    for n, row in enumerate(rows):
        texts = row[column] if isinstance(row[column], list) else [row[column]]
        pairs += [(row["question"], text) for text in texts]
        ids += [str(row.get("id", n))] * len(texts)
    found = encode_pairs(given.tokenizer, given.template, pairs, given.max_length)
    return [replace(e, example_id=i) for e, i in zip(found, ids, strict=True)]


def _generate_splits(
    given: Pass, rows_by_split: Mapping[str, Sequence[Example]], compared: Sequence[Column]
) -> dict[str, Generations]:
    splits = list(dict.fromkeys(s for s, _ in compared))
    questions = [row["question"] for s in splits for row in rows_by_split[s]]
    prompts = encode_prompts(given.tokenizer, given.template, questions)
    texts = [""] * len(prompts)
    stream = generate(
        given.model, given.tokenizer, prompts, given.decoding, given.budget, mask_pad_ids=given.mask_pad_ids
    )
    for done, (i, text) in enumerate(stream, 1):
        texts[i] = text
        given.tell("generating answers", done, len(prompts))
    shown = given.tokenizer.batch_decode([list(p) for p in prompts], skip_special_tokens=True)
    out: dict[str, Generations] = {}
    start = 0
    for split in splits:
        rows = rows_by_split[split]
        own = slice(start, start + len(rows))
        answers = {c: tuple(r[c] for r in rows) for s, c in compared if s == split}
        out[split] = Generations(tuple(shown[own]), answers, tuple(texts[own]))
        start = own.stop
    return out
