"""What must be the same wherever a run trains: releases that decide numbers, and the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unfed.app.progress import say
from unfed.app.rundir import versions
from unfed.base.errors import UnfedError

DECISIVE = ("unfed", "torch", "transformers", "peft", "accelerate")
"""Packages whose release decides numbers."""


def refuse_other_versions(told: Mapping[str, Mapping[str, Any]], *, strict: bool) -> None:
    """``told``: releases by who has them. Raise ``UnfedError`` for those that differ from this process's, or, where
    not ``strict``, say them."""
    here = versions()
    found = [
        f"{site} has {package} {there.get(package)} and the server {here[package]}"
        for site, there in told.items()
        for package in DECISIVE
        if package in here and str(there.get(package)).partition("+")[0] != here[package].partition("+")[0]
    ]
    if found and strict:
        raise UnfedError("; ".join(found) + ". Install the same releases, or set engine.same_versions=false")
    for line in found:
        say(f"WARNING: {line}")


def refuse_other_base(who: str, there: Mapping[str, Any], here: Mapping[str, str]) -> None:
    """Raise ``UnfedError`` where facts of the base model (:func:`unfed.models.digest.base_facts`) differ."""
    other = [f"its {what}: {there.get(what)}, the server's: {d}" for what, d in here.items() if there.get(what) != d]
    if other:
        raise UnfedError(f"{who} has another base model than the server: {'; '.join(other)}")
