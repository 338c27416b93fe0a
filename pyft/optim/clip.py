"""Gradient clipping by norm, for any optimizer."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable

import torch

from pyft.ops.grad_norm import grad_norm


def clip_coefficient(total_norm: float, max_norm: float) -> float:
    """torch's factor min(1, max_norm / (total_norm + 1e-6)), rounded in fp32 as `torch.nn.utils` rounds it.

    >>> clip_coefficient(0.5, 1.0)
    1.0
    """
    norm = _fp32(total_norm)
    if not math.isfinite(norm):
        return min(1.0, max_norm / (total_norm + 1e-6))
    # torch divides a number by a tensor as reciprocal times number, each rounded; float64 between is wide enough.
    return min(1.0, _fp32(_fp32(1.0 / _fp32(norm + _fp32(1e-6))) * _fp32(max_norm)))


def _fp32(value: float) -> float:
    # NumPy's scalars take ten times as long, which a small model's step would feel.
    return ctypes.c_float(value).value


def total_norm(grads: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    """The p-norm of all elements of `grads` together, () float32, or float64 if any gradient is.

    Accumulated in float64, so neither fp16 nor fp32 overflows on the way. p = 2 runs on the core.
    """
    if norm_type == 2.0:
        return grad_norm(grads)
    wide = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    device = grads[0].device
    # An empty tensor has no largest element; it adds nothing to any norm.
    norms = [
        torch.linalg.vector_norm(grad, norm_type, dtype=torch.float64).to(device) for grad in grads if grad.numel() > 0
    ]
    if not norms:
        return torch.zeros((), dtype=wide, device=device)
    return torch.linalg.vector_norm(torch.stack(norms), norm_type).to(wide)


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Scale gradients in place so that their total norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_`.

    Differs where torch destroys gradients: norms are accumulated in float64 and returned in fp32 at least, so large
    fp16 gradients are not zeroed; when the norm is NaN or inf the gradients are left as they are, for the caller to
    look at; and where nothing has to be clipped nothing is written.

    Args:
        parameters: a tensor or several; those without a gradient are passed over. Any dtype, layout, device.
        max_norm: largest allowed norm, 0 or more.
        norm_type: p of the p-norm, `float("inf")` for the largest absolute value. Default: 2.0.
        error_if_nonfinite: raise if the total norm is NaN or inf. Default: False.

    Returns:
        () total norm before clipping, float32 or, where it needs the range, float64; 0 if there is no gradient.

    Raises:
        ValueError: `max_norm` is negative or NaN, or `norm_type` is not above 0.
        TypeError: a gradient is sparse or complex.
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set. Nothing was scaled.

    >>> p = torch.nn.Parameter(torch.zeros(2))
    >>> p.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([p], max_norm=1.0)
    tensor(5.)
    >>> p.grad
    tensor([0.6000, 0.8000])
    """
    if not float(max_norm) >= 0.0:
        raise ValueError(f"max_norm must be 0 or more, got {max_norm}")
    if not float(norm_type) > 0.0:
        raise ValueError(f"norm_type must be above 0, got {norm_type}")
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    norm = total_norm(grads, float(norm_type))
    if math.isinf(float(norm)):
        # Finite gradients can have a norm that only float64 holds.
        norm = total_norm([grad.double() for grad in grads], float(norm_type))
    value = float(norm)
    if not math.isfinite(value):
        if error_if_nonfinite:
            raise RuntimeError(
                f"the total norm of order {norm_type} of the gradients is {value}, so they cannot be clipped; pass "
                "error_if_nonfinite=False to go on with the gradients unscaled"
            )
        return norm
    coef = clip_coefficient(value, float(max_norm))
    if coef < 1.0:
        for grad in grads:
            grad.mul_(coef)
    return norm
