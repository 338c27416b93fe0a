"""Tensors from the host to a device without waiting for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def to_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`tensor.to(device, dtype)`; from the CPU to a GPU by way of pinned memory, so that the host goes on at once.

    torch keeps the pinned memory until the copy is done, and uses it again.

    Args:
        tensor: any shape and dtype.
        device: where it is wanted.
        dtype: in which; None: its own. Conversion happens on `device`.
    """
    crosses = device.type == "cuda" and tensor.device.type == "cpu"
    if crosses and tensor.numel():
        tensor = tensor if tensor.is_pinned() else tensor.pin_memory()
        tensor = tensor.to(device, non_blocking=True)
    return tensor.to(device, dtype)
