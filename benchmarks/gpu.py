"""All of it on a CUDA device: a Llama-3.2-3B shape with random weights in bf16, tokens a second and share of peak.

The peak is measured too: the best of a few large bf16 matrix products on the same device. The share counts the
arithmetic that training these tokens needs (:func:`needed_flops`), so padding and everything besides the products
count against it.
"""

from __future__ import annotations

import sys
from typing import Any

import memory
import overhead
import steps
import torch
from setting import SHAPES, Shape, arguments, make_model, make_rows, record, timed
from torch import nn

from unfed.data.chat import EncodedExample


def measured_peak(size: int = 8192, repeats: int = 20) -> float:
    """The best rate of a square bf16 matrix product on this device, in FLOP/s."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def products() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    return max(2 * size**3 * repeats / timed(products) for _ in range(4))


def needed_flops(shape: Shape, rows: list[EncodedExample]) -> float:
    """Multiplications and additions of training a LoRA adapter on ``rows`` once.

    A frozen matrix of n weights costs 2n a token forwards and 2n backwards (its own gradient is not needed), a factor
    of the adapter 2n and 4n. The head counts on labelled tokens only, causal attention on half of its square.
    """
    model = make_model(shape, device="meta")
    linear = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    adapter = sum(v for n, v in linear.items() if ".lora_" in n)
    head = sum(v for n, v in linear.items() if n.endswith("lm_head"))
    frozen = sum(linear.values()) - adapter - head
    width = shape.sizes["num_attention_heads"] * shape.sizes.get(
        "head_dim", shape.sizes["hidden_size"] // shape.sizes["num_attention_heads"]
    )
    tokens, labels = sum(len(r) for r in rows), sum(r.num_label_tokens for r in rows)
    squares = sum(len(r) ** 2 for r in rows)
    attention = 6 * squares * width * shape.sizes["num_hidden_layers"]
    return float(tokens * (4 * frozen + 6 * adapter) + labels * 4 * head + attention)


def measure(shape: Shape, repeats: int, clients: list[int]) -> dict[str, Any]:
    """Every benchmark of this folder on the GPU, and the share of peak of our training steps."""
    peak = measured_peak()
    speed = steps.measure(shape, repeats)
    torch.cuda.empty_cache()
    rate = needed_flops(shape, make_rows(shape, speed["rows"], "steps")) / min(speed["our_seconds"])
    federation = overhead.measure(shape, repeats)
    torch.cuda.empty_cache()
    return {
        "peak_tflops": peak / 1e12,
        "training_tflops": rate / 1e12,
        "share_of_peak": rate / peak,
        **speed,
        **{f"overhead_{k}": v for k, v in federation.items()},
        **{f"memory_{k}": v for k, v in memory.measure(shape, clients).items()},
    }


def main() -> int:
    """Measure, or say that there is no device to measure on."""
    parser = arguments(__doc__ or "", shape="llama-3.2-3b")
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 8, 16])
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured", file=sys.stderr)
        return 2
    record("gpu", given.shape, measure(SHAPES[given.shape], given.repeats, given.clients))
    return 0


if __name__ == "__main__":
    sys.exit(main())
