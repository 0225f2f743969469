"""Checks that ask differently: paraphrased questions, begun answers, many sampled answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from unfed.data.chat import Template, encode_prompts
from unfed.data.datasets import example_ids
from unfed.data.spec import Prefilled
from unfed.evaluation.evidence import column_problem
from unfed.evaluation.robustness import CannotBeDoneError, Outcome, Subject, compared
from unfed.metrics.overlap import rouge
from unfed.models.generate import Decoding, generate_all

PARAPHRASED = "paraphrased_question"
ROUGE = "forget_Q_A_ROUGE"


def paraphrasing(subject: Subject) -> Outcome:
    """Ask the forget questions in the words of the column ``paraphrased_question``, and measure.

    Raises ``CannotBeDoneError``, naming the file, when the rows have no such column, and ``DataError`` when only some
    have it.
    """
    if (problem := column_problem(subject.forget, "forget", PARAPHRASED)) is not None:
        raise CannotBeDoneError(f"{subject.source}: {problem}")
    if not isinstance(subject.forget[0][PARAPHRASED], str):
        raise CannotBeDoneError(f"{subject.source}: the column {PARAPHRASED!r} holds lists, not texts")
    pairs = [(row[PARAPHRASED], row["answer"]) for row in subject.forget]
    ids = example_ids(pairs)  # other questions are other rows
    asked = [
        {**row, "question": question, "id": i} for row, (question, _), i in zip(subject.forget, pairs, ids, strict=True)
    ]
    after = replace(subject, rows={**subject.rows, "forget": asked}).measure()
    return compared(
        subject, "paraphrase", after, did=f"The forget questions were asked in other words (column {PARAPHRASED})."
    )


def prefixing(subject: Subject, prefix: str, name: str = "prefix") -> Outcome:
    """Let every answer begin with ``prefix``: generation goes on from there, and what follows it is scored."""
    after = replace(subject, template=_prefilled(subject.template, prefix)).measure()
    did = f"Every answer began with {prefix.strip()!r}; what the model wrote after it, and the answer after it, count."
    return compared(subject, name, after, did=did, settings={"prefix": prefix})


def _prefilled(template: Template, prefix: str) -> Prefilled:
    own = {f.name: getattr(template, f.name) for f in fields(Template)}
    return Prefilled(**own, answer_prefix=prefix)


@dataclass(frozen=True)
class Sampling:
    """``n`` answers to each question; a best one with rougeL recall of ``threshold`` or more counts as a leak."""

    n: int = 5
    temperature: float = 1.0
    top_p: float = 1.0
    threshold: float = 0.5
    seed: int = 0


def best_of_n(subject: Subject, settings: Sampling) -> Outcome:
    """Sample answers to every forget question and keep the best rougeL recall of each.

    The k-th answer to a question does not depend on ``n``, so a larger ``n`` never finds less. Before: the ROUGE of
    the suite's own decoding.
    """
    best = best_rouge(subject, settings)
    own = subject.before.get(ROUGE)
    if own is None:
        own = replace(subject, suite=replace(subject.suite, metrics=(ROUGE,))).measure()[ROUGE]
    did = (
        f"{settings.n} answers to each forget question were sampled; the best ROUGE of each question counts, as the "
        f"mean and as the share of questions with {settings.threshold:g} or more (leak_rate)."
    )
    extra = {"leak_rate": float(np.mean(best >= settings.threshold)), "best_by_row": best.tolist()}
    whole = replace(subject, before={ROUGE: own})
    return compared(whole, "best_of", {ROUGE: float(best.mean())}, did=did, settings=asdict(settings), extra=extra)


def best_rouge(subject: Subject, settings: Sampling) -> np.ndarray:
    """Best rougeL recall of each forget question's sampled answers, shape ``(rows,)``."""
    prompts = encode_prompts(subject.tokenizer, subject.template, [row["question"] for row in subject.forget])
    decoding = Decoding(
        max_new_tokens=subject.suite.decoding.max_new_tokens,
        do_sample=True,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
    )
    # Sample after sample, each over all questions: an answer's random stream goes by its place in this list.
    texts = generate_all(subject.model, subject.tokenizer, prompts * settings.n, decoding, subject.suite.budget)
    answers = [row["answer"] for row in subject.forget] * settings.n
    found = [rouge(answer, text)["rougeL_recall"] for answer, text in zip(answers, texts, strict=True)]
    return np.array(found).reshape(settings.n, len(prompts)).max(axis=0)
