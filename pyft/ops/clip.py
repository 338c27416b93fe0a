"""Clipping lists of gradients in place: by a factor, by value, and by rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from pyft.ops.grad_norm import check_gradients, core_takes
from pyft.ops.library import LIBRARY, define

define("scale_grads_(Tensor(a!)[] grads, Tensor scale) -> ()")
define("clamp_grads_(Tensor(a!)[] grads, float limit) -> ()")
define("agc_grads_(Tensor(a!)[] grads, Tensor[] params, float clipping, float eps) -> ()")


def _wide(grad: torch.Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 else torch.float32


def scale_grads_reference_(grads: Sequence[torch.Tensor], scale: torch.Tensor) -> None:
    """The same as `scale_grads_` in PyTorch, for any floating dtype, layout and device."""
    with torch.no_grad():
        for grad in grads:
            wide = _wide(grad)
            grad.copy_(grad.to(wide) * scale.to(device=grad.device, dtype=wide).reshape(()))


def clamp_grads_reference_(grads: Sequence[torch.Tensor], limit: float) -> None:
    """The same as `clamp_grads_` in PyTorch, for any floating dtype, layout and device."""
    with torch.no_grad():
        for grad in grads:
            wide = _wide(grad)
            # torch refuses a limit that the dtype cannot hold.
            bound = limit if limit <= torch.finfo(wide).max else math.inf
            grad.copy_(grad.to(wide).clamp(-bound, bound))


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(1, tensor.numel()) if tensor.ndim <= 1 else tensor.flatten(1)


def agc_factors(
    grad: torch.Tensor, param: torch.Tensor, clipping: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Brock et al. 2021, eq. 3: sums of squares and factors of the rows of a gradient, (rows,) float64 each.

    A row that is not finite has the factor 1.
    """
    sums = _as_rows(grad).to(torch.float64).square().sum(1)
    param_norms = torch.linalg.vector_norm(_as_rows(param), 2.0, dim=1, dtype=torch.float64)
    return sums, row_factors(sums.sqrt(), param_norms.to(grad.device), clipping, eps)


def row_factors(norms: torch.Tensor, param_norms: torch.Tensor, clipping: float, eps: float) -> torch.Tensor:
    """The factors of `agc_factors` from the norms of rows of a gradient and of its parameter, (rows,) float64 each."""
    limit = clipping * param_norms.clamp(min=eps)
    clipped = (norms > limit) & norms.isfinite() & limit.isfinite()
    return torch.where(clipped, limit / norms, 1.0)


def agc_grads_reference_(
    grads: Sequence[torch.Tensor], params: Sequence[torch.Tensor], clipping: float, eps: float
) -> None:
    """The same as `agc_grads_` in PyTorch, for any floating dtype, layout and device."""
    with torch.no_grad():
        for grad, param in zip(grads, params, strict=True):
            factor = agc_factors(grad, param, clipping, eps)[1].to(_wide(grad))
            factor = factor.reshape(()) if grad.ndim <= 1 else factor.reshape(-1, *[1] * (grad.ndim - 1))
            grad.copy_(grad.to(_wide(grad)) * factor)


def _fake(*args: object) -> None:
    return None


for _name, _reference in (
    ("scale_grads_", scale_grads_reference_),
    ("clamp_grads_", clamp_grads_reference_),
    ("agc_grads_", agc_grads_reference_),
):
    LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyft::{_name}", _fake, lib=LIBRARY)


def _apply(
    grads: list[torch.Tensor],
    takes: list[bool],
    on_core: Callable[[list[int]], None],
    in_pytorch: Callable[[list[int]], None],
) -> None:
    """Hand to the core of each device what it takes and to the reference the rest, by their numbers."""
    from pyft.core.loader import load_core_for

    fast: dict[torch.device, list[int]] = {}
    slow: list[int] = []
    for i, fits in enumerate(takes):
        device = grads[i].device
        # While tracing, the op itself goes into the graph: it runs on the core if that is loaded, else the reference.
        if fits and (torch.compiler.is_compiling() or load_core_for(device.type) is not None):
            fast.setdefault(device, []).append(i)
        else:
            slow.append(i)
    with torch.no_grad():
        for of_device in fast.values():
            on_core(of_device)
        if slow:
            in_pytorch(slow)
    _wrote([grads[i] for of_device in fast.values() for i in of_device])


def _wrote(tensors: list[torch.Tensor]) -> None:
    # Raw writes are unseen by autograd: without this a saved, now stale value is used in silence.
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:
        # Tensors made in inference mode keep no count; asking each first would cost more than small gradients do.
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def scale_checked_(grads: list[torch.Tensor], takes: list[bool], scale: torch.Tensor) -> None:
    """`scale_grads_` of what went through `check_gradients`."""
    _apply(
        grads,
        takes,
        lambda chosen: torch.ops.pyft.scale_grads_(
            [grads[i] for i in chosen], scale.to(grads[chosen[0]].device, torch.float32)
        ),
        lambda chosen: scale_grads_reference_([grads[i] for i in chosen], scale),
    )


def clamp_checked_(grads: list[torch.Tensor], takes: list[bool], limit: float) -> None:
    """`clamp_grads_` of what went through `check_gradients`."""
    _apply(
        grads,
        takes,
        lambda chosen: torch.ops.pyft.clamp_grads_([grads[i] for i in chosen], limit),
        lambda chosen: clamp_grads_reference_([grads[i] for i in chosen], limit),
    )


def agc_checked_(
    grads: list[torch.Tensor], takes: list[bool], params: list[torch.Tensor], clipping: float, eps: float
) -> None:
    """`agc_grads_` of what went through `check_gradients`."""
    _apply(
        grads,
        [
            fits
            and param.device == grad.device
            and core_takes(param)
            and _rows_are_contiguous(grad)
            and _rows_are_contiguous(param)
            for grad, fits, param in zip(grads, takes, params, strict=True)
        ],
        lambda chosen: torch.ops.pyft.agc_grads_(
            [grads[i] for i in chosen], [params[i] for i in chosen], clipping, eps
        ),
        lambda chosen: agc_grads_reference_([grads[i] for i in chosen], [params[i] for i in chosen], clipping, eps),
    )


def _rows_are_contiguous(tensor: torch.Tensor) -> bool:
    if tensor.ndim <= 1 or tensor.shape[0] <= 1 or tensor.numel() == 0:
        return True
    return tensor.stride(0) * tensor.shape[0] == tensor.numel()


def at_least_zero(value: float, name: str) -> float:
    """`value` as a float.

    Raises:
        ValueError: it is negative or NaN.
    """
    if not float(value) >= 0.0:
        raise ValueError(f"{name} must be 0 or more, got {value}")
    return float(value)


def scale_grads_(grads: Sequence[torch.Tensor], scale: torch.Tensor) -> None:
    """Multiply all `grads` by `scale` in place, computed in fp32 (fp64 ones in fp64) and rounded once.

    Args:
        grads: floating tensors of any shape, dtype, layout and device, no two of which share memory. Written.
        scale: () floating factor, on any device.

    Raises:
        TypeError: a gradient is sparse, complex or integer. Nothing is written.
        ValueError: elements of one share memory, or `scale` is not one number. Nothing is written.

    >>> g = torch.tensor([3.0, 4.0])
    >>> scale_grads_([g], torch.tensor(0.5))
    >>> g
    tensor([1.5000, 2.0000])
    """
    grads = list(grads)
    takes = check_gradients(grads, written=True)
    if scale.numel() != 1 or not scale.dtype.is_floating_point:
        raise ValueError(f"scale must be one floating number, got {scale.dtype} of shape {tuple(scale.shape)}")
    scale_checked_(grads, takes, scale)


def clamp_grads_(grads: Sequence[torch.Tensor], limit: float) -> None:
    """Clamp all `grads` to [-limit, limit] in place, as `torch.nn.utils.clip_grad_value_`. NaN stays NaN.

    Args:
        grads: floating tensors of any shape, dtype, layout and device, no two of which share memory. Written.
        limit: largest allowed absolute value, 0 or more; rounded to the dtype of each gradient.

    Raises:
        TypeError: a gradient is sparse, complex or integer. Nothing is written.
        ValueError: `limit` is negative or NaN, or elements of one gradient share memory. Nothing is written.

    >>> g = torch.tensor([3.0, -4.0, float("nan")])
    >>> clamp_grads_([g], 1.0)
    >>> g
    tensor([ 1., -1., nan])
    """
    grads, limit = list(grads), at_least_zero(limit, "limit")
    clamp_checked_(grads, check_gradients(grads, written=True), limit)


def agc_grads_(
    grads: Sequence[torch.Tensor], params: Sequence[torch.Tensor], clipping: float = 0.01, eps: float = 1e-3
) -> None:
    """Adaptive gradient clipping in place (Brock et al. 2021, equation 3).

    A row G_i of a gradient, with the row W_i of its parameter, is scaled by clipping * max(|W_i|, eps) / |G_i| where
    that is below 1. Rows run along the first dimension; a tensor of one dimension or none is one row. A row whose norm
    is NaN or inf, in the gradient or in the parameter, is left as it is.

    Args:
        grads: floating tensors of any shape, dtype, layout and device, no two of which share memory. Written.
        params: one per gradient, same shape, any floating dtype and layout. Read only.
        clipping: largest allowed ratio of the two norms, 0 or more (lambda in the paper). Default: 0.01.
        eps: norm that a row of a parameter has at least, 0 or more. Default: 1e-3.

    Raises:
        TypeError: a tensor is sparse, complex or integer. Nothing is written.
        ValueError: `clipping` or `eps` is negative or NaN, counts or shapes differ, or elements of a gradient share
            memory. Nothing is written.

    >>> g = torch.tensor([[3.0, 4.0], [0.0, 0.1]])
    >>> agc_grads_([g], [torch.tensor([[1.0, 0.0], [20.0, 0.0]])], clipping=0.01)
    >>> g
    tensor([[0.0060, 0.0080],
            [0.0000, 0.1000]])
    """
    grads, params = list(grads), list(params)
    clipping, eps = at_least_zero(clipping, "clipping"), at_least_zero(eps, "eps")
    if len(grads) != len(params):
        raise ValueError(f"grads has {len(grads)} tensors but params has {len(params)}; give one parameter for each")
    takes = check_gradients(grads, written=True)
    check_gradients(params, "params[{}]".format)
    for i, (grad, param) in enumerate(zip(grads, params, strict=True)):
        if param.shape != grad.shape:
            raise ValueError(
                f"params[{i}] must have the shape of grads[{i}] {tuple(grad.shape)}, got {tuple(param.shape)}"
            )
    agc_checked_(grads, takes, params, clipping, eps)
