"""The machine during a measurement: how much memory a process holds, what the processors were busy with, what they are.

Linux says all of it in /proc. Elsewhere, what is not known is None and said so in the results.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEGABYTE = 1e6


def memory(field: str = "VmRSS") -> float:
    """Resident memory of this process in bytes; "VmHWM" is its peak since `forget_peak` or its start."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return float(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def forget_peak() -> bool:
    """Let the peak start again from what is held now, so that reading a model from disk is not part of it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def busy_seconds() -> float | None:
    """Processor seconds spent since the machine started, by everything, over all cores."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    _, user, nice, system, _, _, interrupts, soft, *_ = stat.read_text().splitlines()[0].split()
    ticks = sum(map(int, (user, nice, system, interrupts, soft)))
    return ticks / os.sysconf("SC_CLK_TCK")


def others_share(seconds: float = 2.0) -> float | None:
    """The share of all cores that is busy while this process sleeps."""
    before = busy_seconds()
    time.sleep(seconds)
    after = busy_seconds()
    if before is None or after is None:
        return None
    return (after - before) / seconds / (os.cpu_count() or 1)


def wait_until_quiet(limit: float, patience: float, say: Callable[[str], None]) -> float | None:
    """Wait until other processes take less than `limit` of the cores, `patience` seconds at most.

    Returns the share at the end; None where it is not known.
    """
    end = time.monotonic() + patience
    told = False
    while True:
        share = others_share()
        if share is None or share < limit or time.monotonic() > end:
            return share
        if not told:
            say(f"other processes take {share:.0%} of the cores; waiting up to {patience:.0f} s for a quiet machine")
            told = True
        time.sleep(5)


def gemm_peak(dtype: str = "bfloat16", size: int = 2048, rounds: int = 8) -> float:
    """FLOP/s of a square product, the best of a few rounds."""
    import torch

    left, right = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def describe() -> dict[str, Any]:
    """The machine in plain data: processor, cores, memory, the instructions that matter, the system."""
    found: dict[str, Any] = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            (part.strip() for part in line.split(":", 1)) for line in cpuinfo.read_text().splitlines() if ":" in line
        )
        flags = set(fields.get("flags", fields.get("Features", "")).split())
        known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")
        found["processor"] = fields.get("model name", platform.processor())
        found["instructions"] = [name for name in known if name in flags]
    else:
        found["processor"] = platform.processor()
    with contextlib.suppress(ValueError, OSError):
        found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return found
