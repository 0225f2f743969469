"""A question and an answer as token ids and labels, by chat template or by plain tags.

The layout follows OpenUnlearning (commit d3d7cf9), so that losses compare: labels start after the rendered
prompt, and the end-of-sequence token is appended when the last id is another one. Departure: ``max_length``
cuts the sequence (there it has no effect); a cut sequence gets no end-of-sequence token, since the answer
does not end there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from unfed.base.artifacts import digest_json
from unfed.base.errors import DataError
from unfed.base.types import IGNORE_INDEX, Example
from unfed.data.spec import Pair, Prefilled, Template

log = logging.getLogger(__name__)

CACHED_LISTS = 64
_cache: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[Any, ...], tuple[EncodedExample, ...]]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of prompt and answer; ``labels`` is ``IGNORE_INDEX`` on the first ``prompt_len`` positions.

    ``truncated`` says that ``max_length`` cut it; such an example may have no labelled token left.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    prompt_len: int
    truncated: bool = False
    example_id: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_label_tokens(self) -> int:
        """Labelled tokens (L of the metrics, the end-of-sequence token included)."""
        return max(0, len(self.input_ids) - self.prompt_len)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    question: str,
    answer: str,
    max_length: int | None = None,
    shots: Sequence[Pair] = (),
) -> EncodedExample:
    """Encode one question with its answer; ``shots`` are earlier turns (in-context examples).

    Raises ``DataError`` when the template leaves no token of the answer to be learned.
    """
    prompts = _render(tokenizer, template, [question], shots)
    chats = _render(tokenizer, template, [question], shots, [answer])
    return _finish(tokenizer, template, prompts[0], chats[0], max_length)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, template: Template, question: str, shots: Sequence[Pair] = ()
) -> tuple[int, ...]:
    """Token ids of the prompt alone, where a generation starts."""
    return tuple(_render(tokenizer, template, [question], shots)[0])


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, template: Template, questions: Sequence[str], shots: Sequence[Pair] = ()
) -> list[tuple[int, ...]]:
    """:func:`encode_prompt` for many questions."""
    return [tuple(ids) for ids in _render(tokenizer, template, questions, shots)] if questions else []


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    pairs: Sequence[Pair],
    max_length: int | None = None,
    shots: Sequence[Pair] = (),
) -> tuple[EncodedExample, ...]:
    """Encode many (question, answer) pairs at once; the result is kept for the life of the tokenizer.

    A second call with equal texts, template and ``max_length`` in this process costs one digest. Says once
    how many examples ``max_length`` cut; raises ``DataError`` when it left none of them an answer.
    """
    key = (
        digest_json([list(map(list, pairs)), list(map(list, shots))]),
        template,
        max_length,
        str(tokenizer.chat_template),
        tokenizer.eos_token_id,
    )
    known = _cache.setdefault(tokenizer, {})
    if key not in known:
        if len(known) >= CACHED_LISTS:
            known.pop(next(iter(known)))
        known[key] = _encode_pairs(tokenizer, template, pairs, max_length, shots)
    return known[key]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    rows: Sequence[Example],
    max_length: int | None = None,
    keys: tuple[str, str] = ("question", "answer"),
) -> list[EncodedExample]:
    """Encode data rows; each result carries its row's ``id``. ``keys`` name the question and the answer."""
    encoded = encode_pairs(tokenizer, template, [(r[keys[0]], r[keys[1]]) for r in rows], max_length)
    return [
        EncodedExample(e.input_ids, e.labels, e.prompt_len, e.truncated, r["id"])
        for e, r in zip(encoded, rows, strict=True)
    ]


def _encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    pairs: Sequence[Pair],
    max_length: int | None,
    shots: Sequence[Pair],
) -> tuple[EncodedExample, ...]:
    if not pairs:
        return ()
    questions = [q for q, _ in pairs]
    prompts = _render(tokenizer, template, questions, shots)
    chats = _render(tokenizer, template, questions, shots, [a for _, a in pairs])
    encoded = tuple(
        _finish(tokenizer, template, prompt, chat, max_length) for prompt, chat in zip(prompts, chats, strict=True)
    )
    cut = sum(e.truncated for e in encoded)
    if not any(e.num_label_tokens for e in encoded):
        raise DataError(f"max_length={max_length} leaves no answer token in any of {len(encoded)} examples; raise it")
    if cut:
        log.warning("max_length=%s cut %d of %d examples", max_length, cut, len(encoded))
    return encoded


def _finish(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    prompt: Sequence[int],
    chat: Sequence[int],
    max_length: int | None,
) -> EncodedExample:
    """Append the end-of-sequence token, cut, and label what follows the prompt."""
    ids = list(chat)
    eos = tokenizer.eos_token_id
    if isinstance(eos, int) and (not ids or ids[-1] != eos):
        ids.append(eos)
    if len(ids) <= len(prompt):
        kind = "chat template" if template.apply_chat_template else "tags"
        raise DataError(
            f"the {kind} of {tokenizer.name_or_path or type(tokenizer).__name__} leave no token of the answer to "
            f"learn: {len(prompt)} ids with the generation prompt, {len(ids)} with the answer "
            f"(model.template_args: {template})"
        )
    whole = len(ids)
    ids = ids[:max_length] if max_length is not None else ids
    start = min(len(prompt), len(ids))
    labels = (*([IGNORE_INDEX] * start), *ids[start:])
    return EncodedExample(tuple(ids), labels, len(prompt), len(ids) < whole)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    questions: Sequence[str],
    shots: Sequence[Pair],
    answers: Sequence[str] | None = None,
) -> list[list[int]]:
    """Token ids of each question's prompt, followed by its answer where there is one."""
    begin = template.answer_prefix.strip() if isinstance(template, Prefilled) else ""
    if begin and answers is None:
        return _render_begun(tokenizer, template, questions, shots, begin)
    if begin and answers is not None:
        answers = [f"{begin} {a}" for a in answers]
    if template.apply_chat_template:
        # Rendered first and tokenised in one call: the same ids as tokenize=True, several times as fast.
        texts = _render_chat(tokenizer, template, questions, shots, answers)
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    texts = _render_tags(template, questions, shots, answers)
    return tokenizer(texts, add_special_tokens=True)["input_ids"]


def _render_begun(
    tokenizer: PreTrainedTokenizerBase, template: Template, questions: Sequence[str], shots: Sequence[Pair], begin: str
) -> list[list[int]]:
    """Prompts that end with the answer's beginning: a turn with ``begin`` for its answer, cut behind it."""
    answers = [begin] * len(questions)
    if template.apply_chat_template:
        texts = _render_chat(tokenizer, template, questions, shots, answers)
    else:
        texts = _render_tags(template, questions, shots, answers)
    if not all(begin in text for text in texts):
        raise DataError(f"the chat template changes the answer's beginning {begin!r}: choose another one")
    cut = [text[: text.rindex(begin) + len(begin)] for text in texts]
    return tokenizer(cut, add_special_tokens=not template.apply_chat_template)["input_ids"]


def _render_tags(
    template: Template, questions: Sequence[str], shots: Sequence[Pair], answers: Sequence[str] | None
) -> list[str]:
    head = template.system_prompt_with_special_tokens or ""
    for question, answer in shots:
        head += template.user_start_tag + question + template.user_end_tag
        head += template.asst_start_tag + answer + template.asst_end_tag
    open_, close = head + template.user_start_tag, template.user_end_tag + template.asst_start_tag
    return [open_ + q + close + (answers[i] if answers is not None else "") for i, q in enumerate(questions)]


def _render_chat(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    questions: Sequence[str],
    shots: Sequence[Pair],
    answers: Sequence[str] | None,
) -> list[str]:
    head = [{"role": "system", "content": template.system_prompt}] if template.system_prompt else []
    for question, answer in shots:
        head += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    chats = [[*head, {"role": "user", "content": q}] for q in questions]
    if answers is not None:
        chats = [[*chat, {"role": "assistant", "content": a}] for chat, a in zip(chats, answers, strict=True)]
    extra: dict[str, Any] = {"date_string": template.date_string} if template.date_string else {}
    try:
        texts: Any = tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=answers is None, **extra
        )
    except Exception as e:  # jinja's errors, and transformers' own where there is no template
        name = tokenizer.name_or_path or type(tokenizer).__name__
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise DataError(
            f"the chat template of {name} refused the conversation: {reason}. "
            "Set template_args.apply_chat_template=false to use plain tags."
        ) from e
    return texts
