"""The optimizer of a stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pyft.optim import SGD, AdamW
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

    It clips inside its step. Without `settings.clip` the limit is infinite: nothing is scaled, but the norm is still
    looked at, and NonFiniteError raised, before anything is written.
    """
    groups = parameter_groups(named, settings.weight_decay)
    clip_norm = settings.clip or math.inf
    if settings.optimizer == "sgd":
        return SGD(groups, lr=lr, momentum=settings.momentum, clip_norm=clip_norm, on_nonfinite="raise")
    return AdamW(groups, lr=lr, clip_norm=clip_norm, on_nonfinite="raise")
