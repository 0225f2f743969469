"""Train the tiny base model: ``python scripts/make_tiny_model.py saves/tiny`` (about a minute on two cores)."""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from unfed.app.tiny_base import SIZES, build
from unfed.base.errors import UnfedError


def main() -> int:
    """Build one of the sizes at the given directory; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where config.json, model.safetensors and the tokenizer go")
    parser.add_argument("--size", choices=sorted(SIZES), default="quickstart")
    given = parser.parse_args()
    try:
        build(given.directory, SIZES[given.size], print)
    except UnfedError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
