"""When a lean form acts: torch would keep something for a backward pass that only needs the gradient of the input."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def acts_on(x: object, *frozen: Tensor | None) -> bool:
    """Whether a lean form takes over: `x` needs a gradient, none of `frozen` does, and nothing traces the call.

    torch.compile, export, jit tracing, functorch and forward-mode differentiation see torch's own module.
    """
    return (
        torch.is_grad_enabled()
        and is_eager(x)
        and x.requires_grad  # type: ignore[attr-defined]
        and not any(tensor is not None and tensor.requires_grad for tensor in frozen)
    )


def is_eager(x: object) -> bool:
    """Whether `x` is a plain tensor and nothing traces or transforms what is done with it."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and not x.is_nested  # type: ignore[attr-defined]
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def is_float32_on_cpu(x: object) -> bool:
    """Whether `x` is a plain dense float32 tensor on the CPU, of which nothing but values is asked."""
    return (
        is_eager(x)
        and x.is_cpu  # type: ignore[attr-defined]
        and x.dtype == torch.float32  # type: ignore[attr-defined]
        and x.layout == torch.strided  # type: ignore[attr-defined]
    )


def in_checkpoint() -> bool:
    """Whether what is kept now is dropped again: a checkpoint repeats its part in backward, where torch has no modes,
    and both times must be alike."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def has_kernels(x: Tensor) -> bool:
    """Whether bits and bytes are cheap on the device of `x`: on the CPU, and on a GPU for which the core is there."""
    from pyft.core.loader import load_core_for

    return x.is_cpu or (x.is_cuda and load_core_for("cuda") is not None)


def as_autocast(x: Tensor) -> Tensor:
    """`x` as autocast would hand it to a convolution or matrix product; the cast is seen by autograd."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def same_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context with the autocast state of this moment, for work that is done again in the backward pass."""
    kind = x.device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


def stand_in(size: Sequence[int], strides: Sequence[int], like: Tensor) -> Tensor:
    """An unwritten tensor of a size and strides: for backward formulas that only look at those of the input.

    With strides of its own, torch takes the same way through its kernels as with the input itself. Memory that is
    never touched costs no page; it is free again when the formula is done.
    """
    return torch.empty_strided(tuple(size), tuple(strides), dtype=like.dtype, device=like.device)


def laid_out_as(grad: Tensor, strides: Sequence[int]) -> Tensor:
    """`grad` with these strides, those of dimensions of size 1 aside; a copy where it has others."""
    if all(size == 1 or a == b for size, a, b in zip(grad.shape, grad.stride(), strides, strict=True)):
        return grad if grad.stride() == tuple(strides) else grad.as_strided(grad.shape, tuple(strides))
    return torch.empty_strided(grad.shape, tuple(strides), dtype=grad.dtype, device=grad.device).copy_(grad)


def refuse_second(what: str) -> None:
    """Refuse a backward pass of the backward pass, where the lean form has none.

    Raises:
        RuntimeError: autograd records this backward pass (`create_graph=True`).
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the lean form of {what} has no second derivative: call pyft.lean(model).release() before a backward "
            "pass with create_graph=True"
        )
