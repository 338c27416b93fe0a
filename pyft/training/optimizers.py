"""The optimizer of a stage, and one checked step of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pyft.errors import NonFiniteError
from pyft.optim import AdamW, clip_grad_norm_
from pyft.training.settings import Settings

NamedParameters = Sequence[tuple[str, nn.Parameter]]


def parameter_groups(named: NamedParameters, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels with weight decay, and biases and norms (less than 2 dimensions) without."""
    decay = [parameter for _, parameter in named if parameter.ndim >= 2]
    plain = [parameter for _, parameter in named if parameter.ndim < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(named: NamedParameters, settings: Settings, lr: float) -> torch.optim.Optimizer:
    """The optimizer of the settings over (name, parameter) pairs. Build it after freezing.

    AdamW clips inside its step. Without `settings.clip` the limit is infinite: nothing is scaled, but the norm is
    still looked at before anything is written.
    """
    groups = parameter_groups(named, settings.weight_decay)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum)
    return AdamW(groups, lr=lr, clip_norm=settings.clip or math.inf)


def make_update(optimizer: torch.optim.Optimizer, named: NamedParameters, settings: Settings) -> Callable[[], object]:
    """A function that clips and steps, and raises NonFiniteError before it writes when a gradient is not finite."""
    if isinstance(optimizer, AdamW):
        return optimizer.step
    parameters = [parameter for _, parameter in named]
    limit = settings.clip or math.inf

    def update() -> None:
        norm = float(clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            raise NonFiniteError(f"the gradients have total norm {norm}")
        optimizer.step()

    return update
