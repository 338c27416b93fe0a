"""L2 norm over a list of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyft.ops.library import LIBRARY, define

define("grad_norm(Tensor[] grads) -> Tensor")


def grad_norm_reference(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same in PyTorch, for any floating dtype, layout and device; accumulates in float64."""
    device = grads[0].device if grads else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for grad in grads:
        total += torch.linalg.vector_norm(grad, 2, dtype=torch.float64).square().to(device)
    dtype = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    return total.sqrt().to(dtype)


def _fake(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    dtype = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    return torch.empty((), dtype=dtype, device=grads[0].device if grads else "cpu")


LIBRARY.impl("grad_norm", grad_norm_reference, "CompositeExplicitAutograd")
torch.library.register_fake("pyft::grad_norm", _fake, lib=LIBRARY)


def runs_on_core(tensor: torch.Tensor) -> bool:
    """Whether the compiled core takes this tensor as it is: fp32, on the CPU, dense, without gaps or overlaps."""
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and (tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride())
    )


def grad_norm(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """L2 norm of all elements of `grads` together, as `torch.nn.utils.get_total_norm`.

    Squares are added in float64 in a fixed order, so the compiled core gives the same bits for any number of threads
    and any instruction set, and fp32 or fp16 gradients do not overflow on the way.

    Args:
        grads: dense tensors of any shape, floating dtype and layout; may be empty.

    Returns:
        () float32 (float64 if any input is float64), on the device of the first tensor. 0 for no tensors.
        NaN if any element is NaN, inf if any is infinite.

    Raises:
        TypeError: a tensor is sparse, complex or not floating.

    >>> grad_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(5.)
    """
    from pyft.core.loader import load_core

    grads = list(grads)
    for i, grad in enumerate(grads):
        if grad.layout != torch.strided or not grad.dtype.is_floating_point:
            kind = "sparse" if grad.layout != torch.strided else str(grad.dtype)
            raise TypeError(f"grads[{i}] must be a dense floating tensor, got {kind}")
    if torch.compiler.is_compiling() or load_core() is not None:
        dense = [grad if grad.dtype != torch.float32 or runs_on_core(grad) else grad.contiguous() for grad in grads]
        # While tracing, the op itself goes into the graph: it runs on the core if that is loaded, else the reference.
        if all(runs_on_core(grad) for grad in dense):
            return torch.ops.pyft.grad_norm(dense)
    return grad_norm_reference(grads)
