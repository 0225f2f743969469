"""What there is to say about data and templates before anything is read. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from unfed.base.params import STRICT

Pair = tuple[str, str]
"""A question and an answer."""


@dataclass(frozen=True)
class Template:
    """How a question and an answer become text. The tags are used when ``apply_chat_template`` is false.

    ``system_prompt`` and ``date_string`` go to the chat template (Llama-3's takes a date; it would print
    today's otherwise); ``system_prompt_with_special_tokens`` precedes the tags.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    apply_chat_template: bool = True
    system_prompt: str | None = None
    system_prompt_with_special_tokens: str | None = None
    user_start_tag: str = ""
    user_end_tag: str = ""
    asst_start_tag: str = ""
    asst_end_tag: str = ""
    date_string: str | None = None


@dataclass(frozen=True)
class Prefilled(Template):
    """A template whose answers all begin with ``answer_prefix``, which then belongs to the prompt.

    Blanks around it are taken off: an answer's first token brings its own.
    """

    answer_prefix: str = ""


@dataclass(frozen=True)
class DatasetSpec:
    """Which rows to read; the fields are those of ``data.<split>`` in the configuration.

    ``path`` is ``fictional`` or a hub name, whose last part in lower case names the local folder.
    ``split`` is the hub's split; a local file of another one than ``train`` lies in a folder of the set's name.
    ``question_key=None``: rows of plain text, without a question. ``max_length`` is in
    tokens and is used by the tokenisation, not here. ``limit`` keeps the first rows.
    ``name`` may join several: see :func:`unfed.data.datasets.load_rows`.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    path: str
    name: str
    split: str = "train"
    question_key: str | None = "question"
    answer_key: str = "answer"
    max_length: int = 512
    limit: int | None = None

    @property
    def folder(self) -> str:
        """The local folder's name: ``locuslab/TOFU`` -> ``tofu``."""
        return self.path.rstrip("/").rsplit("/", 1)[-1].lower()

    @property
    def full_name(self) -> str:
        """The set's name, and the split's where that is not ``train``."""
        return self.name if self.split == "train" else f"{self.name}/{self.split}"
