"""Tensors handed to the compiled core without the dispatcher's cost for each tensor in a list."""

from __future__ import annotations

from typing import Any

import torch


def handles_available() -> bool:
    """Whether this torch offers the call; without it, the ordinary op is used."""
    return hasattr(torch._C, "_aoti") and hasattr(torch._C._aoti, "unsafe_alloc_void_ptrs_from_tensors")


def tensor_handles(tensors: list[torch.Tensor]) -> list[Any]:
    """One new reference per tensor, as capsules that exactly one call into the core must take over."""
    return torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
