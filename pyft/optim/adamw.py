"""AdamW that clips and updates in two passes over memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks as _global_post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as _global_pre_hooks

from pyft.errors import NonFiniteError
from pyft.ops.adamw import check_parameter
from pyft.ops.grad_norm import runs_on_core
from pyft.optim.clip import clip_coefficient
from pyft.optim.step_plan import StepPlan


@dataclass(frozen=True)
class LastStep:
    """What the last `step()` did.

    Attributes:
        total_norm: L2 norm of all gradients before clipping; None without `clip_norm`.
        clip_coef: the factor that the gradients were multiplied by.
    """

    total_norm: float | None
    clip_coef: float


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019) on the compiled core.

    Takes the place of `torch.optim.AdamW`: parameter groups, schedulers, hooks and state keys (`step`, `exp_avg`,
    `exp_avg_sq`) are the same, and a state_dict of either loads into the other in mid-training. Every parameter has
    its own step counter, so one that is unfrozen later gets its own bias correction.

    fp32 parameters on the CPU run on the core, in one parallel region for all of them. Other floating dtypes,
    devices and parameters with gaps in memory run the same formula in PyTorch. Parameters and gradients may have any
    layout.

    Args:
        params: parameters, (name, parameter) pairs, or groups as dicts.
        lr: learning rate, float or one-element tensor. Default: 1e-3.
        betas: decay rates of the two moments. Default: (0.9, 0.999).
        eps: added to the denominator. Default: 1e-8.
        weight_decay: decoupled weight decay, multiplied by lr. Default: 1e-2.
        maximize: go up the gradient. Default: False.
        clip_norm: the gradients of all groups together are scaled to at most this L2 norm inside the step, by
            torch's formula min(1, clip_norm / (norm + 1e-6)); `p.grad` itself is left as it is. If the norm is not
            finite, `step()` raises before anything is written. Default: None, no clipping and no check.

    Raises:
        ValueError: a hyperparameter out of range, or an expanded parameter whose elements share memory.
        TypeError: a sparse or complex parameter or gradient.
        NonFiniteError: from `step()`, see `clip_norm`.

    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = AdamW(model.parameters(), lr=1e-3, clip_norm=1.0)
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.last_step.total_norm > 1.0
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        clip_norm: float | None = None,
    ) -> None:
        if clip_norm is not None and not clip_norm > 0.0:
            raise ValueError(f"clip_norm must be above 0 or None, got {clip_norm}")
        self.clip_norm = clip_norm
        self.last_step: LastStep | None = None
        self._plan: StepPlan | None = None
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        # torch.optim.AdamW reads these from a group that it loads.
        unused = {"amsgrad": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None}
        super().__init__(params, {**options, **unused, "decoupled_weight_decay": True})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, for instance after unfreezing them; their step counters start at 0."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
            for i, param in enumerate(self.param_groups[-1]["params"]):
                check_parameter(param, f"params[{i}]")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._plan = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        self.__dict__.setdefault("clip_norm", None)
        self.__dict__.setdefault("last_step", None)
        for group in self.param_groups:
            group.setdefault("amsgrad", False)
            group.setdefault("maximize", False)
            for key in ("foreach", "fused"):
                group.setdefault(key, None)
            for key in ("capturable", "differentiable"):
                group.setdefault(key, False)
            group["decoupled_weight_decay"] = True
            _check_group(group)
            for param in group["params"]:
                _adopt_state(param, self.state.get(param))

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps three names here; the plan holds addresses, which a copy must not share.
        return {**super().__getstate__(), "clip_norm": self.clip_norm, "last_step": self.last_step}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns what `closure` returns, or None.

        Raises:
            NonFiniteError: `clip_norm` is set and the total norm is NaN or inf. Nothing was written, no counter moved.
        """
        if self._is_observed():
            return self._observed_step(closure)
        return self._step(closure)

    # Keeps torch from wrapping every step in a profiler range, which takes longer than the update of a small model.
    step.hooked = True  # type: ignore[attr-defined]

    def _is_observed(self) -> bool:
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        return bool(hooks or _global_pre_hooks or _global_post_hooks) or torch.autograd._profiler_enabled()

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._plan_of_this_step()
        total_norm, coef = None, 1.0
        if self.clip_norm is not None and plan.params:
            total_norm = plan.total_norm()
            if not math.isfinite(total_norm):
                raise NonFiniteError(self._nonfinite_message(plan, total_norm))
            coef = clip_coefficient(total_norm, self.clip_norm)
        plan.step([_hyperparameters(group) for group in self.param_groups], coef)
        self.last_step = LastStep(total_norm, coef)
        return loss

    _observed_step = torch.optim.Optimizer.profile_hook_step(_step)

    def _plan_of_this_step(self) -> StepPlan:
        if self._plan is not None:
            known = self._plan.gradients(self.param_groups, self.state)
            if known is not None and self._plan.take(known):
                return self._plan
        self._plan = self._build_plan()
        grads: list[Any] = [param.grad for param in self._plan.params]
        self._plan.take(grads)
        return self._plan

    def _build_plan(self) -> StepPlan:
        params: list[Any] = []
        groups: list[int] = []
        for number, group in enumerate(self.param_groups):
            present = [param for param in group["params"] if param.grad is not None]
            params += present
            groups += [number] * len(present)
        for i, param in enumerate(params):
            check_parameter(param, f"parameter {i}")
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            _adopt_state(param, state)
        return StepPlan(params, groups, self.state)

    def _nonfinite_message(self, plan: StepPlan, total_norm: float) -> str:
        number = plan.first_nonfinite()
        param = plan.params[number]
        names = [name for group in self.param_groups for name in group.get("param_names", [])]
        every = [other for group in self.param_groups for other in group["params"]]
        place = next(i for i, other in enumerate(every) if other is param)
        name = f"'{names[place]}'" if len(names) == len(every) else f"number {place}"
        return (
            f"the gradients have total norm {total_norm}; the first that is not finite belongs to parameter {name} of "
            f"shape {tuple(param.shape)}. Nothing was updated. Lower the learning rate, look for NaN in the inputs, or "
            "train in fp32"
        )


def _check_group(group: dict[str, Any]) -> None:
    if not float(group["lr"]) >= 0.0:
        raise ValueError(f"lr must be 0 or more, got {group['lr']}")
    for i, beta in enumerate(group["betas"]):
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"betas[{i}] must be in [0, 1), got {beta}")
    for key in ("eps", "weight_decay"):
        if not group[key] >= 0.0:
            raise ValueError(f"{key} must be 0 or more, got {group[key]}")
    if group.get("amsgrad"):
        raise ValueError("amsgrad=True is not supported by pyft.optim.AdamW; use torch.optim.AdamW for this state_dict")


def _hyperparameters(group: dict[str, Any]) -> tuple[float, float, float, float, float, bool]:
    beta1, beta2 = group["betas"]
    lr, eps, decay = group["lr"], group["eps"], group["weight_decay"]
    return float(lr), float(beta1), float(beta2), float(eps), float(decay), bool(group["maximize"])


def _adopt_state(param: torch.Tensor, state: dict[str, Any] | None) -> None:
    """Bring loaded state to the form that the core takes: the parameter's layout, an fp32 counter on the CPU."""
    if not state:
        return
    step = state["step"]
    if not (isinstance(step, torch.Tensor) and step.dtype == torch.float32 and step.device.type == "cpu"):
        state["step"] = torch.tensor(float(step), dtype=torch.float32)
    for key in ("exp_avg", "exp_avg_sq"):
        moment = state[key]
        if moment.shape != param.shape:
            raise ValueError(f"state '{key}' has shape {tuple(moment.shape)}, its parameter {tuple(param.shape)}")
        if runs_on_core(param) and moment.stride() != param.stride():
            state[key] = torch.empty_like(param, requires_grad=False, dtype=moment.dtype).copy_(moment)
