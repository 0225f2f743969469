"""The page on failures: every row names a test that is there, and the settings and codes are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from unfed.cli.launch import INTERRUPTED, USER_ERROR
from unfed.config.schema import EngineConfig

PAGES = ("docs/failures.md", "docs/failures.zh-CN.md")


def tables(text: str) -> list[list[list[str]]]:
    """The page's tables by rows and cells, without their heads."""
    found = re.findall(r"^\|[-|]+\n((?:\|.*\n)+)", text, flags=re.M)
    return [[[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines()] for part in found]


@pytest.mark.parametrize("page", PAGES)
def test_every_row_names_a_test_that_is_there(repo_root: Path, page: str) -> None:
    files = (repo_root / "tests").rglob("test_*.py")
    there = {n for f in files for n in re.findall(r"^def (test_\w+)", f.read_text(encoding="utf-8"), flags=re.M)}
    codes, *faults = tables((repo_root / page).read_text(encoding="utf-8"))
    assert {USER_ERROR, INTERRUPTED, 143} <= {int(cells[0]) for cells in codes}
    assert [len(table) for table in faults] == [12, 5, 7, 12]
    for cells in (row for table in faults for row in table):
        named = re.findall(r"`(test_\w+)`", cells[-1])
        assert named and set(named) <= there, cells


@pytest.mark.parametrize("page", PAGES)
def test_the_settings_are_those_of_the_engine(repo_root: Path, page: str) -> None:
    text = (repo_root / page).read_text(encoding="utf-8")
    assert set(re.findall(r"`engine\.(\w+)", text)) <= set(EngineConfig.__dataclass_fields__)
    assert re.search(rf"`engine\.keep_checkpoints`\s*[（(]{EngineConfig().keep_checkpoints}[）)]", text)
