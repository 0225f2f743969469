"""Known vulnerabilities of the pinned requirements, by pip-audit; says so where no database can be asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ACCEPTED: Mapping[str, str] = {}
"""Advisories that do not stop the build, by id, and why."""
SECONDS = 300


def verdict(dependencies: Sequence[Mapping[str, Any]]) -> tuple[int, list[str]]:
    """Exit code and lines for pip-audit's list of dependencies; each has ``vulns`` or a ``skip_reason``."""
    audited = [d for d in dependencies if "vulns" in d]
    if not audited:
        return 0, ["NOT AUDITED: no vulnerability database knows these packages, or none can be reached from here"]
    lines, code = [f"{len(audited)} of {len(dependencies)} packages audited"], 0
    for dependency in audited:
        for found in dependency["vulns"]:
            names = {found["id"], *found.get("aliases", ())}
            why = next((ACCEPTED[n] for n in names if n in ACCEPTED), None)
            mended = ", ".join(found.get("fix_versions", ())) or "nothing yet"
            what = f"{dependency['name']} {dependency['version']}: {', '.join(sorted(names))}, mended in {mended}"
            lines.append(f"{what} (accepted: {why})" if why else what)
            code = code if why else 1
    return code, lines


def main(files: Sequence[str]) -> int:
    """Audit requirements files whose every package is pinned."""
    given = [a for file in files for a in ("-r", file)]
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--format=json", *given]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        found = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        print("NOT AUDITED: pip-audit could not ask a vulnerability database from here")
        return 0
    code, lines = verdict(found)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
