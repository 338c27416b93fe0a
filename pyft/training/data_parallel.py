"""One model in several processes: each takes its share of every batch, and gradients are averaged by torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pyft.training.processes import Processes


def share_of(index: np.ndarray, rank: int, count: int, least: int = 1) -> tuple[np.ndarray, bool]:
    """The samples of a batch that one of `count` processes takes, and whether they count.

    Every count-th sample, so that texts sorted by length give all processes as much to do. Where a batch is too small
    for all, the last ones take the first samples without counting them: all take part in every backward pass.

    Args:
        index: (B,) of the batch.
        least: samples of a share, as far as the batch has them.

    >>> [share_of(np.arange(5), rank, 3)[0].tolist() for rank in range(3)]
    [[0, 3], [1, 4], [2]]
    >>> share_of(np.array([7]), 1, 2)
    (array([7]), False)
    >>> [share_of(np.arange(5), rank, 3, least=2)[0].tolist() for rank in range(2)]
    [[0, 2, 4], [1, 3]]
    """
    parts = min(count, max(1, len(index) // least))
    if rank < parts:
        return index[rank::parts], True
    return index[:least], False


def least_share(model: nn.Module) -> int:
    """Samples that a process needs at least: BatchNorm cannot train on one."""
    return 2 if any(isinstance(module, _BatchNorm) and module.training for module in model.modules()) else 1


class Called(nn.Module):
    """A model and how the run calls it, for DistributedDataParallel to wrap."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, inputs: Any) -> Tensor:
        """Logits of a batch."""
        return self.call(self.model, inputs)


def wrap(
    model: nn.Module, call: Callable[[nn.Module, Any], Tensor], live: list[str], processes: Processes
) -> DistributedDataParallel:
    """The model of a stage under DistributedDataParallel. Wrap it after freezing, with the same weights everywhere.

    Args:
        live: names of the buffers that training may change: each forward pass starts with those of the first process.
    """
    called = Called(model, call)
    frozen = {name for name, _ in model.named_buffers(remove_duplicate=False)} - set(live)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(called, [f"model.{name}" for name in frozen])
    # Models with parameters that a batch does not use train in one process, so they do in several.
    wrapped = DistributedDataParallel(
        called,
        process_group=processes.gradients,
        forward_sync_buffers=bool(live),
        init_sync=False,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )
    return processes.keep(wrapped)


def first_forward(wrapped: DistributedDataParallel, inputs: Any) -> Tensor:
    """The first forward pass, without torch's advice to leave out `find_unused_parameters`: a later batch may need it.

    The advice comes from C++ and is written to standard error, past the filters of `warnings`, unless it is given
    inside a call of a Tensor's method.
    """
    logits: list[Tensor] = []

    def run(value: float) -> float:
        logits.append(wrapped(inputs))
        return value

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified")
        torch.zeros(1).apply_(run)
    return logits[0]
