"""The memory of this process, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path

import torch


def reset_peak() -> None:
    """Forget the peaks so far: of the GPU, and of the process (Linux: 5 into clear_refs resets VmHWM)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peaks() -> dict[str, int]:
    """Peak bytes since :func:`reset_peak`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = {"host": int(status.split("VmHWM:")[1].split()[0]) * 1024}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.max_memory_allocated()
    return found


def resident(kind: str = "VmRSS") -> int:
    """Bytes of this process in memory now; with ``RssShmem`` those that it shares with others and no file backs."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{kind}:")[1].split()[0]) * 1024
