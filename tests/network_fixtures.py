"""A network of real processes on this machine for tests: a server, three sites, mutual TLS. Needs NVFlare."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unfed.base.artifacts import read_json, read_tensors, write_json
from unfed.base.errors import UnfedError

SITES = ("site-1", "site-2", "site-3")
GIVEN_UP = 40
"""Seconds without a sign of life after which NVFlare's server here holds a site to be gone; 600 by default."""
TRAINING = (
    "model=tiny-lora",
    "model.model_args.lora_config.r=4",
    "model.model_args.lora_config.lora_dropout=0.1",
    "eval=null",
    "trainer.args.learning_rate=1e-2",
    "trainer.args.per_device_train_batch_size=4",
    "trainer.args.gradient_accumulation_steps=1",
    "trainer.args.num_train_epochs=1",
    "trainer.args.report_to=none",
)


def unfed(*given, cwd, check=True):
    """The command in a process of its own, as a user runs it."""
    command = [sys.executable, "-m", "unfed.cli.main", *map(str, given)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


class Network:
    """A provisioned network whose server and first three sites run."""

    def __init__(self, place: Path, port: int) -> None:
        self.place, self.kits = place, place / "network" / "trial" / "prod_00"
        self.admin = self.kits / "admin@trial.org"
        people = "admins: [admin@trial.org]\nmembers: [member@trial.org]\n"
        project = f"name: trial\nhost: localhost\nport: {port}\nsites: [site-1, site-2, site-3, site-4]\n{people}"
        (place / "PROJECT.yml").write_text(project, encoding="utf-8")
        unfed("network", "provision", "PROJECT.yml", cwd=place)
        self.port, self.running = port, []

    def start(self, kit: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "unfed.cli.main", "network", "start", str(kit)]
        with (self.place / f"{kit.name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.running.append(process)
        return process

    def stop(self) -> None:
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: the server or site, its jobs, their children
            process.wait()

    def session(self, kit: Path | None = None):
        from unfed.app.nvflare_app import session

        return session(kit or self.admin)

    def connected(self) -> set[str]:
        with self.session() as opened:
            return {c.name for c in opened.get_system_info().client_info}

    def submit(self, *overrides, config="train-lora.yaml", check=True):
        given = ["network", "submit", "--kit", self.admin, f"--config-name={config}", *TRAINING, *overrides]
        return unfed(*given, cwd=self.place, check=check)

    def weights(self, run: str) -> str:
        return read_tensors(self.place / "saves" / run / "adapter_model.safetensors").digest()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes(*words: str) -> list[int]:
    """Processes whose command line has all the words."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if all(w in line for w in words):
                found.append(int(place.name))
    return found


def deal_rows(network: Network, small_data: Path, small_base: Path) -> None:
    """Each site has six rows; the first and the third have three forget rows each. ``all`` holds everybody's."""

    def lines(name: str) -> list[str]:
        return (small_data / "tofu" / f"{name}.json").read_text(encoding="utf-8").splitlines()

    full, forget = lines("full"), set(lines("forget01"))
    dealt = {"site-1": full[:3] + full[12:15], "site-2": full[3:9], "site-3": full[9:12] + full[15:]}
    for name, own in {**dealt, "all": [r for rows in dealt.values() for r in rows]}.items():
        folder = (network.place if name == "all" else network.kits / name) / "data" / "tofu"
        folder.mkdir(parents=True)
        gone = [r for r in own if r in forget]
        for split, rows in {"full": own, "forget01": gone, "retain99": [r for r in own if r not in forget]}.items():
            if rows:
                (folder / f"{split}.json").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for name in (*SITES, "site-4"):
        shutil.copytree(small_base, network.kits / name / "base_model")
    local = network.kits / "localhost" / "local"
    (local / "unfed.yml").write_text(f"outputs: {network.place / 'saves'}\n", encoding="utf-8")
    resources = read_json(local / "resources.json")
    resources["servers"][0]["heart_beat_timeout"] = GIVEN_UP
    write_json(local / "resources.json", resources)


@pytest.fixture(scope="module")
def network(tmp_path_factory, small_data, small_base):
    made = Network(tmp_path_factory.mktemp("network"), free_port())
    deal_rows(made, small_data, small_base)
    try:
        made.start(made.kits / "localhost")
        for site in SITES:
            made.start(made.kits / site)
        until = time.monotonic() + 180
        while time.monotonic() < until:
            with contextlib.suppress(UnfedError):
                if made.connected() == set(SITES):
                    break
            time.sleep(2)
        else:
            pytest.fail(
                "the sites did not connect: " + "".join(f.read_text()[-2000:] for f in made.place.glob("*.log"))
            )
        yield made
    finally:
        made.stop()
