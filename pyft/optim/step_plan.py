"""What an optimizer step needs again and again: who is updated where, on the core or in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pyft.core.loader import load_core
from pyft.ops.adamw import adamw_reference_, in_layout_of
from pyft.ops.grad_norm import grad_norm_reference, runs_on_core
from pyft.ops.handles import handles_available, tensor_handles

STATE_KEYS = ("exp_avg", "exp_avg_sq", "step")
Hyperparameters = tuple[float, float, float, float, float, bool]


class StepPlan:
    """AdamW over a fixed list of parameters. Parameters that the core cannot take run in PyTorch.

    Args:
        params: parameters with a gradient, each with state `step`, `exp_avg`, `exp_avg_sq`.
        groups: the number of the parameter group of each.
        state: the optimizer's state.
    """

    def __init__(self, params: list[torch.Tensor], groups: list[int], state: dict[Any, Any]) -> None:
        self.params, self.groups = params, groups
        self.held = [[state[param][key] for param in params] for key in STATE_KEYS]
        exp_avgs, exp_avg_sqs, _ = self.held
        core = load_core() if handles_available() else None
        self.held_state = None if core is None else core.HeldState(params, groups, state, STATE_KEYS)
        self.fast: list[int] = []
        self.slow: list[int] = []
        for i, param in enumerate(params):
            moments = (exp_avgs[i], exp_avg_sqs[i])
            fits = core is not None and runs_on_core(param)
            fits = fits and all(m.dtype == param.dtype and m.stride() == param.stride() for m in moments)
            (self.fast if fits else self.slow).append(i)
        self.all_fast = not self.slow
        self.fast_params = [params[i] for i in self.fast]
        self.grads: list[torch.Tensor] = []
        # Copies in the parameter's layout, alive as long as the core holds their addresses.
        self.relaid: list[torch.Tensor] = []
        self.core_plan = None
        if core is not None and self.fast:
            lists = [self.fast_params] + [[held[i] for i in self.fast] for held in self.held]
            self.core_plan = core.AdamWPlan(*map(tensor_handles, lists), [groups[i] for i in self.fast])

    def gradients(self, param_groups: list[dict[str, Any]], state: dict[Any, Any]) -> list[torch.Tensor] | None:
        """The gradients of `params`; None when the parameters that have one, their groups or any of their state
        tensors are no longer those of this plan, or there is no core to tell it quickly."""
        return None if self.held_state is None else self.held_state.gradients(param_groups, state)

    def take(self, grads: list[torch.Tensor]) -> bool:
        """Take this step's gradients; False when a parameter's storage has changed and a new plan is needed.

        Raises:
            TypeError: a gradient is sparse.
        """
        try:
            return self._take(grads)
        except RuntimeError:
            _refuse_sparse(grads)
            raise

    def _take(self, grads: list[torch.Tensor]) -> bool:
        _refuse_sparse([grads[i] for i in self.slow])
        self.grads = grads
        if self.core_plan is None:
            return True
        fast = grads if self.all_fast else [grads[i] for i in self.fast]
        other_layout = self.core_plan.set_gradients(tensor_handles(fast))
        if other_layout:
            for i in other_layout:
                fast[i] = in_layout_of(self.fast_params[i], fast[i])
            self.relaid = fast
            other_layout = self.core_plan.set_gradients(tensor_handles(fast))
        return other_layout is not None

    def total_norm(self) -> float:
        """L2 norm over all gradients; the fp32 ones are added in a fixed order."""
        total = self.core_plan.sum_of_squares() if self.core_plan is not None else 0.0
        if self.slow:
            total += float(grad_norm_reference([self.grads[i].double() for i in self.slow])) ** 2
        return math.sqrt(total)

    def first_nonfinite(self) -> int:
        """Number of the first parameter whose gradient holds NaN or inf."""
        fast = -1 if self.core_plan is None else self.core_plan.first_nonfinite()
        bad = [] if fast < 0 else [self.fast[fast]]
        bad += [i for i in self.slow if not bool(torch.isfinite(self.grads[i]).all())]
        return min(bad)

    def step(self, groups: Sequence[Hyperparameters], clip_coef: float) -> None:
        """Advance the counters and update all parameters and moments."""
        if self.core_plan is not None:
            # Raw writes are unseen by autograd: without this a saved, now stale weight is used in silence. Before the
            # update, which drives the parameters' records out of the cache.
            torch.autograd.graph.increment_version(self.fast_params)
            self.core_plan.step(groups, clip_coef)
        exp_avgs, exp_avg_sqs, steps = self.held
        coef = None if clip_coef == 1.0 else torch.tensor(clip_coef, dtype=torch.float64)
        for i in self.slow:
            lr, beta1, beta2, eps, weight_decay, maximize = groups[self.groups[i]]
            steps[i] += 1
            adamw_reference_(
                [self.params[i]],
                [self.grads[i]],
                [exp_avgs[i]],
                [exp_avg_sqs[i]],
                [steps[i]],
                coef,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=weight_decay,
                maximize=maximize,
            )
        self.grads, self.relaid = [], []


def _refuse_sparse(grads: Sequence[torch.Tensor]) -> None:
    for grad in grads:
        if grad.layout is not torch.strided:
            raise TypeError(
                f"a gradient of shape {tuple(grad.shape)} is sparse; AdamW takes dense gradients: build the Embedding "
                "with sparse=False, or use torch.optim.SparseAdam for it"
            )
