"""Evaluation of a model or an adapter."""

from __future__ import annotations

from collections.abc import Sequence

from unfed.cli.launch import launch


def main(argv: Sequence[str] | None = None) -> int:
    """``python src/eval.py experiment=eval/tofu/default task_name=... model=... [key=value ...]``"""
    return launch(argv, "eval.yaml", "eval")
