"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pyft.ops.rules import RULES, Rule
from pyft.optim.base import CoreOptimizer
from pyft.optim.checks import at_least_zero
from pyft.optim.options import StepOptions, check_switches


class Adagrad(CoreOptimizer):
    """Adagrad (Duchi et al., JMLR 2011) on the compiled core, in the place of `torch.optim.Adagrad`.

    State keys: `step`, `sum`; made with the optimizer, as torch does.

    Args:
        params: parameters, (name, parameter) pairs, or groups as dicts.
        lr: learning rate, float or one-element tensor. Default: 1e-2.
        lr_decay: lr is divided by 1 + (step - 1) * lr_decay. Default: 0.0.
        weight_decay: added to the gradient, times the parameter. Default: 0.0.
        initial_accumulator_value: first value of `sum`. Default: 0.0.
        eps: added to the root. Default: 1e-10.
        maximize: go up the gradient. Default: False.
        foreach, fused: of torch; ignored with a warning.
        differentiable: of torch; refused.
        options: clipping, precision and the like: see `pyft.optim.StepOptions`.

    Raises:
        ValueError, TypeError, NonFiniteError: as `Adam`.

    >>> w = torch.nn.Parameter(torch.ones(1))
    >>> w.grad = torch.full((1,), 3.0)
    >>> Adagrad([w], lr=0.1).step()
    >>> w.data
    tensor([0.9000])
    """

    _moments = ("sum",)
    _for_torch = {"foreach": None, "differentiable": False, "fused": None}

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        check_switches("Adagrad", foreach=foreach, fused=fused, differentiable=differentiable)
        defaults = {"lr": lr, "lr_decay": lr_decay, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"initial_accumulator_value": initial_accumulator_value, "maximize": maximize}
        super().__init__(params, defaults, dict(options))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, and make their state."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            for key in self._keys(param, group):
                if key != "init":
                    self._own_state[param][key] = self._make_entry(key, param, group)

    def _make_entry(self, key: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        entry = super()._make_entry(key, param, group)
        first = group["initial_accumulator_value"]
        if key == "sum" or key == "sum_scale":
            entry.fill_(first)
        elif key == "sum_q8" and first > 0.0:
            entry.fill_(255)
        return entry

    def share_memory(self) -> None:
        """Move the state to shared memory, as `torch.optim.Adagrad.share_memory`."""
        for of_one in self._own_state.values():
            for value in of_one.values():
                value.share_memory_()

    def _check_group(self, group: dict[str, Any]) -> None:
        at_least_zero(group, "lr_decay", "weight_decay", "initial_accumulator_value", "eps")

    def _rule(self, group: dict[str, Any]) -> Rule:
        return RULES["adagrad"]

    def _numbers(self, group: dict[str, Any]) -> dict[str, float]:
        return {name: group[name] for name in RULES["adagrad"].hyper}
