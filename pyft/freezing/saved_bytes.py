"""How much memory a forward pass keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(forward: Callable[[], Any], model: nn.Module | None = None) -> int:
    """Bytes that one call of `forward` keeps for the backward pass: whole storages, each once.

    Gradients are enabled during the call. Tensors that a compiled graph keeps are counted at its border only.

    Args:
        forward: runs the model; what it returns is dropped.
        model: its parameters and buffers do not count.

    >>> layer = nn.Linear(10, 20)
    >>> saved_bytes(lambda: torch.relu(layer(torch.ones(5, 10))), layer)  # input 5 x 10, output 5 x 20, 4 bytes each
    600
    """
    own = set()
    if model is not None:
        own = {_key(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    # The storages are held until all are counted, so that no memory is given out twice.
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            seen.setdefault(_key(tensor), tensor.untyped_storage())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for key, storage in seen.items() if key not in own)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
