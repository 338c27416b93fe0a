"""What the optimizers share: the step, and how state is made, saved and loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks as _global_post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as _global_pre_hooks

from pyft.errors import NonFiniteError
from pyft.ops.rules import RULES, Rule
from pyft.ops.update import check_parameter
from pyft.optim import state as state_of
from pyft.optim.backward import BackwardNorms, UpdateHooks
from pyft.optim.decide import Decision, decide
from pyft.optim.device_plan import DevicePlan, device_policy, takes_all
from pyft.optim.options import Settings, StepOptions, checked
from pyft.optim.report import LastStep
from pyft.optim.step_plan import GroupStep, Member, StepPlan, add_exactly


_EVERY_MOMENT = frozenset(name for rule in RULES.values() for name in rule.kept)


class _Shielded:
    """Keeps torch's load_state_dict from casting a state tensor to the dtype of its parameter."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _shield(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    shielded = {
        key: {name: _Shielded(value) for name, value in of_one.items()} if isinstance(of_one, dict) else of_one
        for key, of_one in state_dict["state"].items()
    }
    return {**state_dict, "state": shielded}


def _unshield(of_one: Any) -> None:
    if not isinstance(of_one, dict):
        return
    for name, value in of_one.items():
        if isinstance(value, _Shielded):
            # A copy: what the user keeps of the loaded state must not change with every step.
            of_one[name] = value.value.clone() if isinstance(value.value, Tensor) else value.value


@dataclass
class _InBackward:
    """What happened in backward since the last step."""

    sums: list[float]
    smallest: float = 1.0
    bad: str | None = None


class CoreOptimizer(torch.optim.Optimizer):
    """Base of the optimizers. A class gives the rule of a group, its numbers, and checks its hyperparameters."""

    # Names of all state that the class may keep, for loading.
    _moments: tuple[str, ...] = ()
    # torch reads these from a group that it loads.
    _for_torch: dict[str, Any] = {}
    _norms: BackwardNorms | None = None

    def __init__(self, params: Any, defaults: dict[str, Any], options: dict[str, Any]) -> None:
        self._options = {name: value for name, value in options.items() if name != "norm_in_backward"}
        self.settings = checked(options, type(self).__name__)
        self.last_step: LastStep | None = None
        self.skipped_steps = 0
        self._own_norms = options.get("norm_in_backward") is True
        self._forget()
        given = options.get("norm_in_backward")
        if isinstance(given, BackwardNorms):
            self._norms = given
        super().__init__(params, {**defaults, "decay_to_init": options.get("decay_to_init", 0.0), **self._for_torch})
        self._watch()

    def _forget(self) -> None:
        """Nothing that belongs to other parameters than these: plans, hooks."""
        self._plan: StepPlan | None = None
        self._made: list[tuple[Tensor, list[str]]] = []
        self._plans: dict[int, StepPlan] = {}
        self._hooks: UpdateHooks | None = None
        self._norms = None
        self._backward = _InBackward([])

    def _watch(self) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        if self.settings.step_in_backward:
            _refuse_several_processes()
            self._hooks = self._hooks or UpdateHooks(self._update_in_backward)
            self._hooks.watch(params)
        if self._own_norms and self._norms is None:
            self._norms = BackwardNorms(params, 1, self.settings.clip_value)

    # What a class says of itself.

    def _rule(self, group: dict[str, Any]) -> Rule:
        raise NotImplementedError

    def _numbers(self, group: dict[str, Any]) -> dict[str, float]:
        """The numbers of the rule by name; lr, weight_decay and maximize are taken from the group."""
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _keys(self, param: Tensor, group: dict[str, Any]) -> tuple[str, ...]:
        return state_of.keys_of(self._rule(group), param, self.settings, group["decay_to_init"])

    def _make_entry(self, key: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        return state_of.make_entry(key, param, self.settings)

    def _adopt(self, param: Tensor, of_one: dict[str, Any]) -> None:
        state_of.adopt(param, of_one, self._moments, self.settings)

    # Options that may change in mid-training.

    @property
    def clip_norm(self) -> Any:
        """As in `StepOptions`; may be set between steps."""
        return self._options.get("clip_norm")

    @clip_norm.setter
    def clip_norm(self, value: Any) -> None:
        options = {**self._options, "clip_norm": value}
        self.settings = checked(options, type(self).__name__)
        self._options, self._plan, self._plans = options, None, {}

    @property
    def norm_in_backward(self) -> BackwardNorms | None:
        """Where norms that were taken in backward come from; may be set between steps."""
        return self._norms

    @norm_in_backward.setter
    def norm_in_backward(self, norms: BackwardNorms | None) -> None:
        self._norms = norms

    # Groups, saving and loading.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, for instance after unfreezing them; their step counters start at 0."""
        foreign = [key for key in param_group if key in StepOptions.__annotations__ and key != "decay_to_init"]
        if foreign:
            raise ValueError(
                f"{foreign[0]} is for the whole optimizer, not for a group; give it to {type(self).__name__}()"
            )
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
            for i, param in enumerate(self.param_groups[-1]["params"]):
                self._check_parameter(param, f"params[{i}]")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._plan, self._plans = None, {}
        if self._hooks is not None:
            self._hooks.watch(self.param_groups[-1]["params"])
        if self._own_norms and self._norms is not None:
            self._norms.watch(self.param_groups[-1]["params"])

    def params_changed(self) -> None:
        """Take note that parameters were put into or taken out of groups; `FreezePlan.thaw` calls it."""
        for group in self.param_groups:
            for param in group["params"]:
                self._check_parameter(param, "params")
        self._plan, self._plans, self._made = None, {}, []
        self._watch()
        if self._own_norms and self._norms is not None:
            self._norms.remove()
            self._norms.watch([param for group in self.param_groups for param in group["params"]])

    def _check(self, group: dict[str, Any]) -> None:
        at_least_zero(group, "lr", "decay_to_init")
        self._check_group(group)

    def _check_parameter(self, param: Tensor, name: str) -> None:
        check_parameter(param, name)
        if param.dtype == torch.float16 and self.settings.weights != "plain":
            raise ValueError(
                f"{name} is float16, and weights='{self.settings.weights}' is for bfloat16; use weights='plain', or "
                "bfloat16 parameters"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict of the same class of pyft or torch, whatever the dtype of its moments.

        Raises:
            ValueError: groups, sizes or hyperparameters do not fit.
        """
        handle = self.register_load_state_dict_pre_hook(_shield)
        before = self.state, self.param_groups
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.state, self.param_groups = before
            raise
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "settings" in state:
            self._forget()
        self._plan, self._plans, self._made = None, {}, []
        for of_one in self.state.values():
            _unshield(of_one)
        for group in self.param_groups:
            for key, value in self._for_torch.items():
                group.setdefault(key, value)
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            self._check(group)
            for param in group["params"]:
                if self.state.get(param):
                    self._check_state(group, self.state[param])
                    self._adopt(param, self.state[param])
        if "settings" in state:
            self._watch()

    def _check_state(self, group: dict[str, Any], of_one: dict[str, Any]) -> None:
        """Moments that are missing would be zeros beside a high step counter."""
        foreign = sorted(_EVERY_MOMENT.difference(self._moments) & set(of_one))
        needed = [name for name in self._rule(group).kept if name in self._moments and self._rule(group).counts]
        missing = [name for name in needed if name not in of_one and f"{name}_q8" not in of_one]
        if foreign or (missing and not self._rule(group).factored):
            raise ValueError(
                f"the loaded state is not that of {type(self).__name__}: it holds {', '.join(sorted(of_one))}"
                + (f", but not {', '.join(missing)}" if missing else "")
            )

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps three names here; plans hold addresses and hooks belong to these very parameters.
        kept = ("settings", "_options", "last_step", "skipped_steps", "_own_norms")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns what `closure` returns, or None.

        Raises:
            NonFiniteError: a gradient is NaN or inf and `on_nonfinite` says "raise". Nothing was written, no counter
                moved.
        """
        if torch.compiler.is_compiling():
            return self._step_outside_graph(closure)
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
        if self.settings.step_in_backward:
            self._close_backward()
            return loss
        plan = self._plan_of_this_step()
        free = self.settings.grads == "free"
        known = None if self._norms is None else self._known_sums
        decision = decide(plan, self.settings, known)
        skipped = self._refuses(plan, decision)
        if skipped:
            self.skipped_steps += 1
            if free:
                for param in plan.params:
                    param.grad = None
        else:
            plan.step(self._group_steps(), decision.scales, self.settings.clip_value, free)
            self._made = []
        bad = None if decision.bad is None else self._name(plan.params[decision.bad])
        coef = 1.0 if skipped else decision.smallest
        self.last_step = LastStep(decision.total_norm, coef, skipped, bad, self.skipped_steps)
        return loss

    _observed_step = torch.optim.Optimizer.profile_hook_step(_step)
    _step_outside_graph = torch.compiler.disable(_step)

    def _known_sums(self, plan: StepPlan) -> list[float]:
        assert self._norms is not None
        return self._norms.sums(plan.grads, self.settings.clip_value)

    def _group_steps(self) -> list[GroupStep]:
        steps = []
        for group in self.param_groups:
            rule = self._rule(group)
            numbers = self._numbers(group)
            steps.append(GroupStep(rule, tuple([float(numbers[name]) for name in rule.hyper]), group["decay_to_init"]))
        return steps

    def _refuses(self, plan: StepPlan, decision: Decision) -> bool:
        """Whether the step must not be taken; then state that was made for it is gone again."""
        policy = self.settings.policy
        if decision.bad is None or policy == "ignore":
            return False
        self._unmake()
        if policy == "raise":
            raise NonFiniteError(self._nonfinite_message(plan.params[decision.bad], decision.total_norm))
        return True

    def _unmake(self) -> None:
        for param, keys in self._made:
            of_one = self.state[param]
            for key in keys:
                of_one.pop(key, None)
            if not of_one:
                del self.state[param]
        if self._made:
            self._made, self._plan, self._plans = [], None, {}

    def _plan_of_this_step(self) -> StepPlan:
        plan = self._plan
        if plan is not None and [self._rule(group) for group in self.param_groups] == plan.rules:
            known = plan.gradients(self.param_groups, self.state)
            if known is not None and self._pulls_fit(plan) and plan.take(known):
                return plan
        present = [
            (param, number)
            for number, group in enumerate(self.param_groups)
            for param in group["params"]
            if param.grad is not None
        ]
        self._plan = self._build_plan(present)
        grads: list[Any] = [param.grad for param, _ in present]
        self._plan.take(grads)
        return self._plan

    def _pulls_fit(self, plan: StepPlan) -> bool:
        """Whether each group that decays to the first value has that value in the plan."""
        pulled = {number for number, group in enumerate(self.param_groups) if group["decay_to_init"] != 0.0}
        return not pulled or all("init" in member.state for member in plan.members if member.group in pulled)

    def _build_plan(self, present: list[tuple[Tensor, int]]) -> StepPlan:
        numbers = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        members = []
        for param, group_number in present:
            self._check_parameter(param, f"parameter {numbers[id(param)]}")
            group = self.param_groups[group_number]
            keys = self._keys(param, group)
            fresh = self._complete_state(param, group, keys)
            of_one = {key: self.state[param][key] for key in keys}
            members.append(Member(param, group_number, numbers[id(param)], of_one, fresh))
        return StepPlan(
            members,
            [self._rule(group) for group in self.param_groups],
            self.state,
            weights=self.settings.weights,
            seed=self.settings.seed,
            by_rows=self.settings.limits.agc is not None,
        )

    def _complete_state(self, param: Tensor, group: dict[str, Any], keys: Iterable[str]) -> bool:
        """Make what is missing; True when moments are new."""
        if not keys:
            return False
        of_one = self.state[param]
        if of_one:
            self._adopt(param, of_one)
        missing = [key for key in keys if key not in of_one]
        for key in missing:
            of_one[key] = self._make_entry(key, param, group)
        if missing:
            self._made.append((param, missing))
        made = {key for of_same, names in self._made if of_same is param for key in names}
        moments = {key for key in keys if key not in ("step", "init", "remainder", "compensation")}
        return bool(moments) and moments <= made

    def _nonfinite_message(self, param: Tensor, total_norm: float | None) -> str:
        return (
            f"the gradients have total norm {total_norm}; the first that is not finite belongs to parameter "
            f"{self._name(param, quoted=True)} of shape {tuple(param.shape)}. Nothing was updated. Lower the learning "
            "rate, look for NaN in the inputs, or train in fp32"
        )

    def _name(self, param: Tensor, quoted: bool = False) -> str:
        names = [name for group in self.param_groups for name in group.get("param_names", [])]
        every = [other for group in self.param_groups for other in group["params"]]
        place = next(i for i, other in enumerate(every) if other is param)
        if len(names) != len(every):
            return f"number {place}"
        return f"'{names[place]}'" if quoted else str(names[place])

    # Updates in backward.

    @torch.no_grad()
    def _update_in_backward(self, param: Tensor) -> None:
        group = next(n for n, group in enumerate(self.param_groups) if any(other is param for other in group["params"]))
        plan = self._plans.get(id(param))
        grad = param.grad
        if grad is None:
            return
        fits = plan is not None and plan.rules == [self._rule(g) for g in self.param_groups] and self._pulls_fit(plan)
        same = fits and plan is not None and all(plan.members[0].state[k] is v for k, v in self._held(plan).items())
        if plan is None or not same or not plan.take([grad]):
            plan = self._plans[id(param)] = self._build_plan([(param, group)])
            plan.take([grad])
        grad = None
        decision = decide(plan, self.settings, None)
        if decision.total_norm is not None:
            self._backward.sums.append(decision.total_norm**2)
        if decision.bad is not None:
            self._backward.bad = self._backward.bad or self._name(param)
        if not self._refuses(plan, decision):
            self._backward.smallest = min(self._backward.smallest, decision.smallest)
            plan.step(self._group_steps(), decision.scales, self.settings.clip_value, True)
            self._made = []
        param.grad = None

    def _held(self, plan: StepPlan) -> dict[str, Any]:
        member = plan.members[0]
        return {key: self.state[member.param].get(key) for key in member.state} if member.state else {}

    def _close_backward(self) -> None:
        """Update what was not seen in backward, and report what was."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update_in_backward(param)
        self._watch()
        done, self._backward = self._backward, _InBackward([])
        skipped = done.bad is not None and self.settings.policy == "skip"
        self.skipped_steps += skipped
        total = math.sqrt(add_exactly(done.sums)) if done.sums else None
        self.last_step = LastStep(total, done.smallest, skipped, done.bad, self.skipped_steps)


def _refuse_several_processes() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            "step_in_backward=True in several processes would update before gradients are averaged over them; use "
            "step_in_backward=False"
        )


def at_least_zero(group: dict[str, Any], *names: str) -> None:
    """Raise a ValueError that names the first of these hyperparameters that is negative or NaN."""
    for name in names:
        if not float(group[name]) >= 0.0:
            raise ValueError(f"{name} must be 0 or more, got {group[name]}")


def rates(group: dict[str, Any], name: str) -> tuple[float, ...]:
    """Numbers that must lie in [0, 1): one, or several as a sequence.

    Raises:
        ValueError: one does not.
    """
    values = group[name] if isinstance(group[name], (tuple, list)) else (group[name],)
    for i, value in enumerate(values):
        if not 0.0 <= float(value) < 1.0:
            place = f"{name}[{i}]" if isinstance(group[name], (tuple, list)) else name
            raise ValueError(f"{place} must be in [0, 1), got {value}")
    return tuple(float(value) for value in values)


__all__ = ["RULES", "CoreOptimizer", "LastStep", "Settings", "at_least_zero", "rates"]
