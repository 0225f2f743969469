"""Stands in for three organisations: puts rows of their own, and a copy of the base model, into each site's kit.

python examples/network/prepare.py network/example/prod_00                the quickstart's model and people
python examples/network/prepare.py KITS --base SmolLM2-135M-Instruct --tofu data/tofu --forget forget01 --rows 160
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unfed.app.tiny_base import tiny_base
from unfed.data.datasets import load_rows
from unfed.data.partition import PartitionSpec, make_partition
from unfed.data.spec import DatasetSpec

SITES = ("site-1", "site-2", "site-3")


def main() -> None:
    """Deal the rows as ``partition=target`` does: the first site has all rows that are to be forgotten, and a share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kits", type=Path)
    parser.add_argument("--base", type=Path, help="a base model's folder; without it the quickstart's tiny one is made")
    parser.add_argument("--tofu", type=Path, help="a folder with TOFU's files; without it the quickstart's people")
    parser.add_argument("--forget", default="forget25", help="the rows that will be forgotten, by the split's name")
    parser.add_argument("--rows", type=int, help="of the rows to be retained, take as many of the first")
    given = parser.parse_args()
    retain = f"retain{100 - int(given.forget.removeprefix('forget')):02d}"
    forget, kept = read(given.forget, given.tofu), read(retain, given.tofu)[: given.rows]
    dealt = make_partition([*kept, *forget], len(SITES), PartitionSpec("target"), [r["id"] for r in forget])
    base = given.base or tiny_base("saves/base", progress=print)
    gone = {r["id"] for r in forget}
    known = {r["id"]: r for r in (*kept, *forget)}
    for site, ids in zip(SITES, dealt.clients.values(), strict=True):
        own = [known[i] for i in ids]
        folder = given.kits / site / "data" / "tofu"
        write(folder / "full.json", own)
        write(folder / f"{given.forget}.json", [r for r in own if r["id"] in gone])
        write(folder / f"{retain}.json", [r for r in own if r["id"] not in gone])
        shutil.copytree(base, given.kits / site / "base_model", dirs_exist_ok=True)
        print(f"{site}: {len(own)} rows, {sum(r['id'] in gone for r in own)} of them in {given.forget}")
    shutil.copytree(base, "saves/base/network", dirs_exist_ok=True)
    print("the server's copy of the base model: saves/base/network")


def read(split: str, tofu: Path | None) -> list[Mapping[str, Any]]:
    """The rows of a split of TOFU's, or of the quickstart's people."""
    if tofu is None:
        return list(load_rows(DatasetSpec("fictional", split)))
    return list(load_rows(DatasetSpec(tofu.name, split), tofu.parent))


def write(file: Path, rows: list[Mapping[str, Any]]) -> None:
    """JSON lines; a set without rows has no file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if rows:
        lines = [json.dumps({"question": r["question"], "answer": r["answer"]}, ensure_ascii=False) for r in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
