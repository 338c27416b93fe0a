"""RMSprop."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from pyft.ops.rules import RULES, Rule
from pyft.optim.base import CoreOptimizer
from pyft.optim.checks import at_least_zero
from pyft.optim.options import StepOptions, check_capturable, check_switches


class RMSprop(CoreOptimizer):
    """RMSprop (Tieleman and Hinton 2012; centered: Graves 2013) on the compiled core, as `torch.optim.RMSprop`.

    State keys: `step`, `square_avg`, `momentum_buffer`, `grad_avg`. Where gradients hardly vary, rounding makes the
    centered variance negative, and torch's update NaN; here it is 0 then.

    Args:
        params: parameters, (name, parameter) pairs, or groups as dicts.
        lr: learning rate, float or one-element tensor. Default: 1e-2.
        alpha: decay rate of the averages. Default: 0.99.
        eps: added to the root. Default: 1e-8.
        weight_decay: added to the gradient, times the parameter. Default: 0.0.
        momentum: factor of the buffer. Default: 0.0, no buffer.
        centered: divide by the standard deviation instead. Default: False.
        maximize: go up the gradient. Default: False.
        foreach: of torch; ignored with a warning.
        capturable: of torch; on a GPU a step always is, on the CPU it is refused. Default: False.
        differentiable: of torch; refused.
        options: clipping, precision and the like: see `pyft.optim.StepOptions`.

    Raises:
        ValueError, TypeError, NonFiniteError: as `Adam`.

    >>> w = torch.nn.Parameter(torch.ones(1))
    >>> w.grad = torch.ones(1)
    >>> RMSprop([w], lr=0.01).step()
    >>> w.data
    tensor([0.9000])
    """

    _moments = ("square_avg", "momentum_buffer", "grad_avg")
    _for_torch = {"foreach": None, "capturable": False, "differentiable": False}

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        check_switches("RMSprop", foreach=foreach, differentiable=differentiable)
        defaults = {"lr": lr, "momentum": momentum, "alpha": alpha, "eps": eps, "centered": centered}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "maximize": maximize}, dict(options))
        if capturable:
            check_capturable("RMSprop", [param for group in self.param_groups for param in group["params"]])

    def _check_group(self, group: dict[str, Any]) -> None:
        if not 0.0 <= float(group["alpha"]) <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], got {group['alpha']}")
        at_least_zero(group, "eps", "weight_decay", "momentum")

    def _rule(self, group: dict[str, Any]) -> Rule:
        centered = "_centered" if group["centered"] else ""
        return RULES[f"rmsprop{centered}{'_momentum' if group['momentum'] > 0.0 else ''}"]

    def _numbers(self, group: dict[str, Any]) -> dict[str, float]:
        return {name: group[name] for name in RULES["rmsprop"].hyper}
