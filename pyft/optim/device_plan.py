"""The step plan of parameters on GPUs: norms, the decision and the update stay there, and nothing waits for them."""

from __future__ import annotations

import math
import struct
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyft.core.loader import load_core, load_cuda_core
from pyft.ops.grad_norm import core_takes
from pyft.ops.handles import handles_available, tensor_handles
from pyft.ops.rules import Rule
from pyft.ops.update import SLOTS, fits_core, in_layout_of, slots_of
from pyft.optim.options import Settings
from pyft.optim.report import LastStep
from pyft.optim.shards import Shards, local_gradients
from pyft.optim.step_plan import GroupStep, Member, add_exactly, check_shape, refuse_sparse, rows_are_runs

# csrc/step_decision_cuda.h, StepDecision.
_DECISION = struct.Struct("<qqddqqfI")
_CAPTURE_AGAIN = "that is part of the graph: capture the step again"
_NEW_DECISION = _DECISION.pack(0, 0, math.nan, 1.0, -1, 0, 1.0, 0)


def device_core(param: Tensor) -> Any:
    """The compiled core that updates this parameter on its GPU; None where it is on the CPU, or nothing was built."""
    return load_cuda_core() if param.is_cuda and handles_available() else None


def device_of(param: Tensor) -> torch.device:
    """Parameters with the same one are updated by one plan of the core."""
    return param.device


def device_policy(settings: Settings) -> str:
    """What is done about NaN and inf on a GPU: where nothing is said, what needs no look at the result."""
    return settings.on_nonfinite or ("skip" if settings.limits.any else "ignore")


def takes_all(members: Sequence[Member], rules: Sequence[Rule], by_rows: bool, over: Shards | None) -> bool:
    """Whether each parameter of a plan runs on the core of its GPU; norms over several processes are taken by one GPU
    in each, and not by rows."""
    if over is not None and (by_rows or len({device_of(member.local) for member in members}) > 1):
        return False
    return bool(members) and all(
        not rules[member.group].factored
        and device_core(member.local) is not None
        and fits_core(member.local, member.local_state)
        and not (by_rows and not rows_are_runs(member.local))
        for member in members
    )


def _clip_options(settings: Settings) -> dict[str, Any]:
    """As the core takes them."""
    limits, refuses = settings.limits, device_policy(settings) != "ignore"
    return {
        "clip_value": settings.clip_value,
        "agc": limits.agc,
        "tensor": limits.tensor,
        "group": limits.group,
        "global": limits.global_,
        "refuses": refuses,
        "takes_norm": limits.any or refuses,
    }


class _OfOneDevice:
    """What one GPU's part of the plan consists of."""

    def __init__(self, members: list[Member], places: list[int]) -> None:
        self.members, self.places = members, places
        device = members[0].param.device
        # From pinned memory nothing waits; a copy of its own, or the memory could be somebody else's before it is read.
        words = torch.frombuffer(bytearray(_NEW_DECISION), dtype=torch.int64)
        self.decision = (words.pin_memory() if device.type == "cuda" else words.clone()).to(device, non_blocking=True)
        self.parts = torch.empty(0, dtype=torch.float64, device=device)
        self.params = [member.local for member in members]
        self.core_plan: Any = None
        # Copies of gradients in the parameter's layout, alive until they are used.
        self.relaid: list[Tensor] = []

    def take(self, grads: list[Tensor]) -> bool:
        to_be_copied = self.core_plan.set_gradients(tensor_handles(grads))
        if to_be_copied:
            grads = list(grads)
            for i in to_be_copied:
                check_shape(self.params[i], grads[i])
                grad = grads[i] if core_takes(grads[i]) else grads[i].float()
                grads[i] = in_layout_of(self.params[i], grad.to(self.params[i].device))
            self.relaid = grads
            to_be_copied = self.core_plan.set_gradients(tensor_handles(grads))
        return to_be_copied is not None


class DeviceReport:
    """`LastStep` of a step on GPUs, read when one of its attributes is looked at: that waits for the step."""

    def __init__(
        self, decisions: list[Tensor], with_norm: bool, name: Callable[[int], str], skipped_before: Any
    ) -> None:
        self._decisions, self._with_norm, self._name = decisions, with_norm, name
        self._skipped_before = skipped_before
        self._found: LastStep | None = None

    def keep(self) -> None:
        """Before the next step writes to the same place."""
        if self._found is None:
            self._decisions = [decision.clone() for decision in self._decisions]

    def read(self) -> LastStep:
        """The report itself. Waits for the GPU."""
        if self._found is None:
            read = [_DECISION.unpack(decision.cpu().numpy().tobytes()) for decision in self._decisions]
            skipped_steps, _, total_norm, _, bad, skip, _, _ = read[0]
            self._found = LastStep(
                total_norm if self._with_norm else None,
                min(of_one[3] for of_one in read) if self._with_norm else 1.0,
                skip != 0,
                None if bad < 0 or not self._with_norm else self._name(bad),
                skipped_steps + int(self._skipped_before),
            )
            self._decisions = []
        return self._found

    total_norm = property(lambda self: self.read().total_norm, doc="As in `LastStep`.")
    clip_coef = property(lambda self: self.read().clip_coef, doc="As in `LastStep`.")
    skipped = property(lambda self: self.read().skipped, doc="As in `LastStep`.")
    first_bad = property(lambda self: self.read().first_bad, doc="As in `LastStep`.")
    skipped_steps = property(lambda self: self.read().skipped_steps, doc="As in `LastStep`.")

    def __repr__(self) -> str:
        return repr(self.read())

    def __eq__(self, other: object) -> bool:
        return self.read() == (other.read() if isinstance(other, DeviceReport) else other)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return _itself, (self.read(),)


def read(report: LastStep | DeviceReport | None) -> LastStep | None:
    """The report itself. Waits for the GPU, where it is there."""
    return report.read() if isinstance(report, DeviceReport) else report


def _itself(report: LastStep) -> LastStep:
    return report


class DevicePlan:
    """One step of a fixed list of parameters, all of which the core of their GPU takes.

    On one GPU a step is one launch, or at most three where norms are taken, whatever the number of parameters. With
    several, each takes its own norms, and a few numbers are copied from each to each, so that all come to the same
    decision.

    Args:
        members: the parameters with a gradient.
        rules: the rule of each parameter group.
        state: the optimizer's state.
        weights, seed: as in `StepOptions`.
        over: the processes over which the parameters are, where norms will be taken: between two launches the sum of
            squares of each is added over them, on the GPU.
    """

    def __init__(
        self,
        members: list[Member],
        rules: Sequence[Rule],
        state: dict[Any, Any],
        *,
        weights: str,
        seed: int,
        over: Shards | None = None,
    ) -> None:
        self.members, self.rules = members, list(rules)
        self.params = [member.param for member in members]
        core = load_core()
        self.held_state = None
        if core is not None:
            keys = [tuple(member.state) for member in members]
            handles = tensor_handles(self.params)
            self.held_state = core.HeldState(self.params, [member.group for member in members], state, keys, handles)
        self.spread = [i for i, member in enumerate(members) if member.local is not member.param]
        # Autograd keeps DTensors, which count their own versions.
        self._versions = [member.local for member in members] + [self.params[i] for i in self.spread]
        self._over = over
        self._sums = torch.empty(0)
        if over is not None:
            self._sums = torch.zeros(2 * len(members), dtype=torch.float64, device=members[0].local.device)
        by_device: dict[torch.device, list[int]] = {}
        for place, member in enumerate(members):
            by_device.setdefault(device_of(member.local), []).append(place)
        self.devices = [_OfOneDevice([members[i] for i in places], places) for places in by_device.values()]
        for of_one in self.devices:
            of_one.core_plan = self._core_plan(of_one, weights, seed)
        self._with_norm = False
        self._lrs: list[Tensor] = []
        self._lr_groups: set[int] = set()
        # What was clipped in the last step that was captured in a graph.
        self.captured_clip: dict[str, Any] | None = None
        self._handed_out: list[weakref.ref[DeviceReport]] = []

    def _core_plan(self, of_one: _OfOneDevice, weights: str, seed: int) -> Any:
        present: list[int] = []
        tensors: list[Tensor] = []
        for member in of_one.members:
            slots = slots_of(self.rules[member.group], weights)
            by_place = sorted((SLOTS.index(slots[key]), tensor) for key, tensor in member.local_state.items())
            present.append(sum(1 << place for place, _ in by_place))
            tensors += [tensor for _, tensor in by_place]
        return device_core(of_one.params[0]).UpdatePlan(
            tensor_handles(of_one.params),
            present,
            tensor_handles(tensors),
            [member.group for member in of_one.members],
            [member.key for member in of_one.members],
            [member.fresh for member in of_one.members],
            seed,
            weights,
            tensor_handles([of_one.decision]),
        )

    def gradients(
        self, param_groups: list[dict[str, Any]], state: dict[Any, Any], same_state: bool
    ) -> list[Tensor] | None:
        """As that of `StepPlan`."""
        known = None if self.held_state is None else self.held_state.gradients(param_groups, state, same_state)
        return None if known is None else local_gradients(self.members, self.spread, known)

    def take(self, grads: list[Tensor]) -> bool:
        """Take this step's gradients; False when a parameter's storage has changed and a new plan is needed.

        Raises:
            TypeError: a gradient is sparse.
        """
        try:
            return all(of_one.take([grads[i] for i in of_one.places]) for of_one in self.devices)
        except RuntimeError:
            refuse_sparse(grads)
            raise

    def step(self, groups: Sequence[GroupStep], settings: Settings) -> None:
        """Norms, decision, counters and update: enqueued on the current stream of each GPU."""
        for reference in self._handed_out:
            if (report := reference()) is not None:
                report.keep()
        self._handed_out = []
        # Raw writes are unseen by autograd: without this a saved, now stale weight is used in silence.
        torch.autograd.graph.increment_version(self._versions)
        clip = {**_clip_options(settings), "captured": is_capturing()}
        self._with_norm = clip["takes_norm"]
        if clip["captured"]:
            self.captured_clip = clip
        several = self._with_norm and len(self.devices) > 1
        if several:
            self._make_room_for_parts(len(groups))
        for number, of_one in enumerate(self.devices):
            lrs = {g: group.lr for g, group in enumerate(groups) if group.lr is not None}
            # Alive until they are used.
            self._lrs = [lr.to(of_one.decision.device, torch.float32, non_blocking=True) for lr in lrs.values()]
            self._lr_groups = set(lrs)
            of_one.core_plan.take_norms(
                [group.for_device for group in groups],
                tensor_handles(self._lrs) if self._lrs else [],
                list(lrs),
                clip,
                *self._where(number, several),
            )
        if several:
            self._exchange_parts()
        if self._with_norm and self._over is not None:
            sums = self._over.count_(self._sums[: len(self.members)])
            self._over.add_up_(sums)
        for number, of_one in enumerate(self.devices):
            of_one.core_plan.update(*self._where(number, several))
            of_one.relaid = []

    def refresh(self, groups: Sequence[GroupStep], settings: Settings) -> None:
        """Numbers of groups for replays of a captured step, on the current stream of each GPU.

        Raises:
            RuntimeError: what has changed is part of the graph.
        """
        clip = {**_clip_options(settings), "captured": True}
        if changed := [name for name, value in clip.items() if (self.captured_clip or {}).get(name) != value]:
            raise RuntimeError(f"clipping has changed since the capture ({', '.join(changed)}); {_CAPTURE_AGAIN}")
        if len(groups) != len(self.rules):
            raise RuntimeError(f"there were {len(self.rules)} groups, now there are {len(groups)}; {_CAPTURE_AGAIN}")
        for number, (group, rule) in enumerate(zip(groups, self.rules, strict=True)):
            if group.rule != rule:
                was = f"was '{rule.name}' when the step was captured and is '{group.rule.name}'"
                raise RuntimeError(f"the rule of group {number} {was}; {_CAPTURE_AGAIN}")
            if (group.lr is not None) != (number in self._lr_groups):
                kinds = "a number or a tensor on a GPU"
                raise RuntimeError(f"lr of group {number} is not what it was, {kinds}; {_CAPTURE_AGAIN}")
        pulled = {number for number, group in enumerate(groups) if group.decay_to_init != 0.0}
        if any("init" not in member.state for member in self.members if member.group in pulled):
            raise RuntimeError(f"decay_to_init was 0 when the step was captured; {_CAPTURE_AGAIN}")
        for of_one in self.devices:
            of_one.core_plan.refresh([group.for_device for group in groups])

    def _where(self, number: int, several: bool) -> tuple[list[Any], int, int, list[Any]]:
        parts = tensor_handles([self.devices[number].parts]) if several else []
        sums = tensor_handles([self._sums]) if self._over is not None else []
        return parts, len(self.devices), number, sums

    def _make_room_for_parts(self, groups: int) -> None:
        size = device_core(self.devices[0].params[0]).part_size(groups)
        for of_one in self.devices:
            if of_one.parts.shape != (len(self.devices), size):
                of_one.parts = of_one.parts.new_zeros(len(self.devices), size)

    def _exchange_parts(self) -> None:
        for source, giver in enumerate(self.devices):
            for taker in self.devices:
                if taker is not giver:
                    taker.parts[source].copy_(giver.parts[source], non_blocking=True)

    def report(self, name: Callable[[int], str], skipped_before: Any) -> DeviceReport:
        """What the last step did, to be read when it is looked at."""
        report = DeviceReport([of_one.decision for of_one in self.devices], self._with_norm, name, skipped_before)
        self._handed_out = [*(one for one in self._handed_out if one() is not None), weakref.ref(report)]
        return report

    def applied(self) -> bool:
        """Whether any step of this plan wrote anything. Waits for the GPU."""
        return _DECISION.unpack(self.devices[0].decision.cpu().numpy().tobytes())[1] > 0

    def skipped(self) -> Tensor:
        """How many steps of this plan were not taken, () int64 on its GPU: a copy."""
        return self.devices[0].decision[0].clone()

    def first_bad(self) -> int:
        """Number of the first parameter whose gradient is not finite, -1 for none. Waits for the GPU."""
        return int(_DECISION.unpack(self.devices[0].decision.cpu().numpy().tobytes())[4])


class BackwardReport(DeviceReport):
    """`LastStep` over parameters that were updated in backward, each by a plan of its own."""

    def __init__(self, reports: list[DeviceReport], on_host: LastStep, skipped_steps: Any) -> None:
        super().__init__([], True, str, 0)
        self._reports, self._on_host, self._skipped_steps = reports, on_host, skipped_steps

    def keep(self) -> None:
        for report in self._reports:
            report.keep()

    def read(self) -> LastStep:
        if self._found is None:
            every = [self._on_host, *[report.read() for report in self._reports]]
            norms = [one.total_norm for one in every if one.total_norm is not None]
            self._found = LastStep(
                math.sqrt(add_exactly([norm**2 for norm in norms])) if norms else None,
                min(one.clip_coef for one in every),
                any(one.skipped for one in every),
                next((one.first_bad for one in every if one.first_bad is not None), None),
                int(self._skipped_steps),
            )
            self._reports = []
        return self._found


def reports_together(
    plans: list[DevicePlan], name: Callable[[int], str], on_host: LastStep, skipped_before: Any
) -> tuple[DeviceReport, Any]:
    """The report of all plans of one backward, and how many steps were skipped so far, still on a GPU."""
    device = plans[0].devices[0].decision.device
    flags = [plan.devices[0].decision[5].to(device, non_blocking=True) for plan in plans]
    skipped = torch.stack(flags).amax().clamp(min=int(on_host.skipped)) + skipped_before
    reports = [plan.report(name, 0) for plan in plans]
    return BackwardReport(reports, on_host, skipped), skipped


def is_capturing() -> bool:
    """Whether a CUDA graph is captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture() -> None:
    """Raise a RuntimeError while a CUDA graph is captured."""
    if is_capturing():
        raise RuntimeError(
            "on_nonfinite='raise' looks at the result of every step, which a CUDA graph cannot; use 'skip'"
        )
