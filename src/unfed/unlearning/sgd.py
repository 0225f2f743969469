"""Plain SGD for clients whose single steps matter, whatever the run trains with."""

from __future__ import annotations

from typing import Any


def plain_sgd(lr: float, clip: float, **options: Any) -> dict[str, Any]:
    """``Work.args`` of SGD at a constant rate, whatever the run trains with; ``clip`` 0 does not clip. Further
    options are arguments of the optimizer."""
    return {
        "optim": "sgd",
        "optim_args": ",".join(f"{k}={v}" for k, v in options.items()) or None,
        "learning_rate": lr,
        "lr_scheduler_type": "constant",
        "lr_scheduler_kwargs": {},
        "warmup_epochs": 0.0,
        "warmup_ratio": 0.0,
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": clip,
    }
