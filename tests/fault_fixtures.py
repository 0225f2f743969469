"""What the fault tests share: runs in processes that are killed, sites without a network, a look at what they left."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest

from unfed.app.rundir import RUN_FILE
from unfed.base.artifacts import LOCK_NAME, digest_file, read_json
from unfed.config.schema import AggregatorConfig, MethodConfig
from unfed.federated.messages import Message
from unfed.federated.remote import State

KEPT = ("adapter_model.safetensors", "adapter_config.json", "partition.json", "unfed.json")
"""Files of a finished training that must be the same to the byte."""


def digests(directory: Path) -> dict[str, str]:
    """Of a run's files and of what it has kept for later requests to forget."""
    history = sorted((directory / "history").rglob("*.safetensors"))
    files = [*(directory / name for name in KEPT), *history]
    return {str(f.relative_to(directory)): digest_file(f) for f in files}


def story(directory: Path) -> list[dict]:
    """The rounds as recorded, without their times."""
    rounds = read_json(directory / RUN_FILE)["rounds"]
    for record in rounds:
        del record["seconds"]
        for metrics in record["metrics"].values():
            del metrics["seconds"]
    return rounds


def rounds_done(directory: Path) -> int:
    """As far as the names of the checkpoints say."""
    return max((int(d.name[-5:]) for d in (directory / "checkpoints").glob("round_*")), default=0)


def leftovers(directory: Path) -> list[Path]:
    """Locks, and what is half written."""
    return [*directory.rglob(".*.part"), *directory.rglob(LOCK_NAME)]


def until(condition, seconds: float, what: str) -> None:
    """Wait for something that has to come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.01)


def command(config, said: str, largest_file: int | None = None, after_round: int = 0) -> None:
    """What a command does with a configuration, for a process of its own; what it says goes to the file ``said``.

    ``largest_file``: bytes; from the end of round ``after_round`` on the system lets no file become larger.
    """
    import resource

    from unfed.app.runs import run
    from unfed.cli.launch import guarded
    from unfed.federated.rounds import RunKeeper

    with open(said, "wb") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    saved = RunKeeper.save

    def save(keeper, state):
        saved(keeper, state)
        if largest_file is not None and state.round == after_round:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))

    RunKeeper.save = save
    code = guarded(lambda: run(config) and 0)
    sys.stderr.flush()
    raise SystemExit(code)


@pytest.fixture(scope="session")
def processes(repo_root):
    """Starts processes that have everything imported already."""
    before = os.environ.get("PYTHONPATH")
    paths = (str(repo_root / "src"), str(repo_root / "tests"), before)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["unfed.app.runs", "fault_fixtures"])
    context.Process(target=time.sleep, args=(0,)).start()  # the server starts with the first process
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before
    return context


def delicate(small_run, finetuned: Path, directory: Path, rounds: int, **more):
    """The configuration of an unlearning run with all that could differ after a resumption: dropout, a cached reference
    policy and one with its distribution, a server optimizer with state, partial participation, a schedule over the
    whole phase."""
    return small_run(
        "unlearn",
        directory,
        model_args={"pretrained_model_name_or_path": str(finetuned)},
        method=MethodConfig("NPO", {"retain_loss_type": "KL"}),
        aggregator=AggregatorConfig("FedAdam", {"server_lr": 0.01}),
        method_args={"global_rounds": rounds, "fraction_fit": 0.67, "unlearn_epochs": 4},
        args={"per_device_train_batch_size": 2},
        **more,
    )


class Here:
    """A link to sites, of which some work in this process and others in processes of their own, as over a network.

    ``sites``: :class:`unfed.app.site.Site`, or a :class:`unfed.federated.child.Desk` in front of one.
    """

    def __init__(self, sites) -> None:
        self.sites, self.results = dict(sites), {}

    def begin(self, client_id, message):
        data, site = message.pack(), self.sites[client_id]
        if hasattr(site, "begin"):
            ticket = site.begin(data, opening=message.head["do"] == "open")
            return lambda: ticket
        self.results[client_id] = site.answer(Message.unpack(data)).pack()
        return lambda: 0

    def state(self, client_id, ticket, wait):
        if not hasattr(site := self.sites[client_id], "state"):
            return State("done", nbytes=len(self.results[client_id]))
        kind, said = site.state(ticket, wait)
        return State(kind, nbytes=int(said)) if kind == "done" else State(kind, said)

    def answer(self, client_id, ticket, nbytes):
        site = self.sites[client_id]
        return io.BytesIO(site.answer(ticket) if hasattr(site, "begin") else self.results[client_id])
