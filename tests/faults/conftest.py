"""A small run with everything that could differ after it was cut off, and sites in this process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from fault_fixtures import Here, delicate, processes  # noqa: F401 - a fixture

from unfed.app.runs import run
from unfed.base.artifacts import write_json
from unfed.config.schema import EngineConfig, HistoryConfig, RunConfig

ROUNDS = 6


@pytest.fixture(scope="session")
def make(small_run, finetuned):
    """A delicate run with a history of rounds and updates."""

    def config(directory: Path, **changes) -> RunConfig:
        kept = {
            "history": HistoryConfig(("rounds", "updates")),
            "engine": EngineConfig(keep_checkpoints=2, keep_every=3),
        }
        return dataclasses.replace(delicate(small_run, finetuned, directory, ROUNDS, **kept), **changes)

    return config


@pytest.fixture(scope="session")
def undisturbed(make, tmp_path_factory) -> Path:
    """The directory of that run, left alone."""
    return run(make(tmp_path_factory.mktemp("undisturbed") / "run")).directory


SITES = ("north", "south", "west")


@pytest.fixture(scope="session")
def site_rows(tmp_path_factory, small_data) -> dict[str, Path]:
    """Six rows for each of three sites."""
    rows = (small_data / "tofu" / "full.json").read_text(encoding="utf-8").splitlines()
    roots = {}
    for name, own in zip(SITES, (rows[:6], rows[6:12], rows[12:]), strict=True):
        roots[name] = tmp_path_factory.mktemp(name)
        (roots[name] / "tofu").mkdir()
        (roots[name] / "tofu" / "full.json").write_text("\n".join(own) + "\n", encoding="utf-8")
    return roots


@pytest.fixture(scope="session")
def site_file(site_rows, small_base):
    """What a site has and permits; keywords replace what stands here."""
    from unfed.config.site import SiteFile

    def made(name: str, **other):
        return dataclasses.replace(SiteFile(str(site_rows[name]), str(small_base), ("locuslab/TOFU",)), **other)

    return made


@pytest.fixture
def sites(site_file):
    """A link to three sites in this process."""
    from unfed.app.site import Site

    return Here({name: Site(name, site_file(name)) for name in SITES})


@pytest.fixture
def across(small_run, tmp_path):
    """A fine-tuning of two rounds across the sites of a link: its directory."""
    from unfed.app.network_fleet import NetworkFleet

    def go(link, name="net", timeout=120.0, **changes) -> Path:
        config = small_run("finetune", tmp_path / name, engine=EngineConfig("nvflare", timeout=timeout), **changes)
        return run(config, NetworkFleet(link, SITES)).directory

    return go


@pytest.fixture
def in_one_place(small_run, site_rows, tmp_path):
    """The same fine-tuning in this process, with rows dealt as the sites have them."""
    from unfed.config.schema import PartitionConfig

    def go(name="here", **changes) -> Path:
        manifest = tmp_path / f"{name}.json"
        write_json(manifest, {n: own_ids(root) for n, root in site_rows.items()})
        partition = PartitionConfig(manifest=str(manifest))
        return run(small_run("finetune", tmp_path / name, partition=partition, **changes)).directory

    return go


def own_ids(root: Path) -> list[str]:
    """The ids of a site's rows."""
    from unfed.data.datasets import local_rows
    from unfed.data.spec import DatasetSpec

    return [str(e["id"]) for e in local_rows(DatasetSpec("locuslab/TOFU", "full"), str(root))]
