"""Lion."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from pyft.ops.rules import RULES, Rule
from pyft.optim.base import CoreOptimizer
from pyft.optim.checks import at_least_zero, rates
from pyft.optim.options import StepOptions


class Lion(CoreOptimizer):
    """Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, algorithm 2) on the core.

    The update is the sign of an average, so lr is to be 3 to 10 times smaller than AdamW's and weight_decay larger by
    as much. State keys: `step`, `exp_avg`.

    Args:
        params: parameters, (name, parameter) pairs, or groups as dicts.
        lr: learning rate, float or one-element tensor. Default: 1e-4.
        betas: of the average whose sign is taken, and of the one that is kept. Default: (0.9, 0.99).
        weight_decay: decoupled weight decay, multiplied by lr. Default: 0.0.
        maximize: go up the gradient. Default: False.
        options: clipping, precision and the like: see `pyft.optim.StepOptions`.

    Raises:
        ValueError, TypeError, NonFiniteError: as `Adam`.

    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> w.grad = torch.tensor([5.0, -0.1])
    >>> Lion([w], lr=0.1).step()
    >>> w.data
    tensor([0.9000, 1.1000])
    """

    _moments = ("exp_avg",)

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, dict(options))

    def _check_group(self, group: dict[str, Any]) -> None:
        if len(rates(group, "betas")) != 2:
            raise ValueError(f"betas must be two numbers, got {group['betas']}")
        at_least_zero(group, "weight_decay")

    def _rule(self, group: dict[str, Any]) -> Rule:
        return RULES["lion"]

    def _numbers(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        numbers = {name: group[name] for name in ("lr", "weight_decay", "maximize")}
        return {**numbers, "beta1": beta1, "beta2": beta2}
