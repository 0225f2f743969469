"""SIGKILL at random moments, from the first file of a run to its last: each run ends with the bytes that it would have
had.

A run that ends before its next kill is looked at, and the kills go on with a new one.
"""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fault_fixtures import digests, rounds_done, story

from unfed.app.rundir import run_status
from unfed.app.runs import run
from unfed.base.artifacts import LOCK_NAME


@pytest.fixture(scope="module")
def length(make, processes, tmp_path_factory) -> float:
    """Seconds that the run takes in a process of its own."""
    process = processes.Process(target=run, args=(make(tmp_path_factory.mktemp("length") / "run"),))
    began = time.monotonic()
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


@dataclass
class Killer:
    """Kills runs below ``place`` and compares those that end with ``whole``."""

    make: object
    processes: object
    place: Path
    whole: Path
    length: float
    draw: random.Random
    kills: int = 0
    ended: int = 0
    at: list[int] = field(default_factory=list)
    """After how many rounds each kill came."""

    @property
    def directory(self) -> Path:
        return self.place / f"run{self.ended}"

    def once(self) -> None:
        """Start or resume a run; kill it while it starts, or at a moment of one of its next rounds."""
        process = self.processes.Process(target=run, args=(self.make(self.directory, resume=self.directory.exists()),))
        ahead = self.draw.choice((None, 0, 1, 1, 2))
        wanted = 0 if ahead is None else rounds_done(self.directory) + ahead
        process.start()
        while process.is_alive() and wanted > 0 and rounds_done(self.directory) < wanted:
            time.sleep(0.002)  # however busy the machine is, there is progress between kills
        process.join(self.draw.uniform(0.0, self.length * (0.6 if wanted == 0 else 0.1)))
        process.kill()
        process.join()
        if process.exitcode == -9:
            self.kills += 1
            self.at.append(rounds_done(self.directory))
        else:
            assert process.exitcode == 0
            self.look()

    def look(self) -> None:
        """At a run that has ended."""
        assert digests(self.directory) == digests(self.whole)
        assert story(self.directory) == story(self.whole)
        assert run_status(self.directory) == "finished" and not list(self.directory.rglob(".*.part"))
        assert not (self.directory / LOCK_NAME).exists()
        shutil.rmtree(self.directory)
        self.ended += 1


def kill_often(killer: Killer, kills: int) -> None:
    while killer.kills < kills:
        killer.once()
    run(killer.make(killer.directory, resume=killer.directory.exists()))
    killer.look()


@pytest.fixture
def killer(make, processes, undisturbed, length, tmp_path):
    def of(seed: int) -> Killer:
        return Killer(make, processes, tmp_path, undisturbed, length, random.Random(seed))

    return of


def test_killed_five_times(killer):
    kill_often(killer(5), 5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_a_hundred_times(killer):
    found = killer(100)
    began = time.monotonic()
    kill_often(found, 100)
    print(f"{found.kills} kills in {time.monotonic() - began:.0f} s, over {found.ended} runs; rounds done: {found.at}")
    assert len(set(found.at)) >= 5, "they came before, between and after the rounds"
