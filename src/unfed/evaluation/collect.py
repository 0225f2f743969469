"""The one pass over the model: every answer of every split scored once, every question answered once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from unfed.base.errors import DataError
from unfed.base.types import IGNORE_INDEX, Example
from unfed.data.chat import EncodedExample, encode_pairs, encode_prompts
from unfed.data.texts import encode_beginnings, encode_completions
from unfed.evaluation.cache import Entry
from unfed.evaluation.evidence import Answers, Evidence, Generations, column_problem
from unfed.evaluation.gradients import gradient_norms
from unfed.evaluation.scoring import Column, Pass, score
from unfed.metrics.stats import Array, TokenStats
from unfed.models.generate import Decoding, generate, inference, pad_id


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
    encoded = {c: encode_column(given, rows_by_split[c[0]], *c) for c in columns}
    stats = _stats(given, encoded, {c: given.wants("details", c) for c in columns})
    out = {}
    for (split, column), own in encoded.items():
        values = [row[column] for row in rows_by_split[split]]
        listed = isinstance(values[0], list)
        out[split, column] = Answers(
            stats=stats[split, column],
            texts=tuple(
                _scored_text(given.tokenizer, e) if e.truncated else t
                for t, e in zip((t for v in values for t in (v if listed else [v])), own, strict=True)
            ),
            counts=np.array([len(v) if listed else 1 for v in values]),
            listed=listed,
            cut=sum(e.truncated for e in own),
        )
    return _with_extras(given, encoded, out)


def _scored_text(tokenizer: PreTrainedTokenizerBase, answer: EncodedExample) -> str:
    """What ``max_length`` left of an answer."""
    return str(tokenizer.decode([t for t in answer.labels if t != IGNORE_INDEX], skip_special_tokens=True))


def _stats(
    given: Pass, encoded: Mapping[Column, Sequence[EncodedExample]], details: Mapping[Column, bool]
) -> dict[Column, TokenStats]:
    """Token statistics of every column: those that are kept from before, and the rest in one pass."""
    found: dict[Column, TokenStats] = {}
    entries = {c: _entry(given, own, details[c]) for c, own in encoded.items()}
    for c, own in encoded.items():
        stored = entries[c].stats(own)
        if stored is None and not details[c]:
            # What was kept with the moments serves where they are not asked for, too.
            stored = _entry(given, own, True).stats(own)
        if stored is not None:
            found[c] = stored
    todo = {c: own for c, own in encoded.items() if c not in found}
    return found | _scored_and_kept(given, todo, details, entries)


def _scored_and_kept(
    given: Pass,
    todo: Mapping[Column, Sequence[EncodedExample]],
    details: Mapping[Column, bool],
    entries: Mapping[Column, Entry],
) -> dict[Column, TokenStats]:
    if not todo:
        return {}
    flat = [e for own in todo.values() for e in own]
    fresh = _by_column(score(given, flat, [details[c] for c, own in todo.items() for _ in own]), todo)
    for c, stats in fresh.items():
        entries[c].keep_stats(stats, details=details[c])
    return fresh


def _entry(given: Pass, own: Sequence[EncodedExample], details: bool, base: bool = False) -> Entry:
    if given.cache is None:
        return Entry(None)
    return given.cache.stats(own, f"mask_pad_ids={given.mask_pad_ids}", details=details, base=base)


def _by_column(stats: TokenStats, encoded: Mapping[Column, Sequence[EncodedExample]]) -> dict[Column, TokenStats]:
    ends = np.cumsum([len(own) for own in encoded.values()])
    return {c: stats.slice(int(end) - len(own), int(end)) for (c, own), end in zip(encoded.items(), ends, strict=True)}


def _under_reference(given: Pass, encoded: Mapping[Column, Sequence[EncodedExample]]) -> dict[Column, TokenStats]:
    """Token statistics under the reference model; nothing where there is none."""
    if given.reference is None or not encoded:
        return {}
    entries = {c: _entry(given, own, False, base=True) for c, own in encoded.items()}
    stored = {c: entries[c].stats(own) for c, own in encoded.items()}
    found = {c: s for c, s in stored.items() if s is not None}
    todo = {c: own for c, own in encoded.items() if c not in found}
    if not todo:
        return found
    with given.reference() as model, inference(model):
        return found | _scored_and_kept(replace(given, model=model), todo, dict.fromkeys(todo, False), entries)


def _with_extras(
    given: Pass, encoded: Mapping[Column, Sequence[EncodedExample]], answers: dict[Column, Answers]
) -> dict[Column, Answers]:
    """Add what only some metrics ask for: the reference model's statistics, gradient norms."""
    referred = {c: own for c, own in encoded.items() if given.wants("reference", c)}
    for c, found in _under_reference(given, referred).items():
        answers[c] = replace(answers[c], reference=found)
    for c, own in encoded.items():
        if given.wants("gradients", c):
            answers[c] = replace(answers[c], gradient_norms=_norms(given, own))
    return answers


def _norms(given: Pass, own: Sequence[EncodedExample]) -> Array:
    entry = Entry(None) if given.cache is None else given.cache.norms(own)
    stored = entry.norms(len(own))
    if stored is not None:
        return stored

    def told(done: int) -> None:
        given.tell("taking gradients", done, len(own))

    found = gradient_norms(given.model, own, pad_id(given.tokenizer), told)
    entry.keep_norms(found)
    return found


def encode_column(given: Pass, rows: Sequence[Example], split: str, column: str) -> list[EncodedExample]:
    """The answers of one column with their prompts, in the layout of the split; several where a row has a list."""
    pairs: list[tuple[str, str]] = []
    ids: list[str] = []
    for n, row in enumerate(rows):
        texts = row[column] if isinstance(row[column], list) else [row[column]]
        pairs += [(row["question"], text) for text in texts]
        ids += [str(row.get("id", n))] * len(texts)
    layout = given.layout(split)
    length = layout.max_length or given.max_length
    found: Sequence[EncodedExample]
    if layout.completion:
        found = encode_completions(given.tokenizer, pairs, length, insert_space=layout.insert_space)
    else:
        found = encode_pairs(given.tokenizer, given.template, pairs, length, layout.shots)
    return [replace(e, example_id=i) for e, i in zip(found, ids, strict=True)]


def encode_questions(given: Pass, questions: Sequence[str], split: str) -> list[tuple[int, ...]]:
    """Where the answers to the questions of a split begin, as token ids."""
    layout = given.layout(split)
    if layout.completion:
        found = encode_beginnings(given.tokenizer, questions)
    else:
        found = encode_prompts(given.tokenizer, given.template, questions, layout.shots)
    if (empty := next((n for n, ids in enumerate(found, 1) if not ids), None)) is not None:
        raise DataError(f"{split}: row {empty} begins with no text, so there is nothing that a model could go on from")
    return found


def _generate_splits(
    given: Pass, rows_by_split: Mapping[str, Sequence[Example]], compared: Sequence[Column]
) -> dict[str, Generations]:
    """Answers to the questions of every split; splits that are decoded alike share their batches."""
    splits = list(dict.fromkeys(s for s, _ in compared))
    prompts = {s: encode_questions(given, [r["question"] for r in rows_by_split[s]], s) for s in splits}
    alike: dict[Decoding, list[str]] = {}
    for split in splits:
        length = given.layout(split).max_new_tokens or given.decoding.max_new_tokens
        alike.setdefault(replace(given.decoding, max_new_tokens=length), []).append(split)
    texts: dict[str, list[str]] = {}
    for decoding, group in alike.items():
        texts |= _texts(given, decoding, {s: prompts[s] for s in group})
    judged = [s for s in splits if any(given.wants("fluency", c) for c in compared if c[0] == s)]
    judgement = _judged(given, {s: (prompts[s], texts[s]) for s in judged})
    out: dict[str, Generations] = {}
    for split in splits:
        shown = given.tokenizer.batch_decode([list(p) for p in prompts[split]], skip_special_tokens=True)
        answers = {c: tuple(r[c] for r in rows_by_split[split]) for s, c in compared if s == split}
        out[split] = Generations(tuple(shown), answers, tuple(texts[split]), judgement.get(split))
    return out


def _texts(given: Pass, decoding: Decoding, prompts: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, list[str]]:
    """Generated answers by split, cut at the split's stop words."""
    # Sampled text depends on more than the prompts, so it is made anew.
    cache = None if decoding.do_sample else given.cache
    how = f"mask_pad_ids={given.mask_pad_ids}, max_new_tokens={decoding.max_new_tokens}"
    entries = {s: Entry(None) if cache is None else cache.texts(own, how) for s, own in prompts.items()}
    stored = {s: entries[s].texts(len(own)) for s, own in prompts.items()}
    found = {s: texts for s, texts in stored.items() if texts is not None}
    places = [(s, i) for s, own in prompts.items() if s not in found for i in range(len(own))]
    fresh = {s: [""] * len(own) for s, own in prompts.items() if s not in found}
    flat = [prompts[s][i] for s, i in places]
    stream = generate(given.model, given.tokenizer, flat, decoding, given.budget, mask_pad_ids=given.mask_pad_ids)
    for done, (n, text) in enumerate(stream, 1):
        split, i = places[n]
        fresh[split][i] = text
        given.tell("generating answers", done, len(flat))
    for split, texts in fresh.items():
        entries[split].keep_texts(texts)
    return {s: [_stopped(t, given.layout(s).stop) for t in texts] for s, texts in (found | fresh).items()}


def _stopped(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text.strip()


def _judged(given: Pass, said: Mapping[str, tuple[Sequence[tuple[int, ...]], Sequence[str]]]) -> dict[str, TokenStats]:
    """Statistics of generated text, after its prompt, under the base model."""
    encoded: dict[Column, list[EncodedExample]] = {}
    for split, (prompts, texts) in said.items():
        ids = given.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        encoded[split, "generation"] = [
            EncodedExample((*p, *t), (*([IGNORE_INDEX] * len(p)), *t), len(p))
            for p, t in zip(prompts, ids, strict=True)
        ]
    return {split: stats for (split, _), stats in _under_reference(given, encoded).items()}
