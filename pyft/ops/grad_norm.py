"""The p-norm of a list of tensors, and which tensors the compiled core takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from pyft.ops.library import LIBRARY, define

define("grad_norm(Tensor[] grads, float norm_type=2.0) -> Tensor")

# torch shares out a long sum among its threads, a row of this length never.
_ROW = 16384
# Elements that the reference has in float64 at a time.
_BLOCK = 64 * _ROW
_CORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STRIDED = torch.strided


def norm_float64(grads: Sequence[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """The p-norm of all elements together in PyTorch, () float64 on the device of the first tensor.

    For any floating dtype, layout and device; `norm_type` above 0. The order of additions depends on the sizes of the
    tensors alone, not on threads nor on the order of `grads`.
    """
    device = grads[0].device if grads else torch.device("cpu")
    filled = [grad for grad in grads if grad.numel() > 0]
    if not filled:
        return torch.zeros((), dtype=torch.float64, device=device)
    divisor = 1.0
    # Squares of float64 can overflow, as can large powers of anything: those are powers of x / largest.
    if norm_type not in (1.0, 2.0) or (norm_type == 2.0 and any(grad.dtype == torch.float64 for grad in filled)):
        magnitudes = [torch.linalg.vector_norm(grad, math.inf).to(device, torch.float64) for grad in filled]
        largest = torch.stack(magnitudes).amax()
        divisor = float(largest)
        if math.isinf(norm_type) or not 0.0 < divisor < math.inf:
            return largest
    sums = torch.stack([_sum_of_powers(grad, norm_type, divisor).to(device) for grad in filled])
    return _sum_in_fixed_order(sums.sort().values).pow(1.0 / norm_type) * divisor


def _sum_of_powers(grad: torch.Tensor, norm_type: float, divisor: float) -> torch.Tensor:
    sums = []
    for block in grad.reshape(-1).split(_BLOCK):
        magnitudes = block.to(torch.float64).abs() / divisor
        sums.append(_sum_in_fixed_order(magnitudes if norm_type == 1.0 else magnitudes.pow(norm_type)))
    return _sum_in_fixed_order(torch.stack(sums))


def _sum_in_fixed_order(x: torch.Tensor) -> torch.Tensor:
    """Sum of x (n,), the same bits for any number of threads."""
    while x.numel() > _ROW:
        whole = x.numel() // _ROW * _ROW
        x = torch.cat([x[:whole].view(-1, _ROW).sum(1), x[whole:].sum(0, keepdim=True)])
    return x.sum()


def result_dtype(grads: Sequence[torch.Tensor]) -> torch.dtype:
    """float64 if any of them is, else float32."""
    return torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32


def grad_norm_reference(grads: Sequence[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """The same as `grad_norm` in PyTorch, for any floating dtype, layout and device; accumulates in float64."""
    with torch.no_grad():
        return norm_float64(grads, norm_type).to(result_dtype(grads))


def _fake(grads: Sequence[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    return torch.empty((), dtype=result_dtype(grads), device=grads[0].device if grads else "cpu")


LIBRARY.impl("grad_norm", grad_norm_reference, "CompositeExplicitAutograd")
torch.library.register_fake("pyft::grad_norm", _fake, lib=LIBRARY)


def core_takes(tensor: torch.Tensor) -> bool:
    """Whether a compiled core takes this tensor as it is: fp32, bf16 or fp16, on the CPU or a CUDA device, dense,
    without gaps."""
    return (
        tensor.dtype in _CORE_DTYPES
        and (tensor.is_cpu or tensor.is_cuda)
        and tensor.layout is _STRIDED
        and (tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride())
    )


def runs_on_core(tensor: torch.Tensor) -> bool:
    """Whether the fp32 kernels of the compiled core take this tensor as it is: fp32, on the CPU, without gaps."""
    return tensor.dtype == torch.float32 and tensor.is_cpu and core_takes(tensor)


def check_gradients(
    grads: Sequence[torch.Tensor], label: Callable[[int], str] = "grads[{}]".format, *, written: bool = False
) -> list[bool]:
    """Which of `grads` the core takes as they are; refuses, by `label(number)`, those that nothing here takes.

    Raises:
        TypeError: one is sparse, complex or integer.
        ValueError: one is to be `written` but its elements share memory (an expanded tensor).
    """
    takes = [core_takes(grad) for grad in grads]
    for i, grad in enumerate(grads):
        if not takes[i]:
            _check_gradient(grad, label(i), written)
    return takes


def _check_gradient(grad: torch.Tensor, name: str, written: bool) -> None:
    if grad.layout != torch.strided:
        raise TypeError(f"{name} must be a dense floating tensor, got a sparse one; to_dense() it first")
    if not grad.dtype.is_floating_point:
        raise TypeError(
            f"{name} must be a dense floating tensor, got {grad.dtype}; convert it to a real floating dtype"
        )
    if written and any(size > 1 and stride == 0 for size, stride in zip(grad.shape, grad.stride(), strict=True)):
        raise ValueError(
            f"{name} has shape {tuple(grad.shape)} and strides {grad.stride()}: its elements share memory, so it "
            "cannot be changed in place; clone() it first"
        )


def check_norm_type(norm_type: float) -> float:
    """`norm_type` as a float.

    Raises:
        ValueError: it is not above 0.
    """
    if not float(norm_type) > 0.0:
        raise ValueError(
            f"norm_type must be above 0, got {norm_type}; 2.0 is the Euclidean norm, inf the largest value"
        )
    return float(norm_type)


def norm_of_checked(grads: list[torch.Tensor], takes: list[bool], norm_type: float) -> torch.Tensor:
    """`grad_norm` of what went through `check_gradients`."""
    from pyft.core.loader import load_core_for

    device = grads[0].device if grads else torch.device("cpu")
    together = all(grad.device == device for grad in grads)
    with torch.no_grad():
        # While tracing, the op itself goes into the graph: it runs on the core if that is loaded, else the reference.
        if together and (torch.compiler.is_compiling() or load_core_for(device.type) is not None):
            fits = all(takes)
            if not fits:
                grads = [grad.contiguous() if grad.dtype in _CORE_DTYPES else grad for grad in grads]
                fits = all(core_takes(grad) for grad in grads)
            if fits:
                return torch.ops.pyft.grad_norm(grads, norm_type)
        return grad_norm_reference(grads, norm_type)


def grad_norm(grads: Sequence[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """The p-norm of all elements of `grads` together, as `torch.nn.utils.get_total_norm`.

    Added in float64 in a fixed order, tensors from the smallest to the largest sum: the same bits for any number of
    threads, any order of `grads` and, on the compiled core, any instruction set. Nothing overflows on the way.

    Args:
        grads: dense tensors of any shape, floating dtype, layout and device; may be empty.
        norm_type: p of the p-norm, above 0; `float("inf")` for the largest absolute value. Default: 2.0.

    Returns:
        () float32 (float64 if any input is float64), on the device of the first tensor. 0 for no elements.
        NaN if any element is NaN, else inf if any is infinite or the norm exceeds the dtype.

    Raises:
        TypeError: a tensor is sparse, complex or not floating.
        ValueError: `norm_type` is not above 0.

    >>> grad_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(5.)
    >>> grad_norm([torch.tensor([3.0]), torch.tensor([[-4.0]])], norm_type=1.0)
    tensor(7.)
    """
    grads, norm_type = list(grads), check_norm_type(norm_type)
    return norm_of_checked(grads, check_gradients(grads), norm_type)
