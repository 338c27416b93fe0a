"""What an optimizer step needs again and again: who is updated where, on the core or in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyft.core.loader import load_core
from pyft.ops.clip import agc_factors, row_factors
from pyft.ops.grad_norm import core_takes, norm_float64
from pyft.ops.handles import handles_available, tensor_handles
from pyft.ops.rules import Rule
from pyft.ops.update import SLOTS as CORE_SLOTS
from pyft.ops.update import Step, fits_core, in_layout_of, slots_of, update_reference_
from pyft.optim import shards

AGC_EPS = 1e-3
# Parameters whose versions are moved on in one call.
BLOCK = 64


@dataclass
class Member:
    """A parameter of a plan: its group's number, its own number, its state by name, and whether that is new.

    Of a DTensor, `local` and `local_state` are what this process has; else the same as `param` and `state`.
    """

    param: Any
    group: int
    number: int
    state: dict[str, Tensor]
    fresh: bool
    local: Tensor = field(init=False)
    local_state: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.local = shards.local(self.param)
        self.local_state = shards.local_state(self.param, self.state)

    @property
    def key(self) -> int:
        """Of its random bits: other parts of a parameter get others, copies of the same part the same."""
        return self.number | shards.part_number(self.param) << 32

    def is_in(self, state: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Whether the optimizer's state still holds these very tensors."""
        held = state[self.param]
        return self.is_where_it_was() and all(held.get(key) is value for key, value in self.state.items())

    def is_where_it_was(self) -> bool:
        """Whether the parameter still has the memory that this was made for."""
        return self.local is self.param or self.param._local_tensor is self.local


@dataclass(frozen=True)
class GroupStep:
    """What a group does in a step: a rule, its numbers, and the pull toward the first value."""

    rule: Rule
    numbers: tuple[float, ...]
    decay_to_init: float
    # A learning rate that is on a GPU, in the place of the first of `numbers`.
    lr: Tensor | None = None

    @property
    def known_numbers(self) -> tuple[float, ...]:
        """`numbers` with the learning rate, which is waited for where it is on a GPU."""
        return self.numbers if self.lr is None else (float(self.lr), *self.numbers[1:])

    @property
    def for_core(self) -> tuple[str, tuple[float, ...], float]:
        """As the CPU's core takes it."""
        return self.rule.name, self.known_numbers, self.decay_to_init

    @property
    def for_device(self) -> tuple[str, tuple[float, ...], float]:
        """As the core of a GPU takes it, beside `lr`."""
        return self.rule.name, self.numbers, self.decay_to_init


def is_on_device(value: Any) -> bool:
    """Whether a hyperparameter is a tensor on a GPU."""
    return isinstance(value, Tensor) and value.is_cuda


def group_step(rule: Rule, numbers: Mapping[str, Any], decay_to_init: float) -> GroupStep:
    """From the hyperparameters of a group by name. A learning rate on a GPU is left there: asking would wait for it."""
    lr = numbers["lr"] if is_on_device(numbers["lr"]) else None
    known = {**numbers, "lr": math.nan} if lr is not None else numbers
    return GroupStep(rule, tuple([float(known[name]) for name in rule.hyper]), decay_to_init, lr)


class StepPlan:
    """One step of a fixed list of parameters: on the CPU's core, or in PyTorch those that it cannot take.

    Args:
        members: the parameters with a gradient.
        rules: the rule of each parameter group.
        state: the optimizer's state.
        weights, seed: as in `StepOptions`.
        by_rows: gradients will be clipped by rows.
        over: the processes over which the parameters are, where norms will be taken.
    """

    def __init__(
        self,
        members: list[Member],
        rules: Sequence[Rule],
        state: dict[Any, Any],
        *,
        weights: str,
        seed: int,
        by_rows: bool,
        over: shards.Shards | None = None,
    ) -> None:
        self.members, self.weights, self.seed = members, weights, seed
        self.params = [member.param for member in members]
        self.tensors = [member.local for member in members]
        self.spread = [i for i, member in enumerate(members) if member.local is not member.param]
        self.shards = over
        self.rules = list(rules)
        self._fresh = any(member.fresh for member in members)
        self.grads: list[Any] = []
        self._same_state = False
        # With copies in the parameter's layout, alive as long as the core holds their addresses.
        self.relaid: list[Tensor] = []
        self._row_factors: dict[int, Tensor] = {}
        core = load_core() if handles_available() else None
        self.held_state = None
        if core is not None:
            keys = [tuple(member.state) for member in members]
            handles = tensor_handles(self.params)
            self.held_state = core.HeldState(self.params, [member.group for member in members], state, keys, handles)
        on_core = [
            core is not None
            and not rules[member.group].factored
            and member.local.is_cpu
            and fits_core(member.local, member.local_state)
            and not (by_rows and (not rows_are_runs(member.local) or shards.has_cut_row(member.param)))
            for member in members
        ]
        self.fast = [i for i, fits in enumerate(on_core) if fits]
        self.slow = [i for i, fits in enumerate(on_core) if not fits]
        self.fast_params = [self.tensors[i] for i in self.fast]
        # Autograd keeps DTensors, which count their own versions.
        self._versions = self.fast_params + [self.params[i] for i in self.spread if i in set(self.fast)]
        blocks = [tuple(self.params[i : i + BLOCK]) for i in range(0, len(self.params), BLOCK)]
        self._version_blocks = blocks if not self.slow and not self.spread else None
        self.core_plan = self._core_plan(core) if self.fast else None

    def _core_plan(self, core: Any) -> Any:
        present: list[int] = []
        tensors: list[Tensor] = []
        for i in self.fast:
            member = self.members[i]
            slots = slots_of(self.rules[member.group], self.weights)
            by_place = sorted((CORE_SLOTS.index(slots[key]), tensor) for key, tensor in member.local_state.items())
            present.append(sum(1 << place for place, _ in by_place))
            tensors += [tensor for _, tensor in by_place]
        # Memory that a step writes to without a look is not freed, whatever happens to its tensors.
        self._kept = [tensor.detach() for tensor in tensors]
        of_fast = [self.members[i] for i in self.fast]
        return core.UpdatePlan(
            tensor_handles(self.fast_params),
            present,
            tensor_handles(tensors),
            [member.group for member in of_fast],
            [member.key for member in of_fast],
            [member.fresh for member in of_fast],
            self.seed,
            self.weights,
        )

    def gradients(
        self, param_groups: list[dict[str, Any]], state: dict[Any, Any], same_state: bool
    ) -> list[Tensor] | None:
        """The gradients of `params`, of DTensors this process's parts; None when the parameters that have one, their
        groups or any of their state tensors are no longer those of this plan, or there is no core to tell it quickly.
        With `same_state` nobody can have changed the state tensors since the last step; then they are not looked at,
        nor by the next `take`.
        """
        self._same_state = same_state
        known = None if self.held_state is None else self.held_state.gradients(param_groups, state, same_state)
        return None if known is None else shards.local_gradients(self.members, self.spread, known)

    def take(self, grads: list[Tensor]) -> bool:
        """Take this step's gradients; False when a parameter's storage has changed and a new plan is needed.

        Raises:
            TypeError: a gradient is sparse.
        """
        try:
            return self._take(grads)
        except RuntimeError:
            refuse_sparse(grads)
            raise

    def _take(self, grads: list[Tensor]) -> bool:
        refuse_sparse([grads[i] for i in self.slow])
        for i in self.slow:
            check_shape(self.tensors[i], grads[i])
        self.grads, self._row_factors = grads, {}
        if self.core_plan is None:
            return True
        fast = grads if not self.slow else [grads[i] for i in self.fast]
        same_state, self._same_state = self._same_state, False
        to_be_copied = self.core_plan.set_gradients(fast, self.held_state, same_state)
        if to_be_copied:
            fast = list(fast)
            for i in to_be_copied:
                check_shape(self.fast_params[i], fast[i])
                takes = fast[i].is_cpu and core_takes(fast[i])
                grad = fast[i] if takes else fast[i].to(device="cpu", dtype=torch.float32)
                fast[i] = in_layout_of(self.fast_params[i], grad)
            self.relaid = fast
            to_be_copied = self.core_plan.set_gradients(fast, self.held_state, same_state)
        return to_be_copied is not None

    def total_of_squares(self, clip_value: float | None) -> float:
        """Sum of squares over all gradients; the same bits for any order of parameters and number of threads."""
        if self.core_plan is not None and not self.slow and self.shards is None:
            return self.core_plan.total_of_squares(clip_value)
        return add_exactly(self.sums_of_squares(clip_value, []))

    def sums_of_squares(self, clip_value: float | None, known: list[float]) -> list[float]:
        """Sum of squares of each gradient, after the clamp. `known` holds sums that need not be taken, NaN for others;
        empty for none."""
        sums = [math.nan] * len(self.params)
        if self.core_plan is not None:
            of_fast = self.core_plan.sums_of_squares(clip_value, [known[i] for i in self.fast] if known else [])
            for i, value in zip(self.fast, of_fast, strict=True):
                sums[i] = value
        for i in self.slow:
            sums[i] = _sum_of_squares(self.grads[i], clip_value)
        return sums if self.shards is None else self.shards.totals([sums])[0]

    def clip_rows(self, clip_value: float | None, limit: float) -> tuple[list[float], list[float], list[float]]:
        """Take the factors of adaptive clipping, for the next `step`: sums of squares of each gradient before and after
        it, and its smallest factor."""
        before, after = [math.nan] * len(self.params), [math.nan] * len(self.params)
        smallest = [1.0] * len(self.params)
        if self.core_plan is not None:
            for i, *of_one in zip(self.fast, *self.core_plan.clip_rows(clip_value, limit, AGC_EPS), strict=True):
                before[i], after[i], smallest[i] = of_one
        cut = [i for i in self.slow if self.shards is not None and shards.has_cut_row(self.params[i])]
        for i in self.slow:
            if i not in cut:
                sums, factors = _row_factors(self.tensors[i].detach(), self.grads[i], clip_value, limit)
                self._row_factors[i] = factors
                before[i], after[i] = float(sums.sum()), float((sums * factors.double() ** 2).sum())
                smallest[i] = min([1.0, *factors.tolist()])
        if self.shards is None:
            return before, after, smallest
        return self._clip_cut_rows(cut, before, after, smallest, clip_value, limit)

    def _clip_cut_rows(
        self,
        cut: list[int],
        before: list[float],
        after: list[float],
        smallest: list[float],
        clip_value: float | None,
        limit: float,
    ) -> tuple[list[float], list[float], list[float]]:
        """The rest of `clip_rows` for parameters spread over processes, some of which, `cut`, are rows that several
        processes have parts of."""
        assert self.shards is not None
        weights = [0.0] * len(self.params)
        for i in cut:
            before[i], after[i] = _sum_of_squares(self.grads[i], clip_value), 0.0
            weights[i] = _sum_of_squares(self.tensors[i].detach(), None)
        before, after, weights = self.shards.totals([before, after, weights])
        factors = row_factors(
            torch.tensor([before[i] for i in cut], dtype=torch.float64).sqrt(),
            torch.tensor([weights[i] for i in cut], dtype=torch.float64).sqrt(),
            limit,
            AGC_EPS,
        )
        for i, factor in zip(cut, factors.float().tolist(), strict=True):
            self._row_factors[i] = torch.tensor([factor])
            after[i], smallest[i] = before[i] * factor**2, factor
        return before, after, smallest

    def step(
        self, groups: Sequence[GroupStep], scales: float | list[float], clip_value: float | None, free: bool
    ) -> None:
        """Advance the counters and update all parameters and moments.

        Args:
            groups: one for each parameter group.
            scales: the factor of all gradients, or of each.
            clip_value: gradients are clamped to it first.
            free: give each gradient up as soon as it was used.
        """
        if self.core_plan is not None:
            self._core_step(groups, scales, clip_value, free)
        for i in self.slow:
            member = self.members[i]
            group = groups[member.group]
            if "step" in member.state:
                member.state["step"] += 1
            step = Step(
                group.rule,
                group.known_numbers,
                group.decay_to_init,
                scales if isinstance(scales, float) else scales[i],
                clip_value,
                self._row_factors.get(i),
                self.weights,
                self.seed,
                member.key,
                member.fresh,
            )
            update_reference_(member.local, self.grads[i], member.local_state, step)
            if free:
                member.param.grad = None
        if self._fresh:
            for member in self.members:
                member.fresh = False
            self._fresh = False
        self.grads, self.relaid, self._row_factors = [], [], {}

    def _core_step(
        self, groups: Sequence[GroupStep], scales: float | list[float], clip_value: float | None, free: bool
    ) -> None:
        # Raw writes are unseen by autograd: without this a saved, now stale weight is used in silence. Before the
        # update, which drives the parameters' records out of the cache.
        if self.held_state is not None and self._version_blocks is not None:
            self.held_state.increment_versions(torch.autograd.graph.increment_version, self._version_blocks)
        else:
            torch.autograd.graph.increment_version(self._versions)
        handles: list[Any] = []
        if free:
            used = self.relaid or (self.grads if not self.slow else [self.grads[i] for i in self.fast])
            handles = tensor_handles(used)
            del used
            self.relaid = []
            for i in self.fast:
                self.params[i].grad = None
            slow = set(self.slow)
            self.grads = [grad if i in slow else None for i, grad in enumerate(self.grads)] if slow else []
        assert self.core_plan is not None
        of_fast = [scales] if isinstance(scales, float) else [scales[i] for i in self.fast]
        self.core_plan.step([group.for_core for group in groups], of_fast, clip_value, handles)


def add_exactly(sums: Sequence[float]) -> float:
    """Their sum, rounded once, hence the same for any order. Not finite if a term is not."""
    try:
        return math.fsum(sums)
    except OverflowError:
        return math.inf


def rows_are_runs(param: Tensor) -> bool:
    """Whether each entry of the first dimension is a run of memory."""
    return param.ndim <= 1 or param.numel() == 0 or param.shape[0] == 1 or param[0].numel() == param.stride(0)


def _sum_of_squares(grad: Tensor, clip_value: float | None) -> float:
    if clip_value is not None and not bool(torch.isfinite(grad).all()):
        return math.nan
    wide = grad.detach().double()
    if clip_value is not None:
        wide = wide.clamp(-clip_value, clip_value)
    return float(norm_float64([wide])) ** 2


def _row_factors(param: Tensor, grad: Tensor, clip_value: float | None, limit: float) -> tuple[Tensor, Tensor]:
    g = grad.detach().double()
    if clip_value is not None:
        # What is not finite stays so, to be found.
        g = torch.where(g.isfinite(), g.clamp(-clip_value, clip_value), math.nan)
    sums, factors = agc_factors(g, param, limit, AGC_EPS)
    return sums, factors.float()


def check_shape(param: Tensor, grad: Tensor) -> None:
    """Raise a ValueError where a gradient is not of its parameter's shape."""
    if grad.shape != param.shape:
        raise ValueError(
            f"a gradient has shape {tuple(grad.shape)}, its parameter {tuple(param.shape)}: one of them was replaced "
            "after backward; set p.grad to None, or run backward again"
        )


def refuse_sparse(grads: Sequence[Tensor]) -> None:
    """Raise a TypeError that names the shape of the first sparse gradient."""
    for grad in grads:
        if grad.layout is not torch.strided:
            raise TypeError(
                f"a gradient of shape {tuple(grad.shape)} is sparse; pyft.optim takes dense gradients: build the "
                "Embedding with sparse=False, or use torch.optim.SparseAdam for it"
            )
