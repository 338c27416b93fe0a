"""A Linear layer whose weight is packed once on the CPU, for weights that stay as they are."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyft.ops.library import LIBRARY, define

PANEL_WIDTH = 16
"""Outputs whose weights lie side by side in a packed weight."""
LEAST_WIDTH = 64
"""A matrix that is narrower either way leaves registers empty: torch's product is the faster one."""

define("pack_linear(Tensor weight) -> Tensor")
define("packed_linear(Tensor input, Tensor packed, Tensor? bias, int outputs) -> Tensor")


def pack_linear_reference(weight: Tensor) -> Tensor:
    """The same as `pack_linear` in PyTorch."""
    missing = -weight.shape[0] % PANEL_WIDTH
    filled = F.pad(weight, (0, 0, 0, missing))
    return filled.view(-1, PANEL_WIDTH, weight.shape[1]).transpose(1, 2).contiguous()


def packed_linear_reference(input: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """The same as `packed_linear` in PyTorch."""
    weight = packed.transpose(1, 2).reshape(-1, packed.shape[1])[:outputs]
    return F.linear(input, weight, bias)


def _pack_fake(weight: Tensor) -> Tensor:
    return weight.new_empty((-(-weight.shape[0] // PANEL_WIDTH), weight.shape[1], PANEL_WIDTH))


def _linear_fake(input: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return input.new_empty((input.shape[0], outputs))


LIBRARY.impl("pack_linear", pack_linear_reference, "CompositeExplicitAutograd")
LIBRARY.impl("packed_linear", packed_linear_reference, "CompositeExplicitAutograd")
torch.library.register_fake("pyft::pack_linear", _pack_fake, lib=LIBRARY)
torch.library.register_fake("pyft::packed_linear", _linear_fake, lib=LIBRARY)


def pack_linear(weight: Tensor) -> Tensor:
    """A copy of a Linear's weight in the order in which `packed_linear` reads it.

    Args:
        weight: (O, N); a transposed view is read as it is.

    Returns:
        (ceil(O / 16), N, 16): the weights of 16 outputs side by side, input by input, filled up with zeros.

    >>> pack_linear(torch.ones(20, 3)).shape
    torch.Size([2, 3, 16])
    """
    fits = 1 in weight.stride() or weight.numel() == 0
    return torch.ops.pyft.pack_linear(weight if fits else weight.contiguous())


def packed_linear(input: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """`F.linear` without gradient, with a weight that `pack_linear` packed.

    The terms of a number are added in the order of inputs, whatever the number of rows and threads is: a row has the
    same bits in every batch.

    Args:
        input: (..., N) float32.
        packed: (ceil(O / 16), N, 16).
        bias: (O,) or None.
        outputs: O.

    Returns:
        (..., O).

    Raises:
        RuntimeError: a gradient is wanted.

    >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> packed_linear(torch.tensor([[1.0, 1.0]]), pack_linear(weight), None, 2)
    tensor([[3., 7.]])
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, packed, bias)):
        raise RuntimeError(
            "packed_linear has no gradient, but input, packed or bias requires one: call it under torch.no_grad(), or "
            "use torch.nn.functional.linear"
        )
    rows = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.ops.pyft.packed_linear(rows, packed, bias, outputs)
    return out.view(*input.shape[:-1], outputs)


def packing_pays() -> bool:
    """Whether this CPU gains: torch's MKL comes near the peak of AVX-512, and stays a fifth below that of AVX2."""
    from pyft.core.loader import load_core

    core = load_core()
    return core is not None and core.cpu_target() == "avx2"
