"""A site's part of a run over a network: what it tells of its rows, what it refuses, and its training.

Runs in a process of its own (``python -m unfed.app.site NAME FILE``), which reads messages from its standard input. No
row, no path and no text of an error leaves it, only what is written here to be told.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unfed.app import build, encode
from unfed.app.rundir import versions
from unfed.app.tasks import read_task
from unfed.app.wire import client_end
from unfed.app.worker import Worker, make_client, make_local, read_config
from unfed.base.errors import UnfedError
from unfed.base.types import Example, Split
from unfed.config.schema import RunConfig
from unfed.config.site import SiteFile, read_site_file
from unfed.data.datasets import local_rows
from unfed.data.partition import Partition
from unfed.evaluation.scoring import Pass, score
from unfed.federated.child import serve
from unfed.federated.messages import Message, MessageError
from unfed.federated.store import ClientStore
from unfed.metrics.probability import avg_loss, prob
from unfed.models.adapter import restore, snapshot
from unfed.models.digest import base_facts
from unfed.models.generate import inference
from unfed.models.load import LoadedModel, load_model
from unfed.models.residual import put_residual

log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
SPLITS = ("train", "forget", "retain")
MOST_KEPT = 100
"""Of the last rounds, those of which a site keeps its own tensors at most, whatever a server asks for."""


class TellError(UnfedError):
    """What the server may be told word for word: it names no path, no row and no text of one."""


def site_config(said: Mapping[str, Any], site: SiteFile) -> RunConfig:
    """The run as the server describes it, with the site's own places. ``TellError``: something that it does not permit.

    Places that the server names are not used, whatever they are.
    """
    model = said.get("model")
    args = dict(model.get("model_args") or {}) if isinstance(model, Mapping) else {}
    for key in ("lora_model_path", "base_model_name_or_path", "gguf_file", "revision", "trust_remote_code"):
        args.pop(key, None)
    args |= {"pretrained_model_name_or_path": site.base_model, "device_map": site.device or args.get("device_map")}
    paths = {"root_dir": site.data_dir, "data_dir": site.data_dir, "output_dir": site.data_dir}
    template = model.get("template_args") or {} if isinstance(model, Mapping) else {}
    known = {
        k: said[k]
        for k in ("mode", "seed", "trainer", "method", "wrapper", "privacy", "data", "collator", "wire")
        if k in said
    }
    whole = {**known, "task_name": "site", "model": {"model_args": args, "template_args": template}, "paths": paths}
    config = read_config({k: v for k, v in whole.items() if v is not None})
    config = replace(config, data=replace(config.data, idk=None, alternate=None, exclude=None))
    if config.mode not in site.tasks:
        raise TellError(f"it does not permit {config.mode} (tasks of its unfed.yml)")
    for split in SPLITS:
        spec = getattr(config.data, split)
        if spec is not None and spec.path not in site.datasets:
            raise TellError(f"it does not permit the data set {spec.path!r} (datasets of its unfed.yml)")
        if spec is not None and _NAME.fullmatch(spec.split) is None:
            raise TellError(f"data.{split}.split={spec.split[:80]!r} is no name")
    return config


def read_site_rows(config: RunConfig, site: SiteFile) -> dict[str, list[Example]]:
    """The site's rows by split. A site may have no rows to forget, but some to train on."""
    found = {}
    for split in SPLITS:
        spec = getattr(config.data, split)
        needed = split == "train" or (split == "retain" and config.data.train is None)
        found[split] = [] if spec is None else local_rows(spec, site.data_dir, optional=not needed)
    return found


@dataclass
class Site:
    """One site's side of the messages ``describe``, ``open``, ``fit`` and ``measure``."""

    name: str
    file: SiteFile
    _loaded: LoadedModel | None = None
    _worker: Worker | None = None
    _config: RunConfig | None = None

    def answer(self, message: Message) -> Message:
        """The answer, or the reason that there is none in words that may travel."""
        does: Mapping[str, Callable[[Message], Message]] = {
            "describe": self._describe,
            "open": self._open,
            "fit": self._fit,
            "measure": self._measure,
        }
        try:
            what = message.get("do", str)
            if what not in does:
                raise MessageError(f"there is no task {what[:80]!r}")
            return does[what](message)
        except (TellError, MessageError) as e:
            log.warning("%s refused: %s", self.name, e)
            return Message({"refused": str(e)})
        except Exception as e:
            log.exception("%s failed", self.name)
            return Message({"refused": f"{type(e).__name__}; the site's own log says more"})

    def _describe(self, message: Message) -> Message:
        config = site_config(message.get("config", dict), self.file)
        rows = {split: [e["id"] for e in found] for split, found in read_site_rows(config, self.file).items()}
        return Message({"rows": rows, "versions": versions()})

    def _open(self, message: Message) -> Message:
        """Load the base model, put an adapter of the run's shape on it, encode the rows that the server names."""
        config = site_config(message.get("config", dict), self.file)
        opened = message.states.get("opened")
        if opened is None:
            raise MessageError("the message brings no adapter")
        there = {e["id"]: e for found in read_site_rows(config, self.file).values() for e in found}
        named = message.get("rows", dict)
        rows = build.Rows(*(_chosen(there, named.get(split, [])) for split in SPLITS))
        own = _chosen(there, message.get("own", list))
        args, tokenizer = config.model.model_args, config.model.tokenizer_args
        loaded = load_model(args, tokenizer, trainable=True, seed=config.seed)
        if problems := opened.problems_against(snapshot(loaded.model)):
            raise TellError(f"the run's adapter does not fit its base model: {problems[0]}")
        partition = Partition({self.name: tuple(e["id"] for e in own)}, "site", config.seed, "")
        data = encode.encode_clients(config, loaded, rows, partition)
        run = message.get("run", str)
        if _NAME.fullmatch(run) is None:
            raise MessageError("the message's run is no name")
        place = None if self.file.state is None else Path(self.file.state) / run
        keep = min(message.get("keep", int), MOST_KEPT)
        store = ClientStore(place, keep, every=message.get("every", (int, type(None))))
        client = make_client(config, (loaded, make_local(config, loaded)), data, opened, store)
        self._config, self._loaded = config, loaded
        self._worker = Worker(client, opened, client_end(config, store))
        return Message({"base": base_facts(loaded.model, loaded.tokenizer)})

    def _fit(self, message: Message) -> Message:
        if self._worker is None:
            raise MessageError("no run is open")
        task, _, client = read_task(message, self._worker.opened)
        if client != self.name:
            raise MessageError(f"the task is for {client[:80]!r}")
        work, splits = task.phase.work[client], self._worker.client.data[client].splits
        # Of every kind of row that the work takes: many of one kind do not hide few of another.
        taken: set[Split] = {*work.objective.needs.splits, work.rows}
        if any(len(splits.get(s, ())) < self.file.smallest_share for s in taken):
            raise TellError(f"it does not train on fewer than {self.file.smallest_share} rows (smallest_share)")
        return self._worker.answer(message)

    def _measure(self, message: Message) -> Message:
        """Mean loss and mean probability of the site's answers by split, under the adapter of the message."""
        if self._worker is None or self._loaded is None or self._config is None:
            raise MessageError("no run is open")
        if "measure" not in self.file.tasks:
            raise TellError("it does not permit measure (tasks of its unfed.yml)")
        adapter = message.states.get("adapter")
        if adapter is None or adapter.problems_against(self._worker.opened):
            raise MessageError("the message brings no adapter of the run's")
        restore(self._loaded.model, adapter)
        put_residual(self._loaded.model, message.states.get("residual"))
        given = Pass(self._loaded.model, self._loaded.tokenizer, self._config.model.template_args)
        found: dict[str, dict[str, float]] = {}
        for split in ("train", "forget"):
            rows = self._worker.client.data[self.name].splits.get(split, ())
            if not rows or len(rows) < self.file.smallest_share:
                continue
            with inference(self._loaded.model):
                losses = avg_loss(score(given, rows, [False] * len(rows)))
            told = {"loss": float(losses.mean()), "probability": float(prob(losses).mean())}
            found[split] = {"rows": len(rows), **{k: v for k, v in told.items() if math.isfinite(v)}}
        return Message({"measured": found})


def _chosen(there: Mapping[str, Example], ids: Sequence[Any]) -> tuple[Example, ...]:
    if len(set(ids)) < len(ids):
        raise TellError("the server names a row twice")  # or one row could be made to look like many
    lacking = sum(i not in there for i in ids)
    if lacking:
        raise TellError(f"{lacking} of {len(ids)} rows that the server names are not among its rows any more")
    return tuple(there[i] for i in ids)


def main(argv: Sequence[str]) -> int:
    """``NAME FILE``: serve until the pipe is closed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    name, file = argv
    try:
        site = Site(name, read_site_file(Path(file), SiteFile))
    except UnfedError as e:
        print(f"error: {e}", file=sys.stderr)
        serve(lambda _: Message({"refused": "its unfed.yml cannot be used; its own log says why"}))
        return 2
    serve(site.answer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
