"""AdamW over lists of tensors, in place, with the clip factor applied on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pyft.ops.grad_norm import runs_on_core
from pyft.ops.library import LIBRARY, define

define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor[] steps, "
    "Tensor? clip_coef, *, float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize) -> ()"
)


def adamw_reference_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    clip_coef: torch.Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """The same in PyTorch, for any floating dtype, layout and device.

    On fp32 it rounds as `csrc/adamw_math.h` does, so both give the same bits. Narrower dtypes are computed in fp32.
    """
    for param, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        count = step.to(torch.float64)
        g = grad.to(wide)
        if clip_coef is not None:
            g = g * clip_coef.to(device=g.device, dtype=wide)
        if maximize:
            g = -g
        m = exp_avg.to(wide) + (g - exp_avg.to(wide)) * (1.0 - beta1)
        v = exp_avg_sq.to(wide) * beta2 + (g * g) * (1.0 - beta2)
        inv_sqrt_bias_correction2 = (1.0 / (1.0 - beta2**count).sqrt()).to(device=g.device, dtype=wide)
        step_size = (lr / (1.0 - beta1**count)).to(device=g.device, dtype=wide)
        # torch's fp32 sqrt may go to a vector library that does not round correctly; through float64 it is exact.
        denom = v.to(torch.float64).sqrt().to(wide) * inv_sqrt_bias_correction2 + eps
        param.copy_(param.to(wide) * (1.0 - lr * weight_decay) - step_size * (m / denom))
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)


def _reference_kernel(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    steps: list[torch.Tensor],
    clip_coef: torch.Tensor | None,
    **hyper: float,
) -> None:
    with torch.no_grad():
        adamw_reference_(params, grads, exp_avgs, exp_avg_sqs, steps, clip_coef, **hyper)  # type: ignore[arg-type]


def _fake(*args: object, **hyper: float) -> None:
    return None


LIBRARY.impl("adamw_", _reference_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("pyft::adamw_", _fake, lib=LIBRARY)


def _check(name: str, params: Sequence[torch.Tensor], others: Sequence[torch.Tensor], one: bool = False) -> None:
    if len(others) != len(params):
        raise ValueError(f"{name} has {len(others)} tensors but params has {len(params)}")
    for i, (param, other) in enumerate(zip(params, others, strict=True)):
        if other.layout != torch.strided:
            raise TypeError(f"{name}[{i}] is sparse; AdamW takes dense tensors (sparse: torch.optim.SparseAdam)")
        if one and other.numel() != 1:
            raise ValueError(f"{name}[{i}] must hold one number, got shape {tuple(other.shape)}")
        if not one and (other.shape != param.shape or not other.dtype.is_floating_point):
            raise ValueError(
                f"{name}[{i}] must be floating with the shape of params[{i}] {tuple(param.shape)}, "
                f"got {other.dtype} {tuple(other.shape)}"
            )


def check_parameter(param: torch.Tensor, name: str) -> None:
    """Refuse what no in-place update can be right for.

    Raises:
        TypeError: sparse, complex or integer.
        ValueError: several elements share one place in memory (an expanded tensor).
    """
    if param.layout != torch.strided or not param.dtype.is_floating_point:
        kind = "sparse" if param.layout != torch.strided else str(param.dtype)
        raise TypeError(f"{name} must be a dense real floating tensor, got {kind}")
    if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(
            f"{name} has shape {tuple(param.shape)} and strides {param.stride()}: its elements share memory, so an "
            "in-place update is not defined; clone() the parameter first"
        )


def adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    clip_coef: torch.Tensor | None = None,
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> None:
    """One AdamW step (Loshchilov and Hutter 2019, algorithm 2) on all tensors, in place.

    Args:
        params: floating tensors of any shape and layout, without overlapping memory. Written.
        grads: one per parameter, same shape, any layout. Read only.
        exp_avgs, exp_avg_sqs: first and second moments, same shapes. Written.
        steps: one-element tensors: the number of this step for each parameter, from 1. Read only.
        clip_coef: () factor for all gradients, or None for 1.
        lr, beta1, beta2, eps, weight_decay: as in `torch.optim.AdamW`.
        maximize: go up the gradient.

    Raises:
        ValueError, TypeError: lengths, shapes or dtypes do not fit, or a tensor is sparse. Nothing is written.

    >>> p = torch.tensor([1.0])
    >>> adamw_([p], [torch.tensor([2.0])], [torch.zeros(1)], [torch.zeros(1)], [torch.tensor(1.0)], lr=0.5)
    >>> p
    tensor([0.4950])
    """
    from pyft.core.loader import load_core

    for i, param in enumerate(params):
        check_parameter(param, f"params[{i}]")
    _check("grads", params, grads)
    _check("exp_avgs", params, exp_avgs)
    _check("exp_avg_sqs", params, exp_avg_sqs)
    _check("steps", params, steps, one=True)
    hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
    # While tracing, the op itself goes into the graph: it runs on the core if that is loaded, else the reference.
    reference: Callable[..., None] = adamw_reference_
    with_core = torch.compiler.is_compiling() or load_core() is not None
    kernel: Callable[..., None] = torch.ops.pyft.adamw_ if with_core else reference
    fast: list[int] = []
    slow: list[int] = []
    for i, param in enumerate(params):
        fits = all(runs_on_core(t) and t.stride() == param.stride() for t in (param, exp_avgs[i], exp_avg_sqs[i]))
        fits = fits and grads[i].dtype == torch.float32 and grads[i].device == param.device
        (fast if fits and steps[i].dtype == torch.float32 and steps[i].device.type == "cpu" else slow).append(i)

    def pick(tensors: Sequence[torch.Tensor], index: list[int]) -> list[torch.Tensor]:
        return [tensors[i] for i in index]

    def arguments(index: list[int]) -> list[list[torch.Tensor]]:
        in_layout = [in_layout_of(params[i], grads[i]) for i in index]
        return [pick(params, index), in_layout, pick(exp_avgs, index), pick(exp_avg_sqs, index), pick(steps, index)]

    coef = None if clip_coef is None else clip_coef.to(device="cpu", dtype=torch.float32).reshape(())
    with torch.no_grad():
        kernel(*arguments(fast), coef, **hyper)
        reference(*arguments(slow), clip_coef, **hyper)
    _wrote(pick(params, fast), pick(exp_avgs, fast), pick(exp_avg_sqs, fast))


def _wrote(*lists: Sequence[torch.Tensor]) -> None:
    # Raw writes are unseen by autograd: without this a saved, now stale value is used in silence.
    for tensors in lists:
        if tensors:
            torch.autograd.graph.increment_version(list(tensors))


def in_layout_of(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """`grad` itself if its strides are the parameter's, else a copy with those strides."""
    if grad.stride() == param.stride():
        return grad
    return torch.empty_like(param, requires_grad=False, dtype=grad.dtype).copy_(grad)
