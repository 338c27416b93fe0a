"""SGD with momentum."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from pyft.ops.rules import RULES, Rule
from pyft.optim.base import CoreOptimizer
from pyft.optim.checks import at_least_zero
from pyft.optim.options import StepOptions, check_switches


class SGD(CoreOptimizer):
    """SGD with momentum (Sutskever et al., ICML 2013) on the compiled core, in the place of `torch.optim.SGD`.

    State key: `momentum_buffer`. The first gradient enters the buffer whole, without dampening, as in torch.

    Args:
        params: parameters, (name, parameter) pairs, or groups as dicts.
        lr: learning rate, float or one-element tensor. Default: 1e-3.
        momentum: factor of the buffer. Default: 0.0, no buffer.
        dampening: 1 - dampening multiplies the gradient on its way into the buffer. Default: 0.0.
        weight_decay: added to the gradient, times the parameter. Default: 0.0.
        nesterov: look ahead; needs momentum and no dampening. Default: False.
        maximize: go up the gradient. Default: False.
        foreach, fused: of torch; ignored with a warning.
        differentiable: of torch; refused.
        options: clipping, precision and the like: see `pyft.optim.StepOptions`.

    Raises:
        ValueError, TypeError, NonFiniteError: as `Adam`.

    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> w.grad = torch.tensor([1.0, 2.0])
    >>> SGD([w], lr=0.1, momentum=0.9).step()
    >>> w.data
    tensor([0.9000, 0.8000])
    """

    _moments = ("momentum_buffer",)
    _for_torch = {"foreach": None, "differentiable": False, "fused": None}

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        check_switches("SGD", foreach=foreach, fused=fused, differentiable=differentiable)
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "nesterov": nesterov, "maximize": maximize}, dict(options))

    def _check_group(self, group: dict[str, Any]) -> None:
        at_least_zero(group, "momentum", "weight_decay")
        if group["nesterov"] and (group["momentum"] <= 0.0 or group["dampening"] != 0.0):
            raise ValueError(
                f"nesterov=True needs momentum above 0 and dampening 0, got momentum={group['momentum']} and "
                f"dampening={group['dampening']}"
            )

    def _rule(self, group: dict[str, Any]) -> Rule:
        if group["momentum"] == 0.0:
            return RULES["sgd"]
        return RULES["sgd_nesterov" if group["nesterov"] else "sgd_momentum"]

    def _numbers(self, group: dict[str, Any]) -> dict[str, float]:
        return {name: group[name] for name in RULES["sgd"].hyper}
