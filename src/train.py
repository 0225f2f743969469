"""Fine-tuning and unlearning in one place: python src/train.py --config-name=unlearn.yaml trainer=NPO ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from unfed.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
