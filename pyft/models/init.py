"""Initial values of a new head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

STD = 0.02
INIT = f"truncated normal with std {STD}, bias 0"


def init_linear(layer: Any, seed: int) -> None:
    """Fill `layer.weight` (truncated normal, std 0.02, cut at two std) and `layer.bias` (0), in place.

    Drawn on the CPU in float32, so that a seed gives the same values on every device and dtype; torch's own random
    state is neither read nor moved.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        values = torch.empty(layer.weight.shape, dtype=torch.float32)
        nn.init.trunc_normal_(values, std=STD, a=-2 * STD, b=2 * STD, generator=generator)
        layer.weight.copy_(values)
        if layer.bias is not None:
            layer.bias.zero_()
