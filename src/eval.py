"""Evaluation: python src/eval.py experiment=eval/tofu/default task_name=... model=..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from unfed.cli.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
