"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from pyft.ops.rules import RULES, Rule
from pyft.optim.base import CoreOptimizer
from pyft.optim.checks import at_least_zero, rates
from pyft.optim.options import StepOptions, check_capturable, check_switches


class Adam(CoreOptimizer):
    """Adam (Kingma and Ba, ICLR 2015) on the compiled core, in the place of `torch.optim.Adam`.

    Parameter groups, schedulers, hooks and state keys (`step`, `exp_avg`, `exp_avg_sq`, `max_exp_avg_sq`) are torch's,
    and a state_dict of either loads into the other in mid-training. Every parameter has its own step counter, so one
    that is unfrozen later gets its own bias correction. Parameters and gradients may have any layout; fp32, bf16 and
    fp16 on the CPU run on the core, in one parallel region for all of them, everything else in PyTorch.

    Args:
        params: parameters, (name, parameter) pairs, or groups as dicts.
        lr: learning rate, float or one-element tensor. Default: 1e-3.
        betas: decay rates of the two moments. Default: (0.9, 0.999).
        eps: added to the denominator. Default: 1e-8.
        weight_decay: added to the gradient, times the parameter. Default: 0.0.
        amsgrad: divide by the largest second moment so far (Reddi et al., ICLR 2018). Default: False.
        foreach, fused: of torch; ignored with a warning.
        maximize: go up the gradient. Default: False.
        capturable: of torch; on a GPU a step always is, on the CPU it is refused. Default: False.
        differentiable: of torch; refused.
        decoupled_weight_decay: decay the parameter itself, as AdamW. Default: False.
        options: clipping, precision and the like: see `pyft.optim.StepOptions`.

    Raises:
        ValueError: a value out of range, or an expanded parameter whose elements share memory.
        TypeError: an unknown keyword, or a sparse or complex parameter or gradient.
        NonFiniteError: from `step()`, see `on_nonfinite`.

    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = Adam(model.parameters(), lr=1e-3, clip_norm=1.0)
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.last_step.total_norm > 1.0
    True
    """

    _moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _for_torch = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        check_switches(type(self).__name__, foreach=foreach, fused=fused, differentiable=differentiable)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        defaults |= {"maximize": maximize, "decoupled_weight_decay": decoupled_weight_decay}
        super().__init__(params, defaults, dict(options))
        if capturable:
            check_capturable(type(self).__name__, [param for group in self.param_groups for param in group["params"]])

    def _check_group(self, group: dict[str, Any]) -> None:
        if len(rates(group, "betas")) != 2:
            raise ValueError(f"betas must be two numbers, got {group['betas']}")
        at_least_zero(group, "eps", "weight_decay")

    def _rule(self, group: dict[str, Any]) -> Rule:
        name = "adamw" if group["decoupled_weight_decay"] else "adam"
        return RULES[f"{name}_amsgrad" if group["amsgrad"] else name]

    def _numbers(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        numbers = {name: group[name] for name in ("lr", "eps", "weight_decay", "maximize")}
        return {**numbers, "beta1": beta1, "beta2": beta2}


class AdamW(Adam):
    """AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019), as `torch.optim.AdamW`.

    `Adam` with decoupled weight decay: the parameter is multiplied by 1 - lr * weight_decay. Arguments, errors and what
    runs where are those of `Adam`; `weight_decay` is 1e-2 by default.

    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = AdamW(model.parameters(), lr=1e-3, clip_norm=1.0)
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.last_step.skipped
    False
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **options,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state.get("param_groups", []):
            group["decoupled_weight_decay"] = True
        super().__setstate__(state)
