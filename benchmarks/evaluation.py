"""How long an evaluation takes, where the time goes, and how much memory it needs.

``tofu``: the full-size TOFU evaluation (forget10 with all its splits) on one core, once with the default metrics and
once with all of them, each in a process of its own; seconds by part, memory after loading and at the peak.

``suite``: one forget split's suite beside a straightforward implementation (``passes.py``), once with one pass for each
metric and once with results shared by name; one process after the other, in float32. All give the same numbers, or the
benchmark fails.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from passes import OnePassPerMetric
from process import peaks, reset_peak, resident
from transformers import AutoModelForCausalLM, AutoTokenizer

from unfed.base.types import Example
from unfed.data.benchmarks import tofu_splits
from unfed.data.chat import Template
from unfed.data.datasets import load_rows
from unfed.evaluation import collect, runner, scoring
from unfed.evaluation.suites import SuiteConfig
from unfed.evaluation.tofu import TOFU
from unfed.metrics import overlap
from unfed.models.generate import Decoding

TEMPLATE = Template(system_prompt="You are a helpful assistant.")
MIB = 1 << 20
SIDES = ("unfed", "one_pass_per_metric", "shared_by_name")
PARTS: tuple[tuple[Any, str, str], ...] = (
    (collect, "encode_pairs", "tokenising"),
    (collect, "encode_prompts", "tokenising"),
    (scoring, "collate", "building batches"),
    (scoring, "collate_shared", "building batches"),
    (scoring, "labelled_logits", "scoring forwards"),
    (scoring, "shared_logits", "scoring forwards"),
    (scoring, "_logps", "log-softmax and details"),
    (scoring, "_details", "log-softmax and details"),
    (collect, "generate", "generation"),
    (collect, "gradient_norms", "gradient norms"),
    (overlap, "_scorer", "importing rouge-score"),
    (overlap, "rouge_score", "ROUGE"),
    (runner, "compute", "statistics"),
    (runner, "write_results", "writing files"),
)
"""Functions by the module that calls them, and the part that their time counts to (a call within a call counts to the
inner one)."""


class Clock:
    """Seconds by part, on the wall and of the CPU."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._stack = ["other"]
        self._since = (time.perf_counter(), time.process_time())

    def _charge(self) -> None:
        now = (time.perf_counter(), time.process_time())
        for kept, began, ended in zip((self.wall, self.cpu), self._since, now, strict=True):
            kept[self._stack[-1]] = kept.get(self._stack[-1], 0.0) + ended - began
        self._since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge what happens here to ``name``."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def watched(self, work: Callable[..., Any], name: str) -> Callable[..., Any]:
        """``work`` with its time charged to ``name``; of an iterator, the time that each step takes."""

        @functools.wraps(work)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                found = work(*args, **kwargs)
            return self._steps(found, name) if isinstance(found, Iterator) else found

        return call

    def _steps(self, found: Iterator[Any], name: str) -> Iterator[Any]:
        while True:
            with self.part(name):
                value = next(found, self)
            if value is self:
                return
            yield value

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch all :data:`PARTS` within the block, and count from its beginning."""
        real = [(module, name, getattr(module, name)) for module, name, _ in PARTS]
        for module, name, part in PARTS:
            setattr(module, name, self.watched(getattr(module, name), part))
        self._since = (time.perf_counter(), time.process_time())
        try:
            yield
            self._charge()
        finally:
            for module, name, work in real:
                setattr(module, name, work)


def metrics_of(which: str) -> tuple[str, ...]:
    """``default`` (an empty list) or ``all``: every metric but the one that asks a classifier of the hub."""
    return tuple(m for m in TOFU.metrics if m != "forget_Q_A_gibberish") if which == "all" else ()


def read(given: argparse.Namespace) -> tuple[Any, Any, dict[str, Sequence[Example]]]:
    """Model (float32), tokenizer, and rows by split."""
    rows: dict[str, Sequence[Example]] = {
        split: load_rows(where.data, given.data)
        for split, where in tofu_splits("locuslab/TOFU", given.forget, limit=given.limit).items()
    }
    rows = {split: own[: math.ceil(len(own) * given.share)] for split, own in rows.items()}
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(given.model), rows


def one(given: argparse.Namespace) -> dict[str, Any]:
    """Evaluate in this process, with Unfed or (``given.side``) the straightforward way."""
    torch.set_num_threads(given.threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    model, tokenizer, rows = read(given)
    loaded = resident()
    reset_peak()
    decoding = Decoding(max_new_tokens=given.new_tokens)
    clock = Clock()
    with clock.watching():
        if given.side == "unfed":
            suite = SuiteConfig(metrics=metrics_of(given.metrics), decoding=decoding)
            result = runner.evaluate(model, tokenizer, TEMPLATE, suite, rows)
            with tempfile.TemporaryDirectory() as directory:
                runner.write_results(result, directory)
            values = result.summary()
            texts = {
                n: [r["generation"] for r in s.per_example or ()] for n, s in result.scores.items() if "ROUGE" in n
            }
        else:
            shared = given.side == "shared_by_name"
            plain = OnePassPerMetric(model, tokenizer, TEMPLATE, rows, decoding.max_new_tokens, shared)
            values = plain.evaluate(metrics_of(given.metrics))
            texts = plain.texts
    return {
        "seconds": sum(clock.wall.values()),
        "cpu_seconds": sum(clock.cpu.values()),
        "seconds_by_part": clock.wall,
        "cpu_seconds_by_part": clock.cpu,
        "loaded_bytes": loaded,
        "peak_bytes": peaks()["host"],
        "values": values,
        "texts": texts,
    }


def in_process_of_its_own(given: argparse.Namespace, side: str, metrics: str) -> dict[str, Any]:
    """:func:`one` in a child process."""
    settings = {"model": given.model, "data": given.data, "side": side, "forget": given.forget, "metrics": metrics,
                "new-tokens": given.new_tokens, "threads": given.threads, "share": given.share,
                "limit": given.limit}  # fmt: skip
    words = [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
    command = [sys.executable, __file__, given.what, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(title: str, found: Mapping[str, Any]) -> None:
    """Print one run: its parts, its sum, its memory."""
    print(f"\n{title}: {found['seconds']:.1f} s, {found['cpu_seconds']:.1f} s of CPU")
    for part, seconds in sorted(found["cpu_seconds_by_part"].items(), key=lambda item: -item[1]):
        print(f"  {part:26} {found['seconds_by_part'][part]:8.2f} s {seconds:8.2f} s of CPU")
    loaded, peak = found["loaded_bytes"] / MIB, found["peak_bytes"] / MIB
    print(f"  memory: {loaded:.0f} MiB after loading, {peak:.0f} MiB at the peak, {peak - loaded:.0f} MiB more")


def agreement(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the values and texts of both sides. Raises ``RuntimeError`` where they are not the same work.

    Probabilities, ratios and ROUGE may differ by 2e-3 for the sake of rounding, and one generated text in fifty (a tie
    between two tokens is decided by the last bit); an AUC moves by a whole pair where two losses are close.
    """
    names = set(theirs["values"])
    if names - set(ours["values"]):
        raise RuntimeError(f"no value of Unfed's for {sorted(names - set(ours['values']))}")
    off = {n: abs(ours["values"][n] - theirs["values"][n]) for n in names}
    scale = {n: max(1.0, abs(theirs["values"][n])) for n in names}
    wrong = {n: d for n, d in off.items() if d > 2e-3 * scale[n]}
    if wrong:
        raise RuntimeError(f"not the same numbers: {wrong}")
    pairs = [(a, b) for n, texts in theirs["texts"].items() for a, b in zip(ours["texts"][n], texts, strict=True)]
    differing = sum(a != b for a, b in pairs)
    if differing > len(pairs) / 50:
        raise RuntimeError(f"{differing} of {len(pairs)} generated texts differ")
    return {"compared": len(names), "largest_difference": max(off.values()), "texts": len(pairs),
            "texts_that_differ": differing}  # fmt: skip


def without_contents(found: Mapping[str, Any]) -> dict[str, Any]:
    """A run for the record: without its texts."""
    return {k: v for k, v in found.items() if k != "texts"}


def measure_tofu(given: argparse.Namespace) -> dict[str, Any]:
    """Default and all metrics."""
    found = {}
    for metrics in ("default", "all"):
        found[metrics] = in_process_of_its_own(given, "unfed", metrics)
        show(f"{metrics} metrics", found[metrics])
    ratio = found["all"]["cpu_seconds"] / found["default"]["cpu_seconds"]
    return {**{k: without_contents(v) for k, v in found.items()}, "all_over_default_cpu_seconds": ratio}


def measure_suite(given: argparse.Namespace) -> dict[str, Any]:
    """Unfed and the straightforward implementation, both ways."""
    found: dict[str, dict[str, Any]] = {}
    for side in SIDES:
        found[side] = in_process_of_its_own(given, side, given.metrics)
        show(side, found[side])
        if side != "unfed":
            print(f"  {found[side]['seconds'] / found['unfed']['seconds']:.2f} times as long as Unfed", flush=True)
    ours = found["unfed"]
    others = [side for side in SIDES if side != "unfed"]
    return {
        **{k: without_contents(v) for k, v in found.items()},
        "agreement": {side: agreement(ours, found[side]) for side in others},
        "times_as_fast": {side: found[side]["seconds"] / ours["seconds"] for side in others},
        "times_as_fast_by_cpu": {side: found[side]["cpu_seconds"] / ours["cpu_seconds"] for side in others},
    }


def main() -> None:
    """Measure, print, keep; or (``--side``) one run, printed as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tofu", "suite"))
    parser.add_argument("--model", required=True, help="a model's directory")
    parser.add_argument("--data", required=True, help="the data root: it holds tofu/")
    parser.add_argument("--forget", default=None, help="default: forget10 for tofu, forget01 for suite")
    parser.add_argument("--limit", type=int, help="rows of each split")
    parser.add_argument("--share", type=float, default=1.0, help="of each split's rows, which keeps their proportions")
    parser.add_argument("--metrics", choices=("default", "all"), default="default", help="of suite")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, help="default: 1 for tofu, all cores for suite")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.forget = given.forget or ("forget10" if given.what == "tofu" else "forget01")
    given.threads = given.threads or (1 if given.what == "tofu" else os.cpu_count() or 1)
    if given.side:
        print(json.dumps(one(given)))
        return
    from setting import record  # it imports training, which must not count to a child's memory

    result = measure_tofu(given) if given.what == "tofu" else measure_suite(given)
    settings = {k: v for k, v in vars(given).items() if k not in {"what", "side", "model", "data"}}
    record(f"evaluation_{given.what}", Path(given.model).name, {"settings": settings, **result})


if __name__ == "__main__":
    main()
