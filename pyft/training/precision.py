"""fp32 or bf16: what the device has, and what a short probe shows."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pyft.errors import ConfigError

# bf16 costs digits, so it has to earn them.
_LEAST_SPEEDUP = 1.1


def bf16_hardware(device: torch.device) -> str | None:
    """The name of what computes bf16 on `device` ("AMX", "AVX-512 BF16", "GPU"), or None where it would be emulated."""
    if device.type == "cpu":
        if _cpu_has("_is_amx_tile_supported"):
            return "AMX"
        return "AVX-512 BF16" if _cpu_has("_is_avx512_bf16_supported") else None
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "GPU" if major >= 8 or torch.version.hip is not None else None
    return None


def _cpu_has(name: str) -> bool:
    test = getattr(torch.cpu, name, None)
    return bool(test()) if test is not None else False


def choose_precision(
    requested: str, device: torch.device | str, probe: Callable[[str], None] | None = None, *, batches: int = 1000
) -> tuple[str, str | None]:
    """The precision of a stage and, where there was something to decide, the reason in one line.

    Args:
        requested: "fp32", "bf16" or "auto".
        device: where the model is.
        probe: runs one forward and backward in the precision it is given, leaving no trace;
            "auto" times it and takes bf16 where that is at least 1.1 times faster. Without it "auto" is fp32.
        batches: that the choice is for; the probe takes about a fiftieth of their time, half a second at most.

    Raises:
        ConfigError: an unknown precision.
    """
    if requested not in ("fp32", "bf16", "auto"):
        raise ConfigError(f"precision must be 'fp32', 'bf16' or 'auto', not {requested!r}")
    device = torch.device(device)
    if requested == "fp32":
        return "fp32", None
    hardware = bf16_hardware(device)
    if requested == "bf16":
        return "bf16", None if hardware else f"bf16 is emulated on this {device.type}: fp32 is likely faster"
    if hardware is None:
        return "fp32", f"fp32: this {device.type} has no bf16 units"
    if probe is None:
        return "fp32", None
    fp32, bf16 = _time_both(probe, device, batches)
    ratio = f"bf16 ({hardware}) takes {bf16 * 1e3:.3g} ms a batch, fp32 {fp32 * 1e3:.3g} ms"
    if fp32 >= _LEAST_SPEEDUP * bf16:
        return "bf16", f"bf16: {ratio}"
    return "fp32", f"fp32: {ratio}"


def _time_both(probe: Callable[[str], None], device: torch.device, batches: int) -> tuple[float, float]:
    """Shortest seconds of one fp32 and one bf16 probe; alternating, so that a busy machine hits both alike."""
    best = {"fp32": float("inf"), "bf16": float("inf")}
    for precision in best:
        probe(precision)
    begin = time.perf_counter()
    for turn in range(20):
        for precision in best:
            start = time.perf_counter()
            probe(precision)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            best[precision] = min(best[precision], time.perf_counter() - start)
        if turn >= 1 and time.perf_counter() - begin > min(0.5, 0.02 * batches * best["fp32"]):
            break
    return best["fp32"], best["bf16"]
