"""The benchmarks run, do the same work on both sides, and count arithmetic correctly. Their figures are not tested."""

import argparse
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
HERE = ("setting", "process", "rounds", "steps", "overhead", "memory", "gpu", "passes", "evaluation", "server")


@pytest.fixture(scope="module")
def bench():
    """The modules of ``benchmarks/``, imported as its scripts import one another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in HERE}
    for name in HERE:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tiny(bench):
    return bench["setting"].SHAPES["tiny"]


def test_rows_have_the_lengths_of_tofu(bench, tiny):
    rows = bench["setting"].make_rows(tiny, 2000, "lengths")
    prompts, answers = (np.array([f(r) for r in rows]) for f in (lambda r: r.prompt_len, lambda r: r.num_label_tokens))
    assert prompts.mean() == pytest.approx(47.9, abs=0.5)
    assert prompts.std() == pytest.approx(5.8, abs=0.5)
    assert answers.mean() == pytest.approx(36.7, abs=1)
    assert answers.std() == pytest.approx(12.0, abs=1.5)


def test_overhead_does_the_same_steps_on_both_sides(bench, tiny):
    found = bench["overhead"].measure(tiny, repeats=1)
    assert found["steps"] == 3 * tiny.rows_per_client // tiny.batch_size
    assert found["federated_over_plain"] > 0


def test_steps_count_all_tokens(bench, tiny):
    found = bench["steps"].measure(tiny, repeats=1, batches=4)
    rows = bench["setting"].make_rows(tiny, 4 * tiny.batch_size, "steps")
    assert found["tokens"] == sum(len(r) for r in rows) > found["label_tokens"]
    assert found["our_tokens_per_second"] == pytest.approx(found["tokens"] / found["our_seconds"][0])


def test_growth_is_a_slope_in_adapters(bench):
    points = [{"host": 1000 + 30 * n, "adapter": 20} for n in (2, 4, 16)]
    assert bench["memory"].growth([2, 4, 16], points, "host") == pytest.approx(1.5)


def test_memory_of_one_point_in_a_process_of_its_own(bench, tiny):
    point = bench["memory"]._in_process_of_its_own(tiny, 2, "NPO")
    assert point["host"] > 50e6
    # 2 layers; rank 16; for q, o, gate, up, down and k, v (width 32): r * (in + out), in float32.
    per_layer = 16 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)
    assert point["adapter"] == 2 * per_layer * 4


def test_npos_reference_is_compared_with_a_run_that_has_none(bench, tiny, monkeypatch):
    """Peaks of 100 bytes a client for plain training, 110 with NPO, 108 without its reference."""
    per_client = {"finetune": 100, "NPO": 110, "GradDiff": 108}
    fake = lambda shape, count, recipe: {"host": per_client[recipe] * count, "adapter": 10}  # noqa: E731
    monkeypatch.setattr(bench["memory"], "_in_process_of_its_own", fake)
    found = bench["memory"].measure(tiny, [2, 4])
    assert found["NPO_over_GradDiff_host"] == pytest.approx(220 / 216)
    assert found["NPO_host_adapters_per_client"] == pytest.approx(11)


def test_needed_flops_by_hand(bench, tiny):
    row = bench["setting"].make_rows(tiny, 1, "flops")
    tokens, labels = len(row[0]), row[0].num_label_tokens
    frozen = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    adapter = 2 * 16 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)
    expected = tokens * (4 * frozen + 6 * adapter) + labels * 4 * 512 * 64 + 6 * tokens**2 * 64 * 2
    assert bench["gpu"].needed_flops(tiny, row) == expected


def test_gpu_says_that_there_is_no_device(bench, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert bench["gpu"].main() == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_time_within_a_part_counts_once(bench, monkeypatch):
    now = iter([0.0, 0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    monkeypatch.setattr("time.process_time", lambda: 0.0)
    clock = bench["evaluation"].Clock()  # 0
    with clock.part("outer"), clock.part("inner"):  # 0 and 1: other has 0 s, outer 1 s
        pass  # 3: inner has 2 s; 6: outer has 3 s more
    clock._charge()  # 10
    assert clock.wall == {"other": 4.0, "outer": 4.0, "inner": 2.0}


def test_both_evaluations_do_the_same_work(bench, shared_dir, monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: None)
    model = str(shared_dir / "golden" / "models" / "tiny")
    found = {}
    for side in bench["evaluation"].SIDES:
        given = argparse.Namespace(model=model, data=str(shared_dir / "data"), forget="forget01", limit=3, side=side,
                                   metrics="all", new_tokens=8, threads=1, share=1.0)  # fmt: skip
        found[side] = bench["evaluation"].one(given)
    for side in ("one_pass_per_metric", "shared_by_name"):
        agreed = bench["evaluation"].agreement(found["unfed"], found[side])
        assert agreed["compared"] == len(found[side]["values"]) > 30
        assert agreed["texts"] == 8 * 3 and agreed["texts_that_differ"] == 0
    assert found["unfed"]["peak_bytes"] > found["unfed"]["loaded_bytes"] > 50e6
    parts = found["unfed"]["seconds_by_part"]
    assert set(parts) >= {p for _, _, p in bench["evaluation"].PARTS} - {"importing rouge-score"}
    assert sum(parts.values()) == pytest.approx(found["unfed"]["seconds"])
    found["shared_by_name"]["values"]["forget_Q_A_Prob"] += 0.01
    with pytest.raises(RuntimeError, match=r"not the same numbers: .'forget_Q_A_Prob'"):
        bench["evaluation"].agreement(found["unfed"], found["shared_by_name"])


def test_the_server_takes_in_every_update_on_all_sides(bench, tiny, tmp_path):
    server = bench["server"]
    files = server.write_adapters(tiny, tmp_path, 2)
    # 2 layers, rank 8, q, o (64, 64), k, v (64, 32), gate, up (64, 128) and down (128, 64), float32
    size = 4 * 2 * 8 * (2 * 128 + 2 * 96 + 3 * 192)
    for side in server.SIDES:
        found = server.one_side(side, files, 5)
        assert found["adapter"] == size and found["seconds"] > 0
