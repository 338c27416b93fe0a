"""How much memory may still be used."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free_memory() -> int:
    """Bytes that may still be allocated: of the machine, or of the container if that is less."""
    limits = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    limit, used = (" ".join(_lines(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        limits.append(int(limit) - int(used))
    if not limits and hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return max(min(limits, default=1 << 30), 0)


def free_device_memory(device: torch.device) -> int:
    """Bytes that may still be allocated on a CUDA device: what the driver has, and what torch keeps for itself; else 0.

    Args:
        device: any device.
    """
    if device.type != "cuda":
        return 0
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def resident_memory() -> int | None:
    """Bytes of memory that this process holds now; None where the system does not say."""
    held = [int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith("VmRSS:")]
    return held[0] if held else None


def peak_memory() -> int | None:
    """The most bytes that this process has held since it began; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
