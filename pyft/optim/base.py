"""What the optimizers share: the step, and how state is made, saved and loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks as _global_post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as _global_pre_hooks

from pyft.errors import NonFiniteError
from pyft.ops.rules import Rule
from pyft.ops.update import check_parameter
from pyft.optim import shards
from pyft.optim import state as state_of
from pyft.optim.backward import BackwardNorms, InBackward, UpdateHooks, refuse_several_processes
from pyft.optim.captured import CapturedSteps
from pyft.optim.checks import at_least_zero
from pyft.optim.decide import Decision, decide
from pyft.optim.device_plan import DevicePlan, device_policy, read, refuse_capture, reports_together, takes_all
from pyft.optim.options import StepOptions, checked
from pyft.optim.own_state import Access, OwnState
from pyft.optim.report import LastStep, name_of, nonfinite_message, number_of
from pyft.optim.step_plan import GroupStep, Member, StepPlan, add_exactly, group_step


class CoreOptimizer(CapturedSteps, OwnState, torch.optim.Optimizer):
    """Base of the optimizers. A class gives the rule of a group, its numbers, and checks its hyperparameters."""

    # Names of all state that the class may keep, for loading.
    _moments: tuple[str, ...] = ()
    # torch reads these from a group that it loads.
    _for_torch: dict[str, Any] = {}
    _norms: BackwardNorms | None = None

    def __init__(self, params: Any, defaults: dict[str, Any], options: dict[str, Any]) -> None:
        self._options = {name: value for name, value in options.items() if name != "norm_in_backward"}
        self.settings = checked(options, type(self).__name__)
        self._last_step: LastStep | None = None
        self._skipped_steps: int | Tensor = 0
        self._own_norms = options.get("norm_in_backward") is True
        self._forget()
        given = options.get("norm_in_backward")
        if isinstance(given, BackwardNorms):
            self._norms = given
        super().__init__(params, {**defaults, "decay_to_init": options.get("decay_to_init", 0.0), **self._for_torch})
        self._access = Access(False)
        self._watch()

    def _forget(self) -> None:
        """Nothing that belongs to other parameters than these: plans, hooks."""
        self._plan: StepPlan | DevicePlan | None = None
        self._made: list[tuple[Tensor, list[str]]] = []
        self._plans: dict[int, StepPlan | DevicePlan] = {}
        # Of the last step, where it was taken on a GPU.
        self._device_plan: DevicePlan | None = None
        self._captured: list[DevicePlan] = []
        self._hooks: UpdateHooks | None = None
        self._norms = None
        self._backward = InBackward()

    def _watch(self) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        if self.settings.step_in_backward:
            refuse_several_processes(params, "step_in_backward", "update")
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

    @property
    def last_step(self) -> LastStep | None:
        """What the last `step()` did; None before the first.

        On a GPU nothing waits for a step: its report is read, and waited for, when one of its attributes is looked at.
        """
        if self._device_plan is not None:
            # It has the attributes of a LastStep, and is equal to one.
            return cast(LastStep, self._device_plan.report(self._name_of_number, self._skipped_steps))
        return self._last_step

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped so far. On a GPU this waits for the last step."""
        last = self.last_step
        return int(self._skipped_steps) if last is None else last.skipped_steps

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
        shards.check_placements(param, name)
        check_parameter(shards.local(param), name)
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
        handle = self.register_load_state_dict_pre_hook(state_of.shield)
        before = self._own_state, self.param_groups
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.state, self.param_groups = before
            raise
        finally:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """As torch's; state that steps on a GPU made and then skipped is not in it, for which it is waited."""
        self._settle(self._device_plan)
        return super().state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Of a loaded state_dict only copies are kept; a copy of an optimizer may share its state.
        self._access = Access("settings" in state)
        if "settings" in state:
            self._forget()
        self._plan, self._plans, self._made = None, {}, []
        for of_one in self._own_state.values():
            state_of.unshield(of_one)
        for group in self.param_groups:
            for key, value in self._for_torch.items():
                group.setdefault(key, value)
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            self._check(group)
            for param in group["params"]:
                if self._own_state.get(param):
                    state_of.check_moments(
                        self._own_state[param], self._rule(group), self._moments, type(self).__name__
                    )
                    self._adopt_local(param, self._own_state[param])
        if "settings" in state:
            self._watch()

    def _adopt_local(self, param: Tensor, of_one: dict[str, Any]) -> None:
        """`_adopt` of this process's part of a parameter and its state."""
        before = shards.local_state(param, of_one)
        after = before if before is of_one else dict(before)
        self._adopt(shards.local(param), after)
        if after is not of_one:
            shards.write_back(param, of_one, before, after)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps three names here; plans hold addresses and hooks belong to these very parameters.
        self._settle(self._device_plan)
        kept = {name: getattr(self, name) for name in ("settings", "_options", "_own_norms")}
        kept |= {"_last_step": read(self.last_step), "_skipped_steps": self.skipped_steps}
        return {**super().__getstate__(), **kept}

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
        if isinstance(plan, DevicePlan):
            self._step_on_devices(plan, free)
            return loss
        known = None if self._norms is None else self._known_sums
        decision = decide(plan, self.settings, known)
        skipped = self._refuses(plan, decision)
        if skipped:
            self._skipped_steps += 1
            if free:
                for param in plan.params:
                    param.grad = None
        else:
            plan.step(self._group_steps(), decision.scales, self.settings.clip_value, free)
            self._made = []
        bad = None if decision.bad is None else self._name(plan.params[decision.bad])
        coef = 1.0 if skipped else decision.smallest
        self._last_step = LastStep(decision.total_norm, coef, skipped, bad, int(self._skipped_steps))
        return loss

    def _step_on_devices(self, plan: DevicePlan, free: bool) -> None:
        raises = device_policy(self.settings) == "raise"
        if raises:
            refuse_capture()
        plan.step(self._group_steps(), self.settings)
        self._note_capture(plan)
        self._device_plan = None if raises else plan
        if raises:
            found = plan.report(self._name_of_number, 0).read()
            if found.first_bad is not None:
                self._unmake(self._made)
                every = [param for group in self.param_groups for param in group["params"]]
                raise self._nonfinite(every[plan.first_bad()], found.total_norm)
            self._last_step = replace(found, skipped_steps=int(self._skipped_steps))
        if raises or not self.settings.takes_norm:
            self._made = []
        if free:
            for param in plan.params:
                param.grad = None

    def _leave_device_plan(self) -> None:
        """Keep the report of a plan that ends, and how many of its steps were skipped; nothing waits."""
        plan, self._device_plan = self._device_plan, None
        if plan is not None:
            self._last_step = cast(LastStep, plan.report(self._name_of_number, self._skipped_steps))
            self._skipped_steps = plan.skipped() + self._skipped_steps

    def _settle(self, plan: StepPlan | DevicePlan | None) -> None:
        """State that was made for steps on a GPU is in use, unless they were all skipped: ask before the next plan."""
        if not isinstance(plan, DevicePlan):
            return
        mine = set(map(id, plan.params))
        made = [entry for entry in self._made if id(entry[0]) in mine]
        if made and not plan.applied():
            self._unmake(made)
        self._made = [entry for entry in self._made if id(entry[0]) not in mine]

    _observed_step = torch.optim.Optimizer.profile_hook_step(_step)
    _step_outside_graph = torch.compiler.disable(_step)

    def _known_sums(self, plan: StepPlan) -> list[float]:
        assert self._norms is not None
        return self._norms.sums(plan.grads, self.settings.clip_value)

    def _group_steps(self) -> list[GroupStep]:
        return [
            group_step(self._rule(group), self._numbers(group), group["decay_to_init"]) for group in self.param_groups
        ]

    def _refuses(self, plan: StepPlan, decision: Decision) -> bool:
        """Whether the step must not be taken; then state that was made for it is gone again."""
        policy = self.settings.policy
        if decision.bad is None or policy == "ignore":
            return False
        self._unmake(self._made)
        if policy == "raise":
            raise self._nonfinite(plan.params[decision.bad], decision.total_norm)
        return True

    def _unmake(self, made: list[tuple[Tensor, list[str]]]) -> None:
        for param, keys in made:
            of_one = self._own_state[param]
            for key in keys:
                of_one.pop(key, None)
            if not of_one:
                del self._own_state[param]
        if made:
            self._made, self._plan, self._plans = [], None, {}

    def _plan_of_this_step(self) -> StepPlan | DevicePlan:
        plan = self._plan
        if plan is not None and [self._rule(group) for group in self.param_groups] == plan.rules:
            same_state = not self._access.given
            known = plan.gradients(self.param_groups, self._own_state, same_state)
            if known is not None and self._pulls_fit(plan) and plan.take(known):
                return plan
        present = [
            (param, number)
            for number, group in enumerate(self.param_groups)
            for param in group["params"]
            if param.grad is not None
        ]
        self._settle(self._device_plan)
        self._leave_device_plan()
        self._plan = self._build_plan(present)
        grads: list[Any] = [param.grad for param, _ in present]
        self._plan.take(shards.local_gradients(self._plan.members, range(len(grads)), grads) or [])
        return self._plan

    def _pulls_fit(self, plan: StepPlan | DevicePlan) -> bool:
        """Whether each group that decays to the first value has that value in the plan."""
        pulled = {number for number, group in enumerate(self.param_groups) if group["decay_to_init"] != 0.0}
        return not pulled or all("init" in member.state for member in plan.members if member.group in pulled)

    def _build_plan(self, present: list[tuple[Tensor, int]]) -> StepPlan | DevicePlan:
        numbers = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        for param, _ in present:
            self._check_parameter(param, f"parameter {numbers[id(param)]}")
        every = [self._keys(param, self.param_groups[number]) for param, number in present]
        self._complete_state(present, every)
        members = []
        for (param, number), keys in zip(present, every, strict=True):
            of_one = {key: self._own_state[param][key] for key in keys} if keys else {}
            members.append(Member(param, number, numbers[id(param)], of_one, self._is_fresh(param, keys)))
        rules, by_rows = [self._rule(group) for group in self.param_groups], self.settings.limits.agc is not None
        over = None
        if self.settings.takes_norm:
            params = [member.param for member in members]
            over = shards.shards_of(params, by_rows, lambda i: f"parameter {self._name(params[i])}")
        given: dict[str, Any] = {"weights": self.settings.weights, "seed": self.settings.seed, "over": over}
        if takes_all(members, rules, by_rows, over):
            return DevicePlan(members, rules, self._own_state, **given)
        return StepPlan(members, rules, self._own_state, by_rows=by_rows, **given)

    def _complete_state(self, present: list[tuple[Tensor, int]], every: list[tuple[str, ...]]) -> None:
        """Make what is missing of each parameter's keys."""
        for param in [param for param, _ in present if self._own_state.get(param)]:
            self._adopt_local(param, self._own_state[param])
        held = [self._own_state.get(param, {}) for param, _ in present]
        entries = state_of.make_missing(held, every, lambda key, place: self._new_entry(key, *present[place]))
        for (param, _), made in zip(present, entries, strict=True):
            if made:
                self._own_state[param].update(made)
                self._made.append((param, list(made)))

    def _new_entry(self, key: str, param: Tensor, group: int) -> Tensor:
        return shards.like(param, key, self._make_entry(key, shards.local(param), self.param_groups[group]))

    def _is_fresh(self, param: Tensor, keys: Iterable[str]) -> bool:
        """Whether its moments were made for the next step."""
        made = {key for of_same, names in self._made if of_same is param for key in names}
        moments = {key for key in keys if key not in ("step", "init", "remainder", "compensation")}
        return bool(moments) and moments <= made

    def _nonfinite(self, param: Tensor, total_norm: float | None) -> NonFiniteError:
        return NonFiniteError(nonfinite_message(self._name(param, quoted=True), param, total_norm))

    def _name(self, param: Tensor, quoted: bool = False) -> str:
        return name_of(self.param_groups, number_of(self.param_groups, param), quoted)

    def _name_of_number(self, number: int) -> str:
        return name_of(self.param_groups, number)

    # Updates in backward.

    @torch.no_grad()
    def _update_in_backward(self, param: Tensor) -> None:
        group = next(n for n, group in enumerate(self.param_groups) if any(other is param for other in group["params"]))
        plan = self._plans.get(id(param))
        grad = None if param.grad is None else shards.local_gradient(param, param.grad)
        if grad is None:
            return
        fits = plan is not None and plan.rules == [self._rule(g) for g in self.param_groups] and self._pulls_fit(plan)
        same = fits and plan is not None and plan.members[0].is_in(self._own_state)
        if plan is None or not same or not plan.take([grad]):
            self._settle(plan)
            plan = self._plans[id(param)] = self._build_plan([(param, group)])
            plan.take([grad])
        grad = None
        if isinstance(plan, DevicePlan):
            self._update_on_device(plan, param)
            return
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

    def _update_on_device(self, plan: DevicePlan, param: Tensor) -> None:
        if device_policy(self.settings) == "raise":
            self._step_on_devices(plan, True)
            last = self._last_step
            assert last is not None
            self._backward.sums += [] if last.total_norm is None else [last.total_norm**2]
            self._backward.smallest = min(self._backward.smallest, last.clip_coef)
            return
        plan.step(self._group_steps(), self.settings)
        self._note_capture(plan)
        self._backward.plans.append(plan)
        param.grad = None
        if not self.settings.takes_norm:
            self._made = []

    def _close_backward(self) -> None:
        """Update what was not seen in backward, and report what was."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update_in_backward(param)
        self._watch()
        done, self._backward = self._backward, InBackward()
        skipped = done.bad is not None and self.settings.policy == "skip"
        self._skipped_steps = self._skipped_steps + (skipped and not done.plans)
        total = math.sqrt(add_exactly(done.sums)) if done.sums else None
        self._last_step = LastStep(total, done.smallest, skipped, done.bad, 0)
        if done.plans:
            report, self._skipped_steps = reports_together(
                done.plans, self._name_of_number, self._last_step, self._skipped_steps
            )
            self._last_step = cast(LastStep, report)
            return
        self._last_step = replace(self._last_step, skipped_steps=int(self._skipped_steps))
