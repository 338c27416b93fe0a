"""What the tests of lean forms share: frozen layers, and torch's own results to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

import pyft


def frozen(module: nn.Module) -> nn.Module:
    """In eval mode, nothing trains, and norms have seen data."""
    for inner in module.modules():
        if isinstance(inner, nn.modules.batchnorm._BatchNorm) and inner.running_mean is not None:
            inner.running_mean.normal_()
            inner.running_var.uniform_(0.5, 2.0)
            if inner.affine:
                nn.init.normal_(inner.weight)
                nn.init.normal_(inner.bias)
    return module.eval().requires_grad_(False)


def with_lean(module: nn.Module, **options: str) -> nn.Module:
    """A copy in lean forms."""
    twin = copy.deepcopy(module)
    pyft.lean(nn.ModuleList([twin, nn.Linear(2, 2).requires_grad_(False)]), **options)
    return twin


def results(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """The output for `x`, and the gradient of `x` for one that depends on the shape alone."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(seed)
    # A product before it: an in-place layer may not write to a leaf, and rounds nothing.
    y = run(leaf * 1.0)
    generator = torch.Generator().manual_seed(y.numel())
    grad = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
    (dx,) = torch.autograd.grad(y, leaf, grad)
    return [y.detach(), dx]


def kept(run: Callable[[torch.Tensor], object], x: torch.Tensor, model: nn.Module) -> int:
    """Bytes kept for backward, those of `x` itself among them where it is kept."""
    inner = x.detach().requires_grad_() * 1.0
    return pyft.saved_bytes(lambda: run(inner), model)


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Equal in every number; NaN equals NaN."""
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )
