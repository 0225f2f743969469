"""The page in a real browser, at the width of a desktop and of a phone: no error, nothing sticks out sideways.

``UNFED_SCREENSHOTS=DIR`` keeps the screenshots. Chromium's window is never narrower than 500 pixels, so the phone is
a frame 390 pixels wide: media queries and layout go by the frame.
"""

from __future__ import annotations

import html
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from unfed.cli.main import main

BROWSER = next((b for n in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(n))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome here")
PHONE = 390
MEASURE = """<script>addEventListener("load", () => {
  const frame = document.querySelector("iframe"), page = frame ? frame.contentDocument : document;
  page.querySelectorAll("details").forEach(d => d.open = true);
  const text = [...page.querySelectorAll("h1, h2, p, td, th, dd, li, figcaption, summary")];
  const images = [...page.images];
  document.title = JSON.stringify({wide: page.documentElement.scrollWidth, view: page.documentElement.clientWidth,
    small: Math.min(...text.map(e => parseFloat(page.defaultView.getComputedStyle(e).fontSize))),
    images: images.length, broken: images.filter(i => !i.complete || !i.naturalWidth).length,
    letter: Math.min(...images.map(i => 9 / 72 * 200 * i.clientWidth / i.naturalWidth))});
});</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, by_hand: SimpleNamespace) -> Path:
    """A report with every section: six models with long names, curves of scores during training, remarks."""
    root = tmp_path_factory.mktemp("report")
    runs = by_hand.study(root / "s", NPO=0.32, GradDiff_with_a_long_name=0.6)
    watched = [
        {"round": n, "phase": "unlearn" if n < 2 else "recover", "scores": {"forget_Q_A_Prob": 0.9 - 0.2 * n,
         "retain_Q_A_Prob": 0.8}, "clients": {"c0": 0.6, "c1": 0.8}, "client_mean": 0.7, "client_worst": 0.6,
         "client_gap": 0.2}
        for n in range(1, 4)
    ]  # fmt: skip
    runs["SimNPO"] = by_hand.write_run(
        root / "s" / "SimNPO", "unlearn",
        by_hand.scores(0.1, 0.5, forget_quality=1e-4, mem=0.8, priv=0.2, utility=0.5, mia_loss=0.6),
        rounds=4, evaluations=watched, warnings=["the loss did not move"],
    )  # fmt: skip
    runs["quit"] = by_hand.write_run(root / "s" / "quit", "unlearn", status="failed")
    assert main(["report", *map(str, runs.values()), "--output", str(root / "out"), "--title", "A title"]) == 0
    return root / "out" / "report.html"


def _chromium(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files",
             "--disable-web-security", "--enable-logging=stderr", "--v=0"]  # fmt: skip
    return subprocess.run([BROWSER, *flags, *arguments], capture_output=True, text=True, timeout=120, check=False)


def _at_width(page: Path, width: int, directory: Path) -> Path:
    """What to open so that the page is ``width`` pixels wide, with a script that writes what it measures as title."""
    file = directory / f"at-{width}.html"
    if width >= 500:
        file.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    else:
        inner = html.escape(page.read_text(encoding="utf-8"), quote=True)
        frame = f'<iframe srcdoc="{inner}" style="border:0;width:{width}px;height:7000px"></iframe>'
        file.write_text(
            f'<!doctype html><meta charset="utf-8"><body style="margin:0">{frame}{MEASURE}', encoding="utf-8"
        )
    return file


@pytest.mark.parametrize("width", [1280, PHONE])
def test_it_opens_without_errors_and_fits(page: Path, tmp_path: Path, width: int) -> None:
    opened = _at_width(page, width, tmp_path)
    found = _chromium(
        "--dump-dom", f"--window-size={max(width, 500)},900", "--virtual-time-budget=4000", opened.as_uri()
    )
    assert "CONSOLE" not in found.stderr
    title = re.search(r"<title>({.*?})</title>", found.stdout)
    assert title, found.stderr[-2000:]
    measured = dict(re.findall(r'"(\w+)":([\d.]+)', html.unescape(title[1])))
    assert int(measured["view"]) == width
    assert int(measured["wide"]) <= width, "something sticks out sideways"
    assert int(measured["images"]) >= 7
    assert measured["broken"] == "0"
    assert float(measured["small"]) >= 11.5, "text too small to read"
    assert float(measured["letter"]) >= 9, "letters of 9 points in the plots are too small to read"


@pytest.mark.parametrize(("width", "height"), [(1280, 5200), (PHONE, 7000)])
def test_screenshot(page: Path, tmp_path: Path, width: int, height: int) -> None:
    """A picture of the size that was asked for, on which something is drawn."""
    import matplotlib.image

    places = [tmp_path]
    if wanted := os.environ.get("UNFED_SCREENSHOTS"):
        Path(wanted).mkdir(parents=True, exist_ok=True)
        places.append(Path(wanted))
    shot = tmp_path / f"report-{width}.png"
    opened = _at_width(page, width, tmp_path)
    _chromium(f"--screenshot={shot}", f"--window-size={max(width, 500)},{height}", opened.as_uri())
    for place in places[1:]:
        shutil.copy(shot, place / shot.name)
    assert struct.unpack(">II", shot.read_bytes()[16:24]) == (max(width, 500), height)
    image = matplotlib.image.imread(shot)[:, :width, :3]
    assert 0.01 < (image.min(axis=2) < 0.5).mean() < 0.5, "dark on white"
