"""What all tests share. Nothing here, and nothing a test starts, reaches a network."""

import os

# Before transformers and huggingface_hub are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A data root or an output root of the person who runs the tests must not steer them.
os.environ.pop("UNFED_DATA_DIR", None)

import json
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"
AUTHOR_ROWS = 20  # TOFU: every author is a block of 20 rows


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Reference values and TOFU beside the checkout; skips where they are not."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model_dir(shared_dir: Path) -> Path:
    """The golden two-layer Llama, to be read only: ``<shared>/golden/models/tiny``."""
    return shared_dir / "golden" / "models" / "tiny"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root (``paths.data_dir``) with a small ``tofu`` folder, for reading only.

    With the shared TOFU: 7 authors of 20 rows, ``full`` = 4 retain authors, then the forget ones in TOFU's order
    (``forget10`` has 3 authors, ``forget05`` the last 2 of them, ``forget01`` the last), the perturbed files of those
    rows, and 20 rows of each of the others. Without: the project's own generator.
    """
    root = tmp_path_factory.mktemp("data")
    source = SHARED / "data" / "tofu"
    if source.is_dir():
        _small_tofu(source, root / "tofu")
    else:
        from unfed.data.fictional import write_tofu_folder

        write_tofu_folder(root / "tofu")
    return root


def _small_tofu(source: Path, target: Path) -> None:
    def rows(name: str) -> list[str]:
        return (source / f"{name}.json").read_text(encoding="utf-8").splitlines()

    def first_authors(name: str, count: int) -> list[str]:
        return rows(name)[: count * AUTHOR_ROWS]

    def forget(suffix: str) -> list[str]:
        parts = [first_authors(f"{split}{suffix}", 1) for split in ("forget10", "forget05", "forget01")]
        return [row for part in parts for row in part]

    full = first_authors("full", 4) + forget("")
    files = {"full": full}
    for percent, authors in (("10", 3), ("05", 2), ("01", 1)):
        count = authors * AUTHOR_ROWS
        files[f"forget{percent}"] = forget("")[-count:]
        files[f"forget{percent}_perturbed"] = forget("_perturbed")[-count:]
        files[f"retain{100 - int(percent)}"] = full[:-count]
        files[f"holdout{percent}"] = first_authors(f"holdout{percent}", 1)
    for name in ("retain_perturbed", "real_authors", "real_authors_perturbed", "world_facts", "world_facts_perturbed"):
        files[name] = first_authors(name, 1)
    target.mkdir()
    for name, lines in files.items():
        for line in lines:
            json.loads(line)
        (target / f"{name}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
