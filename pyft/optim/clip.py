"""Gradient clipping by norm, by value and by rows, for any optimizer: drop-ins for `torch.nn.utils`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from pyft.ops.clip import agc_checked_, at_least_zero, clamp_checked_, row_factors, scale_checked_
from pyft.ops.distributed import is_distributed
from pyft.ops.grad_norm import check_gradients, check_norm_type, norm_float64, norm_of_checked, result_dtype
from pyft.optim import shards


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


def coefficient_on_device(total_norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """`clip_coefficient` of a norm, () float32, that is not waited for; 1 where it is not finite."""
    coef = ((total_norm + 1e-6).reciprocal() * max_norm).clamp(max=1.0)
    return torch.where(total_norm.isfinite(), coef, 1.0)


def _fp32(value: float) -> float:
    # NumPy's scalars take ten times as long, which a small model's step would feel.
    return ctypes.c_float(value).value


def _listed(tensors: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


@dataclass
class _Gradients:
    """The gradients that there are, this process's parts of DTensors, which of them the core takes, and the processes
    that they are spread over."""

    grads: list[torch.Tensor]
    takes: list[bool]
    over: shards.Shards | None

    def norm(self, norm_type: float, wide: bool = False) -> torch.Tensor:
        """() p-norm over all processes, as `norm_of_checked`, or `wide`, as `norm_float64`."""
        grads, takes = self.grads, self.takes
        if self.over is not None:
            mine = [i for i, counted in enumerate(self.over.counted) if counted]
            grads, takes = [grads[i] for i in mine], [takes[i] for i in mine]
        norm = norm_float64(grads, norm_type) if wide else norm_of_checked(grads, takes, norm_type)
        if self.over is None:
            return norm
        dtype = torch.float64 if wide else result_dtype(self.grads)
        return self.over.norm(norm, norm_type).to(self.grads[0].device, dtype)


def _gradients_of(params: list[torch.Tensor], by_rows: bool = False) -> _Gradients:
    """The gradients of parameters, which are to be written.

    One that is there twice, as of a parameter given twice, counts once: two threads must not write to it.
    """
    grads = [grad for param in params if (grad := param.grad) is not None]
    if len(set(map(id, grads))) < len(grads):
        grads = list({id(grad): grad for grad in grads}.values())

    def label(k: int) -> str:
        return f"parameters[{next(i for i, param in enumerate(params) if param.grad is grads[k])}].grad"

    for k, grad in enumerate(grads):
        if is_distributed(grad):
            shards.check_placements(grad, label(k))
    over = shards.shards_of(grads, by_rows, label)
    parts = [shards.local(grad) for grad in grads]
    return _Gradients(parts, check_gradients(parts, label, written=True), over)


def _counted(tensor: torch.Tensor) -> torch.Tensor | None:
    by_gradient = isinstance(tensor, torch.nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)
    return tensor.grad if by_gradient else tensor


@torch.no_grad()
def grad_norm(grads_or_parameters: torch.Tensor | Iterable[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """The p-norm of all gradients together, as `torch.nn.utils.get_total_norm`; nothing is changed.

    The same bits for any number of threads and any order of tensors; fp16 and bf16 gradients do not overflow and the
    norm is not rounded to their dtype.

    Args:
        grads_or_parameters: a tensor or several, of any shape, floating dtype, layout and device. A parameter (or any
            leaf that requires a gradient) counts by its `.grad`, or not at all if it has none; any other tensor is
            itself a gradient.
        norm_type: p of the p-norm, above 0; `float("inf")` for the largest absolute value. Default: 2.0.

    Returns:
        () float32 (float64 if any gradient is float64), on the device of the first gradient; 0 for no elements.
        NaN if any element is NaN, else inf if any is infinite or the norm exceeds the dtype.

    Raises:
        ValueError: `norm_type` is not above 0.
        TypeError: a gradient is sparse, complex or integer.

    >>> grad_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(5.)
    >>> p = torch.nn.Parameter(torch.zeros(2))
    >>> p.grad = torch.tensor([1.0, -2.0])
    >>> grad_norm([p], norm_type=float("inf"))
    tensor(2.)
    """
    norm_type = check_norm_type(norm_type)
    counted = {i: grad for i, t in enumerate(_listed(grads_or_parameters)) if (grad := _counted(t)) is not None}
    numbers, grads = list(counted), list(counted.values())
    over = shards.shards_of([shards.summed(grad) for grad in grads], False, lambda k: f"number {numbers[k]}")
    grads = [shards.local(shards.summed(grad)) for grad in grads]
    takes = check_gradients(grads, lambda k: f"the gradient number {numbers[k]}")
    return _Gradients(grads, takes, over).norm(norm_type)


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Scale gradients in place so that their total norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_`.

    Differs where torch destroys gradients: norms are accumulated in float64 and returned in fp32 at least, so large
    fp16 gradients are not zeroed; when the norm is NaN or inf the gradients are left as they are, for the caller to
    look at; and where nothing has to be clipped nothing is written. The same bits for any number of threads and any
    order of parameters. On a GPU nothing waits, unless `error_if_nonfinite` asks for it; gradients whose norm exceeds
    fp32 are then left as they are.

    Args:
        parameters: a tensor or several; those without a gradient are passed over. Any dtype, layout, device.
        max_norm: largest allowed norm, 0 or more.
        norm_type: p of the p-norm, above 0; `float("inf")` for the largest absolute value. Default: 2.0.
        error_if_nonfinite: raise if the total norm is NaN or inf. Default: False.
        foreach: ignored; there for code that gives it to torch.

    Returns:
        () total norm before clipping, float32 or, where it needs the range or a gradient is float64, float64; on the
        device of the first gradient; 0 if there is no gradient.

    Raises:
        ValueError: `max_norm` is negative or NaN, `norm_type` is not above 0, or elements of a gradient share memory.
        TypeError: a gradient is sparse, complex or integer.
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set. Nothing was scaled.

    >>> p = torch.nn.Parameter(torch.zeros(2))
    >>> p.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([p], max_norm=1.0)
    tensor(5.)
    >>> p.grad
    tensor([0.6000, 0.8000])
    """
    max_norm, norm_type = at_least_zero(max_norm, "max_norm"), check_norm_type(norm_type)
    found = _gradients_of(_listed(parameters))
    grads, takes, norm = found.grads, found.takes, found.norm(norm_type)
    if norm.is_cuda and norm.dtype == torch.float32 and not error_if_nonfinite:
        scale_checked_(grads, takes, coefficient_on_device(norm, max_norm))
        return norm
    value = float(norm)
    if math.isinf(value):
        # Finite gradients can have a norm that only float64 holds.
        wide = found.norm(norm_type, wide=True)
        if math.isfinite(float(wide)):
            norm, value = wide, float(wide)
    if not math.isfinite(value):
        if error_if_nonfinite:
            raise RuntimeError(
                f"the total norm of order {norm_type} of the gradients is {value}, so they cannot be clipped; pass "
                "error_if_nonfinite=False to go on with the gradients unscaled"
            )
        return norm
    # torch has the factor in the dtype of the norm.
    coef = clip_coefficient(value, max_norm) if norm.dtype == torch.float32 else 1.0 / (value + 1e-6) * max_norm
    if coef < 1.0:
        scale_checked_(grads, takes, torch.tensor(coef, dtype=torch.float64))
    return norm


@torch.no_grad()
def clip_grad_value_(
    parameters: torch.Tensor | Iterable[torch.Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Clamp each element of the gradients to [-clip_value, clip_value] in place, as torch's of that name.

    NaN stays NaN; inf becomes `clip_value`.

    Args:
        parameters: a tensor or several; those without a gradient are passed over. Any dtype, layout, device.
        clip_value: largest allowed absolute value, 0 or more; rounded to the dtype of each gradient.
        foreach: ignored; there for code that gives it to torch.

    Raises:
        ValueError: `clip_value` is negative or NaN, or elements of a gradient share memory.
        TypeError: a gradient is sparse, complex or integer.

    >>> p = torch.nn.Parameter(torch.zeros(2))
    >>> p.grad = torch.tensor([3.0, -0.1])
    >>> clip_grad_value_([p], clip_value=1.0)
    >>> p.grad
    tensor([ 1.0000, -0.1000])
    """
    clip_value = at_least_zero(clip_value, "clip_value")
    found = _gradients_of(_listed(parameters))
    clamp_checked_(found.grads, found.takes, clip_value)


@torch.no_grad()
def clip_grad_agc_(
    parameters: torch.Tensor | Iterable[torch.Tensor], clipping: float = 0.01, eps: float = 1e-3
) -> None:
    """Adaptive gradient clipping in place: Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without
    Normalization", equation 3.

    A row G_i of a gradient, with the row W_i of its parameter, is scaled by clipping * max(|W_i|, eps) / |G_i| where
    that is below 1. Rows run along the first dimension (outputs of linear and convolution layers); a parameter of one
    dimension or none is one row. A row with a NaN or an inf, in gradient or parameter, is left as it is. The paper
    leaves out the last linear layer: do not pass its parameters.

    Args:
        parameters: a tensor or several; those without a gradient are passed over. Any dtype, layout, device.
        clipping: largest allowed ratio of the two norms, 0 or more (lambda in the paper). Default: 0.01.
        eps: norm that a row of a parameter has at least, 0 or more. Default: 1e-3.

    Raises:
        ValueError: `clipping` or `eps` is negative or NaN, or elements of a gradient share memory.
        TypeError: a gradient is sparse, complex or integer.

    >>> p = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [20.0, 0.0]]))
    >>> p.grad = torch.tensor([[3.0, 4.0], [0.0, 0.1]])
    >>> clip_grad_agc_([p], clipping=0.01)
    >>> p.grad
    tensor([[0.0060, 0.0080],
            [0.0000, 0.1000]])
    """
    clipping, eps = at_least_zero(clipping, "clipping"), at_least_zero(eps, "eps")
    params = _listed(parameters)
    found = _gradients_of(params, by_rows=True)
    owner = {id(shards.local(param.grad)): param for param in reversed(params) if param.grad is not None}
    owners = [owner[id(grad)] for grad in found.grads]
    whole = [i for i, param in enumerate(owners) if not shards.has_cut_row(param)]
    grads, takes = [found.grads[i] for i in whole], [found.takes[i] for i in whole]
    agc_checked_(grads, takes, [shards.local(owners[i]) for i in whole], clipping, eps)
    if found.over is not None and len(whole) < len(owners):
        _clip_cut_rows_(found.grads, owners, found.over, clipping, eps)


def _clip_cut_rows_(
    grads: list[torch.Tensor], params: list[torch.Tensor], over: shards.Shards, clipping: float, eps: float
) -> None:
    """`agc_checked_` of those gradients that are one row of which several processes have parts."""
    cut = [i for i, param in enumerate(params) if shards.has_cut_row(param)]
    sums = torch.zeros(2, len(grads), dtype=torch.float64, device=over.device)
    for i in cut:
        sums[0, i] = norm_float64([grads[i]]).square()
        sums[1, i] = norm_float64([shards.local(params[i]).detach()]).square()
    over.add_up_(over.count_(sums))
    factors = row_factors(sums[0].sqrt(), sums[1].sqrt(), clipping, eps)
    for i in cut:
        wide = torch.float64 if grads[i].dtype == torch.float64 else torch.float32
        grads[i].copy_(grads[i].to(wide) * factors[i].to(grads[i].device, wide))
