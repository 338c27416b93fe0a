"""Operators of `torch.ops.pyft`: schema, fake and PyTorch reference; the compiled core adds the fast kernels."""

from pyft.ops.adamw import adamw_
from pyft.ops.grad_norm import grad_norm

__all__ = ["adamw_", "grad_norm"]
