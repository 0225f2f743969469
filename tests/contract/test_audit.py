"""What the check for known vulnerabilities makes of pip-audit's answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / ".ci" / "audit.py"
CLEAN = {"name": "torch", "version": "2.13.0", "vulns": []}
SKIPPED = {"name": "unfed", "skip_reason": "not on PyPI"}
FOUND = {"id": "PYSEC-2026-1", "aliases": ["CVE-2026-1"], "fix_versions": ["1.1"]}
BAD = {"name": "some", "version": "1.0", "vulns": [FOUND]}


@pytest.fixture
def audit():
    spec = importlib.util.spec_from_file_location("audit", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_known_vulnerability_fails_and_says_what_mends_it(audit):
    code, lines = audit.verdict([CLEAN, BAD, SKIPPED])
    assert code == 1
    assert lines == ["2 of 3 packages audited", "some 1.0: CVE-2026-1, PYSEC-2026-1, mended in 1.1"]


def test_an_accepted_one_is_said_and_does_not_fail(audit, monkeypatch):
    monkeypatch.setattr(audit, "ACCEPTED", {"CVE-2026-1": "its function is not called"})
    code, lines = audit.verdict([BAD])
    assert code == 0 and lines[-1].endswith("(accepted: its function is not called)")


def test_where_nothing_could_be_asked_it_says_so(audit):
    assert audit.verdict([SKIPPED]) == (
        0,
        ["NOT AUDITED: no vulnerability database knows these packages, or none can be reached from here"],
    )
    assert audit.verdict([CLEAN, SKIPPED]) == (0, ["1 of 2 packages audited"])


def test_an_answer_that_is_none_is_no_clean_bill(audit, monkeypatch, capsys):
    done = audit.subprocess.CompletedProcess([], 1, stdout="", stderr="no route to host")
    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: done)
    assert audit.main(["requirements.txt"]) == 0
    assert capsys.readouterr().out.startswith("NOT AUDITED")
