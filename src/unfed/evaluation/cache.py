"""What a model said, kept on disk: a second metric or a re-run reads it in place of another pass.

A key covers all that an entry depends on: the digest of every weight, the encoded tokens (hence data, template,
tokenizer and lengths), how it was computed, and the versions of this file and of the libraries that compute. Batches
are not part of it: they make no difference beyond rounding. An entry that cannot be read is made anew, and one that
cannot be written (a full disk, a directory of somebody else's) is done without.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from unfed.base.artifacts import read_json, read_tensors, write_json, write_tensors
from unfed.base.errors import ArtifactError
from unfed.data.chat import EncodedExample
from unfed.metrics.stats import Array, TokenStats

log = logging.getLogger(__name__)

VERSION = 2
"""Raised whenever the meaning of an entry changes, or how it is computed."""

LIBRARIES = (torch.__version__, transformers.__version__, peft.__version__)


@dataclass(frozen=True)
class EvidenceCache:
    """Entries of one model in ``directory``. ``model`` digests its weights, settings and precision, ``base`` those of
    the model beneath its adapter (``None``: there is none, or another model judges). ``tally`` counts the entries that
    were ``read`` and those that were ``made``."""

    directory: Path
    model: str
    base: str | None = None
    tally: Counter[str] = field(default_factory=Counter, compare=False)

    def stats(self, encoded: Sequence[EncodedExample], how: str, *, details: bool, base: bool = False) -> Entry:
        """The entry of scored answers; ``how`` names what else they depend on."""
        return self._entry("stats" + ("+details" if details else ""), how, _digest(encoded), base)

    def norms(self, encoded: Sequence[EncodedExample]) -> Entry:
        """The entry of gradient norms."""
        return self._entry("norms", "", _digest(encoded), False)

    def texts(self, prompts: Sequence[Sequence[int]], how: str) -> Entry:
        """The entry of generated answers."""
        return self._entry("texts", how, _digest_ids(prompts), False)

    def _entry(self, kind: str, how: str, content: str, base: bool) -> Entry:
        model = self.base if base else self.model
        if model is None:
            return Entry(None)
        key = hashlib.sha256(json.dumps([VERSION, *LIBRARIES, model, kind, how, content]).encode()).hexdigest()
        return Entry(self.directory / key[:2] / key[2:34], self.tally)


@dataclass(frozen=True)
class Entry:
    """One thing that is kept; ``place`` is its path without a suffix (``None``: nothing is kept)."""

    place: Path | None
    tally: Counter[str] = field(default_factory=Counter, compare=False)

    def stats(self, encoded: Sequence[EncodedExample]) -> TokenStats | None:
        """Token statistics of ``encoded``, or ``None``."""
        found = self._arrays()
        if found is None or len(found.get("offsets", ())) != len(encoded) + 1:
            return None
        hits, mean, var = (found.get(n) for n in ("is_argmax", "mean", "var"))
        hits = None if hits is None else hits.astype(bool)
        self.tally["read"] += 1
        return TokenStats(found["logp"], found["offsets"], tuple(e.example_id for e in encoded), hits, mean, var)

    def keep_stats(self, stats: TokenStats, *, details: bool) -> None:
        """Keep token statistics; the moments where they were asked for."""
        arrays = {"logp": stats.logp, "offsets": stats.offsets}
        if details and stats.is_argmax is not None and stats.mean is not None and stats.var is not None:
            arrays |= {"is_argmax": stats.is_argmax.astype(np.uint8), "mean": stats.mean, "var": stats.var}
        self._keep(arrays)

    def norms(self, count: int) -> Array | None:
        """Gradient norms of ``count`` answers, or ``None``."""
        found = self._arrays()
        if found is None or len(found.get("norms", ())) != count:
            return None
        self.tally["read"] += 1
        return found["norms"]

    def keep_norms(self, norms: Array) -> None:
        """Keep gradient norms."""
        self._keep({"norms": norms})

    def texts(self, count: int) -> list[str] | None:
        """``count`` generated answers, or ``None``."""
        if self.place is None:
            return None
        try:
            found: Any = read_json(self.place.with_suffix(".json"))
        except ArtifactError:
            return None
        good = isinstance(found, list) and len(found) == count and all(isinstance(t, str) for t in found)
        self.tally["read"] += good
        return found if good else None

    def keep_texts(self, texts: Sequence[str]) -> None:
        """Keep generated answers."""
        self._write(".json", lambda file: write_json(file, list(texts)))

    def _arrays(self) -> dict[str, Array] | None:
        if self.place is None:
            return None
        try:
            return {n: t.numpy() for n, t in read_tensors(self.place.with_suffix(".safetensors")).items()}
        except ArtifactError:
            return None

    def _keep(self, arrays: dict[str, Array]) -> None:
        tensors = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in arrays.items()}
        self._write(".safetensors", lambda file: write_tensors(file, tensors))

    def _write(self, suffix: str, write: Callable[[Path], None]) -> None:
        if self.place is None:
            return
        self.tally["made"] += 1
        try:
            _make(self.place.parent)
            write(self.place.with_suffix(suffix))
        except ArtifactError as e:  # the scores are there, and worth more than their copy
            log.warning("the evaluation goes on without its cache (eval.cache_dir): %s", e)


def _make(folder: Path) -> None:
    """What a model says of the rows is as private as the rows are."""
    for place in (folder.parent, folder):
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise ArtifactError(f"cannot make {place}: {e.strerror or e}") from e


def _digest(encoded: Sequence[EncodedExample]) -> str:
    h = hashlib.sha256()
    for e in encoded:
        h.update(np.asarray([len(e), *e.input_ids, *e.labels], dtype=np.int64).tobytes())
    return h.hexdigest()


def _digest_ids(prompts: Sequence[Sequence[int]]) -> str:
    h = hashlib.sha256()
    for ids in prompts:
        h.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return h.hexdigest()
