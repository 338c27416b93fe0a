"""Call a model with one batch, whatever it takes and gives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pyft.errors import ConfigError
from pyft.samples import Batch, Problem

Inputs = torch.Tensor | Mapping[str, torch.Tensor]


def call_model(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """`model(x)`, or `model(**x)` for a mapping, and the logits out of whatever it gives.

    Args:
        inputs: Tensor (B, ...), or a mapping from argument name to Tensor (B, ...).

    Returns:
        The output itself, its `.logits`, its "logits" entry, or the first of a tuple or list.

    Raises:
        ConfigError: the output holds no tensor in any of these places.

    >>> call_model(nn.Identity(), torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
    return logits_of(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))


def logits_of(output: Any) -> torch.Tensor:
    """The tensor of logits within a model's output; see `call_model`."""
    found = output
    if isinstance(output, Mapping) and "logits" in output:
        found = output["logits"]
    elif not isinstance(output, torch.Tensor) and hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, torch.Tensor):
        raise ConfigError(
            f"model: it gives {type(output).__name__}; a Tensor of logits, a tuple with it first, "
            "or an object with .logits is expected. Wrap the model in a module whose forward gives the logits"
        )
    return found


def check_outputs(logits: torch.Tensor, problem: Problem, num_classes: int, batch: int | Batch) -> None:
    """Refuse outputs that do not fit the task.

    Args:
        logits: what the model gave for one batch.
        problem: "classification" and "multilabel" need (B, C); "regression" needs (B, K), or (B,) for one target.
        num_classes: C, or K targets for regression.
        batch: the batch, or its number of samples B.

    Raises:
        ConfigError: another shape, or a dtype that is not floating point.

    >>> check_outputs(torch.zeros(4, 3), "classification", 3, 4)
    """
    size = batch if isinstance(batch, int) else len(batch.index)
    shape = tuple(logits.shape)
    if not logits.is_floating_point():
        raise ConfigError(f"model: its outputs are {logits.dtype}; floating point logits are expected")
    if shape == (size, num_classes) or (problem == "regression" and num_classes == 1 and shape == (size,)):
        return
    if logits.ndim != 2:
        mend = "let the model give one row per sample (pool or flatten what it gives, or take the last step)"
    elif shape[0] != size:
        mend = "let the model give one row per sample, in order (a recurrent layer may need batch_first=True)"
    else:
        what = "targets" if problem == "regression" else "classes"
        mend = f'the data has {num_classes} {what}: give a model with as many outputs, or head="auto"'
    raise ConfigError(
        f"model: for {size} samples its output has shape {shape}; ({size}, {num_classes}) is expected "
        f"for {problem}: {mend}"
    )


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and afterwards every module's mode and the random state as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
