"""What a server holds at 100 MB a message and three sites, real processes and mutual TLS. Needs NVFlare."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("nvflare") is None, reason="NVFlare is not installed (unfed[network])"),
]


def test_a_server_grows_by_500_mb_at_most_and_not_from_round_to_round(repo_root, tmp_path):
    """Three adapters of 100 MB cannot be done without: what is sent, their mean, and the update that has just come."""
    command = [sys.executable, str(repo_root / "benchmarks" / "network.py"), "--megabytes", "10", "100", "100"]
    subprocess.run([*command, "--rounds", "6", "--output", str(tmp_path / "found.json")], check=True)
    _, early, late = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert early["peak_over_idle"] > 300e6, early
    assert early["peak_over_idle"] < 500e6 and late["peak_over_idle"] < 500e6, (early, late)
