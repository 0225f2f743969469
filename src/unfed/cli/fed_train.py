"""Federated fine-tuning and unlearning."""

from __future__ import annotations

from collections.abc import Sequence

from unfed.cli.launch import launch


def main(argv: Sequence[str] | None = None) -> int:
    """``python src/fed_train.py --config-name=... experiment=... task_name=... [key=value ...]``"""
    return launch(argv, "train-lora.yaml", "fed_train")


def finetune(argv: Sequence[str] | None = None) -> int:
    """``unfed train``: federated fine-tuning of an adapter, unless ``--config-name`` says otherwise."""
    return launch(argv, "train-lora.yaml", "finetune")


def unlearn(argv: Sequence[str] | None = None) -> int:
    """``unfed unlearn``: federated unlearning with an adapter, unless ``--config-name`` says otherwise."""
    return launch(argv, "unlearn-lora.yaml", "unlearn")
