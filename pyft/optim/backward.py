"""Work done in backward, while a gradient is still in the cache: its norm, or the whole update of its parameter."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyft.core.loader import load_core
from pyft.ops.distributed import is_distributed
from pyft.ops.grad_norm import core_takes
from pyft.ops.handles import handles_available, tensor_handles
from pyft.optim import shards

if TYPE_CHECKING:
    from pyft.optim.device_plan import DevicePlan

# On the gradient itself, so that it cannot be taken for that of another one.
_ATTRIBUTE = "_pyft_sum_of_squares"


class BackwardNorms:
    """Sums of squares of gradients, taken in backward. Made by `norm_in_backward`.

    A gradient that was changed afterwards, by another backward or in place, is summed again in the step; so the norm is
    right whatever is done in between. Changes through `grad.data` are not seen, as everywhere in torch.
    """

    def __init__(self, params: Iterable[Tensor], accumulate: int, clip_value: float | None) -> None:
        self.accumulate, self.clip_value = accumulate, clip_value
        self._seen: dict[int, int] = {}
        self._handles: list[Any] = []
        self.watch(params)

    def watch(self, params: Iterable[Tensor]) -> None:
        """Take the norms of these parameters, too. Those that do not require a gradient are passed over."""
        params = [param for param in params if param.requires_grad]
        refuse_several_processes(params, "norm_in_backward", "take norms")
        self._handles += [param.register_post_accumulate_grad_hook(self._take) for param in params]

    def remove(self) -> None:
        """Take no more norms."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> BackwardNorms:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _take(self, param: Tensor) -> None:
        if self.accumulate > 1:
            seen = self._seen[id(param)] = self._seen.get(id(param), 0) + 1
            if seen % self.accumulate != 0:
                return
        refuse_several_processes([param], "norm_in_backward", "take norms")
        grad = None if param.grad is None else shards.local_gradient(param, param.grad)
        core = load_core() if handles_available() else None
        if grad is None or core is None or not (grad.is_cpu and core_takes(grad)):
            return
        value, place, element = core.sum_of_squares(tensor_handles([grad]), self.clip_value)
        setattr(grad, _ATTRIBUTE, (value, place, element, self.clip_value, grad._version, grad.data_ptr()))

    def sums(self, grads: list[Tensor], clip_value: float | None) -> list[float]:
        """The sum of squares of each gradient; NaN where it is not known."""
        self._seen.clear()
        found = [math.nan] * len(grads)
        known: list[tuple[int, float, int, float]] = []
        for i, grad in enumerate(grads):
            kept = getattr(grad, _ATTRIBUTE, None)
            if kept is not None and kept[3:] == (clip_value, grad._version, grad.data_ptr()):
                known.append((i, *kept[:3]))
        if not known:
            return found
        # torch.amp.GradScaler unscales gradients without a new version.
        core = load_core()
        assert core is not None
        elements = core.elements(tensor_handles([grads[i] for i, *_ in known]), [place for _, _, place, _ in known])
        for (i, value, _, before), element in zip(known, elements, strict=True):
            if element == before:
                found[i] = value
        return found


def norm_in_backward(
    params: Tensor | Iterable[Tensor], *, accumulate: int = 1, clip_value: float | None = None
) -> BackwardNorms:
    """Take the sum of squares of each gradient in backward, as soon as it is complete.

    Clip and step then need not read the gradients from memory once more: 28 bytes a parameter instead of 32. Give the
    result to an optimizer as `norm_in_backward=`.

    Args:
        params: the parameters; those without `requires_grad` are passed over.
        accumulate: how many times backward runs before each step; the norm is taken in the last. Default: 1.
        clip_value: the optimizer's, since norms are those of clamped gradients. Default: None.

    Returns:
        A handle: `remove()` ends it, as does leaving it as a context manager.

    Raises:
        ValueError: `accumulate` is below 1; or this is one of several processes and a parameter no DTensor, so that its
            gradient is averaged only after the norm was taken.

    >>> import torch
    >>> model = torch.nn.Linear(3, 1)
    >>> with norm_in_backward(model.parameters()) as norms:
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ...     model(torch.ones(2, 3)).sum().backward()
    >>> len(norms.sums([p.grad for p in model.parameters()], None))
    2
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be 1 or more, got {accumulate}")
    return BackwardNorms([params] if isinstance(params, Tensor) else list(params), accumulate, clip_value)


@dataclass
class InBackward:
    """What happened in backward since the last step; `plans` are those whose reports are still on a GPU."""

    sums: list[float] = field(default_factory=list)
    plans: list[DevicePlan] = field(default_factory=list)
    smallest: float = 1.0
    bad: str | None = None


class UpdateHooks:
    """Calls an optimizer for each parameter whose gradient is complete.

    Args:
        call: gets the parameter.
    """

    def __init__(self, call: Callable[[Tensor], None]) -> None:
        self._call = weakref.WeakMethod(call)
        self._handles: dict[int, Any] = {}

    def watch(self, params: Iterable[Tensor]) -> None:
        """Add parameters that require a gradient and are not watched yet."""
        for param in params:
            if param.requires_grad and id(param) not in self._handles:
                self._handles[id(param)] = param.register_post_accumulate_grad_hook(self._ready)

    def _ready(self, param: Tensor) -> None:
        call = self._call()
        if call is not None:
            call(param)

    def remove(self) -> None:
        """Call no more."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}


def refuse_several_processes(params: Iterable[Tensor], option: str, does: str) -> None:
    """Raise a ValueError where gradients are yet to be averaged over processes when a hook sees them.

    DistributedDataParallel averages them after all hooks; `fully_shard`, whose parameters are DTensors, before them.
    """
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if several and not all(is_distributed(param) for param in params):
        raise ValueError(
            f"{option} in several processes would {does} before gradients are averaged over them; leave it off, or "
            "spread the model with fully_shard"
        )
