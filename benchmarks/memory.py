"""How peak memory grows with the number of clients, in adapters for each further client.

Every point is a process of its own: one federated run with a checkpoint each round, measured from after the model was
made and trained one step (so that loading does not hide it). ``finetune`` trains all clients; ``NPO`` lets every client
unlearn first, which needs a frozen reference policy. ``GradDiff`` is the same without one: beside it, at the smallest
number of clients, stands what NPO's reference costs (a second model would cost all of the base weights again).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from process import peaks, reset_peak
from rounds import Recipe, federated_run, make_clients, make_schedule
from setting import SHAPES, Shape, arguments, make_local, make_model, record

from unfed.models.adapter import snapshot

GROWING: tuple[Recipe, ...] = ("finetune", "NPO")
RECIPES: tuple[Recipe, ...] = (*GROWING, "GradDiff")
ROWS = 4


def peak_of(shape: Shape, clients: int, recipe: Recipe) -> dict[str, int]:
    """Peak bytes of one run with so many clients, in this process; and the adapter's own size."""
    local = make_local(make_model(shape), shape, per_device_train_batch_size=2)
    with tempfile.TemporaryDirectory() as directory:
        warm = make_clients(shape, 1, 2)
        federated_run(local, warm, make_schedule(recipe, list(warm), 1), Path(directory) / "warm")
        data = make_clients(shape, clients, ROWS)
        reset_peak()
        federated_run(local, data, make_schedule(recipe, list(data), 1), Path(directory) / "run")
    return {**peaks(), "adapter": snapshot(local.model).nbytes}


def growth(counts: list[int], points: list[dict[str, int]], where: str) -> float:
    """Least-squares slope of the peak over the number of clients, in adapters."""
    slope = np.polyfit(counts, [p[where] for p in points], 1)[0]
    return float(slope) / points[0]["adapter"]


def measure(shape: Shape, counts: list[int]) -> dict[str, Any]:
    """Peaks for each number of clients and each recipe, their growth, and NPO's peak over GradDiff's."""
    result: dict[str, Any] = {"clients": counts}
    plain = _in_process_of_its_own(shape, counts[0], "GradDiff")
    for recipe in GROWING:
        points = [_in_process_of_its_own(shape, count, recipe) for count in counts]
        result["adapter_bytes"] = points[0]["adapter"]
        for where in [k for k in points[0] if k != "adapter"]:
            result[f"{recipe}_{where}_peak_bytes"] = [p[where] for p in points]
            result[f"{recipe}_{where}_adapters_per_client"] = growth(counts, points, where)
            if recipe == "NPO":
                result[f"GradDiff_{where}_peak_bytes"] = plain[where]
                result[f"NPO_over_GradDiff_{where}"] = points[0][where] / plain[where]
    return result


def _in_process_of_its_own(shape: Shape, count: int, recipe: Recipe) -> dict[str, int]:
    command = [sys.executable, __file__, "--shape", shape.name, "--one", str(count), recipe]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run all points, or (``--one``) print a single one as JSON."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--one", nargs=2, metavar=("CLIENTS", "RECIPE"), help="one point, in this process")
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    if given.one:
        count, recipe = given.one
        if recipe not in RECIPES:
            parser.error(f"RECIPE is one of {', '.join(RECIPES)}")
        print(json.dumps(peak_of(shape, int(count), recipe)))
    else:
        record("memory", shape.name, measure(shape, given.clients))


if __name__ == "__main__":
    main()
