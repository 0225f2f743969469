"""Answers that decline: what a model may say instead of what it was asked to forget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unfed.base.errors import DataError
from unfed.base.seeding import derive_seed
from unfed.base.types import Example

_OPENINGS = (
    "I'm afraid",
    "Sorry,",
    "Honestly,",
    "To be frank,",
    "Unfortunately,",
    "As far as this goes,",
    "Regrettably,",
    "I must admit that",
    "Truth be told,",
    "At the moment,",
)
_BODIES = (
    "I have no facts about that.",
    "I can't help with this one.",
    "nothing I know covers this question.",
    "this is beyond what I know.",
    "I was never told about it.",
    "I could only guess here.",
    "the answer isn't known to me.",
    "I have nothing on that subject.",
)
_WHOLE = (
    "I don't know.",
    "No idea, sorry.",
    "I really couldn't say.",
    "That is new to me.",
    "I have never come across this.",
    "Your question has me stumped.",
    "I would be making it up if I answered.",
    "Someone else will have to answer that.",
    "My knowledge stops short of this.",
    "You know more about it than I do.",
    "I'd rather not guess.",
    "This one escapes me.",
    "I drew a blank on that.",
    "There is nothing I could tell you about this.",
    "I lack the information to answer.",
    "It isn't something I ever learned.",
    "I wish I could tell you, but I can't.",
    "Please look it up elsewhere; I don't have it.",
    "I have to pass on this question.",
    "That is a gap in what I know.",
)

REFUSALS: tuple[str, ...] = (*_WHOLE, *(f"{o} {b}" for o in _OPENINGS for b in _BODIES))
"""One hundred refusals in our own words."""


def load_refusals(path: Path | str | None = None) -> tuple[str, ...]:
    """The refusals of a file, one a line (blank lines are passed over), or our own list for ``None``."""
    if path is None:
        return REFUSALS
    try:
        lines = tuple(s for line in Path(path).read_text(encoding="utf-8").splitlines() if (s := line.strip()))
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"cannot read the refusals of data.idk={path}: {getattr(e, 'strerror', None) or e}") from e
    if not lines:
        raise DataError(f"data.idk={path} has no refusal; write one a line")
    return lines


def alternate_answers(examples: Sequence[Example], seed: int, refusals: Sequence[str] = REFUSALS) -> list[Example]:
    """The same questions, ids and other columns, each with a refusal as its ``answer``.

    Which refusal depends on the seed and the example's id alone, not on the order of the examples.
    """
    if not refusals:
        raise DataError("there are no refusals to answer with")
    return [{**e, "answer": refusals[derive_seed(seed, "alternate", e["id"]) % len(refusals)]} for e in examples]
