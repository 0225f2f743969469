"""Federated fine-tuning and unlearning: python src/fed_train.py --config-name=unlearn-lora.yaml experiment=..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from unfed.cli.fed_train import main

if __name__ == "__main__":
    raise SystemExit(main())
