"""Sphinx configuration: MyST Markdown, no generated API pages."""

import tomllib
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "Unfed"
author = _PROJECT["authors"][0]["name"]
copyright = f"2026, {author}"
release = (
    (_ROOT / "src" / "unfed" / "__init__.py").read_text(encoding="utf-8").split('__version__ = "')[1].split('"')[0]
)
version = release

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Unfed {release}"
