"""The bits of tensors, so that a change can be proven or excluded later."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fingerprint:
    """Shape, dtype and SHA-256 of a tensor's values in logical order: memory format and device do not count."""

    shape: tuple[int, ...]
    dtype: str
    digest: bytes


def fingerprint(tensor: torch.Tensor) -> Fingerprint:
    """The fingerprint of a tensor of any shape, dtype and device. NaN payloads and the sign of zero count.

    >>> fingerprint(torch.tensor([0.0])) == fingerprint(torch.tensor([-0.0]))
    False
    """
    values = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    # reshape first: a tensor without dimensions cannot be viewed as bytes.
    digest = hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().data).digest()
    return Fingerprint(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), digest)


def fingerprints(tensors: Mapping[str, torch.Tensor]) -> dict[str, Fingerprint]:
    """The fingerprint of each tensor by name; a tensor with several names is read once."""
    known: dict[int, Fingerprint] = {}
    return {
        name: known[id(tensor)] if id(tensor) in known else known.setdefault(id(tensor), fingerprint(tensor))
        for name, tensor in tensors.items()
    }


def difference(before: Fingerprint, now: Fingerprint) -> str | None:
    """How a tensor differs from what it was, in words; None when no bit does."""
    if before.dtype != now.dtype:
        return f"its dtype is {now.dtype}, it was {before.dtype}"
    if before.shape != now.shape:
        return f"its shape is {now.shape}, it was {before.shape}"
    return "its values have changed" if before.digest != now.digest else None
