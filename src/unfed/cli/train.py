"""Fine-tuning and unlearning in one place."""

from __future__ import annotations

from collections.abc import Sequence

from unfed.cli.launch import launch


def main(argv: Sequence[str] | None = None) -> int:
    """``python src/train.py [--config-name=unlearn.yaml] trainer=... task_name=... [key=value ...]``"""
    return launch(argv, "train.yaml", "train")
