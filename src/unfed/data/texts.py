"""Plain text as token ids and labels: continuations of a beginning, and whole texts cut into pieces."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from unfed.base.errors import DataError
from unfed.base.types import IGNORE_INDEX, Example
from unfed.data.chat import EncodedExample
from unfed.data.spec import Pair

log = logging.getLogger(__name__)


def encode_completions(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    max_length: int | None = None,
    *,
    insert_space: bool = False,
) -> list[EncodedExample]:
    """(beginning, continuation) pairs; the labels are the continuation's tokens, at most ``max_length`` of them.

    OpenUnlearning's layout (commit d3d7cf9): both are tokenised as one text, no end-of-sequence token is added, and
    the first token of a text without a beginning has no label. Raises ``DataError`` when no pair has a label.
    """
    if not pairs:
        return []
    joint = " " if insert_space else ""
    wholes = tokenizer([p + joint + t for p, t in pairs], add_special_tokens=True)["input_ids"]
    found = []
    for prompt, ids in zip(encode_beginnings(tokenizer, [p for p, _ in pairs]), wholes, strict=True):
        end = len(ids) if max_length is None else min(len(ids), len(prompt) + max_length)
        found.append(_piece(ids[:end], len(prompt), truncated=end < len(ids)))
    if not any(e.num_label_tokens for e in found):
        raise DataError(f"max_length={max_length} leaves no token to score in any of {len(pairs)} texts")
    if cut := sum(e.truncated for e in found):
        log.warning("max_length=%s cut %d of %d texts", max_length, cut, len(found))
    return found


def encode_beginnings(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of each text with the tokenizer's special tokens, where a continuation is generated."""
    return [tuple(ids) for ids in tokenizer(list(texts), add_special_tokens=True)["input_ids"]] if texts else []


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], max_length: int | None = None, key: str = "answer"
) -> list[EncodedExample]:
    """Whole texts for training: every token but the first is a label. A text longer than ``max_length`` becomes several
    examples, which share the row's ``id``.

    OpenUnlearning cuts the concatenation of all texts; here a piece never spans two rows, which may have two owners.
    """
    if max_length is not None and max_length < 3:
        raise DataError(f"max_length={max_length} is too short for pieces of plain text")
    head = tuple(tokenizer("", add_special_tokens=True)["input_ids"])
    if head and head[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        head = head[:-1]
    texts = tokenizer([row[key] for row in rows], add_special_tokens=False)["input_ids"] if rows else []
    found = []
    for row, ids in zip(rows, texts, strict=True):
        size = max(1, len(ids)) if max_length is None else max_length - len(head)
        for start in range(0, len(ids), size):
            piece = (*head, *ids[start : start + size])
            if len(piece) > 1:
                found.append(_piece(piece, len(head), example_id=row["id"]))
    return found


def _piece(ids: Sequence[int], prompt: int, *, truncated: bool = False, example_id: str = "") -> EncodedExample:
    start = min(len(ids), max(1, prompt))
    labels = (*([IGNORE_INDEX] * start), *ids[start:])
    return EncodedExample(tuple(ids), labels, start, truncated, example_id)
