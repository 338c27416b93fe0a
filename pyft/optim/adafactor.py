"""Adafactor, by torch's formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pyft.ops.rules import RULES, Rule
from pyft.optim import shards
from pyft.optim import state as state_of
from pyft.optim.base import CoreOptimizer
from pyft.optim.checks import at_least_zero
from pyft.optim.options import StepOptions, check_switches


class Adafactor(CoreOptimizer):
    """Adafactor (Shazeer and Stern, ICML 2018) by the formula of `torch.optim.Adafactor`, with pyft's clipping.

    The second moment of a tensor of two dimensions or more is kept as its row and column means. State keys: `step`,
    `row_var` and `col_var`, or `variance`. Runs in PyTorch.

    Args:
        params: parameters, (name, parameter) pairs, or groups as dicts.
        lr: upper bound of the relative step, float or one-element tensor. Default: 1e-2.
        beta2_decay: the average takes step ** beta2_decay of the new square. Default: -0.8.
        eps: lower bounds of the second moment's root (None: the epsilon of the parameter's dtype) and of the
            parameter's scale. Default: (None, 1e-3).
        d: the update is scaled to at most this root mean square. Default: 1.0.
        weight_decay: decoupled weight decay, multiplied by lr. Default: 0.0.
        foreach: of torch; ignored with a warning.
        maximize: go up the gradient. Default: False.
        options: clipping, precision and the like: see `pyft.optim.StepOptions`; `state_dtype` is "float32".

    Raises:
        ValueError, TypeError, NonFiniteError: as `Adam`.

    >>> w = torch.nn.Parameter(torch.ones(2, 2))
    >>> w.grad = torch.ones(2, 2)
    >>> Adafactor([w], lr=0.1).step()
    >>> w.data
    tensor([[0.9000, 0.9000],
            [0.9000, 0.9000]])
    """

    _moments = ("row_var", "col_var", "variance")
    _for_torch = {"foreach": None}

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        check_switches("Adafactor", foreach=foreach)
        if options.get("state_dtype", "float32") != "float32":
            raise ValueError(f"state_dtype of Adafactor must be 'float32', got {options['state_dtype']!r}: it is small")
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "maximize": maximize}, dict(options))

    def _check_parameter(self, param: Any, name: str) -> None:
        super()._check_parameter(param, name)
        if shards.cut_dims(param):
            raise TypeError(
                f"{name} is spread over processes as {param.placements}, and Adafactor takes means over whole tensors; "
                "use AdamW with state_dtype='int8' where memory is short, or Adafactor with DistributedDataParallel"
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        if not float(group["beta2_decay"]) <= 0.0:
            raise ValueError(f"beta2_decay must be 0 or less, got {group['beta2_decay']}")
        first, second = group["eps"]
        if not (first is None or first >= 0.0) or not second >= 0.0:
            raise ValueError(f"eps must be two numbers of 0 or more, the first may be None; got {group['eps']}")
        if not float(group["d"]) >= 1.0:
            raise ValueError(f"d must be 1 or more, got {group['d']}")
        at_least_zero(group, "weight_decay")

    def _rule(self, group: dict[str, Any]) -> Rule:
        return RULES["adafactor"]

    def _numbers(self, group: dict[str, Any]) -> dict[str, float]:
        eps1, eps2 = group["eps"]
        numbers = {name: group[name] for name in ("lr", "beta2_decay", "d", "weight_decay", "maximize")}
        return {**numbers, "eps1": float("nan") if eps1 is None else eps1, "eps2": eps2}

    def _keys(self, param: Tensor, group: dict[str, Any]) -> tuple[str, ...]:
        own = ("row_var", "col_var") if param.ndim > 1 else ("variance",)
        every = super()._keys(param, group)
        return (*own, *[key for key in every if key not in self._moments])

    def _make_entry(self, key: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        if key not in ("row_var", "col_var"):
            return super()._make_entry(key, param, group)
        shape = list(param.shape)
        shape[-1 if key == "row_var" else -2] = 1
        dtype = state_of.moment_dtype(param, self.settings)
        return torch.zeros(shape, dtype=dtype, device=param.device)

    def _adopt(self, param: Tensor, of_one: dict[str, Any]) -> None:
        state_of.adopt(param, of_one, (), self.settings)
        for name in self._moments:
            if name in of_one:
                moment = of_one[name]
                fits = moment.shape == param.shape
                if name != "variance":
                    fits = moment.ndim == param.ndim > 1 and moment.shape[:-2] == param.shape[:-2]
                if not fits:
                    raise ValueError(
                        f"state '{name}' has shape {tuple(moment.shape)}, its parameter {tuple(param.shape)}"
                    )
                dtype = state_of.moment_dtype(param, self.settings)
                of_one[name] = moment.to(device=param.device, dtype=dtype)
