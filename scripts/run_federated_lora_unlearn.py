"""Federated unlearning of a LoRA adapter: fed_train.py with --config-name=unlearn-lora.yaml as the default."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from unfed.cli.fed_train import unlearn as main

if __name__ == "__main__":
    raise SystemExit(main())
