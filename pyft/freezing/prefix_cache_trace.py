"""What of a forward pass is always the same for a sample: found by watching every operation of arbitrary model code.

Whatever an operation reads that depends on a trainable parameter, on a random draw, on the statistics of the batch or
on written state makes all that it gives depend on it as well: through integers and masks, and through numbers that
reach Python, which requires_grad does not show. A module call in which no operation depends on such a thing can be
replayed: the call may return what it returned before.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Inputs = torch.Tensor | Mapping[str, Any]

_DROPOUT = nn.modules.dropout._DropoutNd
_CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
# These read a tensor's memory without an operation that could be seen.
_HOST_READS = {"tolist", "numpy", "__array__", "__dlpack__"}


@dataclass
class Call:
    """One call of a module.

    Attributes:
        name: dotted name of the module.
        order: place among all calls of the pass.
        reason: why it cannot be replayed; None when it can.
        ops: operations inside. flops: of the matrix products and convolutions among them.
        mutates: storages made outside of the call that it writes to.
    """

    name: str
    order: int
    parent: Call | None
    module: nn.Module
    reason: str | None = None
    ops: int = 0
    flops: int = 0
    mutates: set[int] = field(default_factory=set)
    children: list[Call] = field(default_factory=list)


Site = tuple[str, int]
"""Name of a module, and the how manieth of its calls: calls inside of a replayed call do not count."""


def find_sites(root: Call, excluded: Collection[int] = ()) -> dict[Site, Call]:
    """The outermost calls that can be replayed, without those whose `order` is excluded."""
    counts: dict[str, int] = {}
    sites: dict[Site, Call] = {}

    def visit(call: Call) -> None:
        number = counts.get(call.name, 0)
        counts[call.name] = number + 1
        if call.parent is not None and call.reason is None and call.order not in excluded:
            sites[call.name, number] = call
            return
        for child in call.children:
            visit(child)

    visit(root)
    return sites


def storage_of(tensor: torch.Tensor) -> int:
    """What tells the memory of a tensor from that of others, while it lives."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists, dicts and registered output classes."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def written_by(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that an operation writes to, by its schema."""
    written: list[torch.Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written += tensors_in(value)
    return written


def argument_of(func: Any, args: Any, kwargs: Any, *names: str) -> Any:
    """The value of the first argument of an operation that has one of these names; None where it has none."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in names:
            return args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
    return None


def draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation draws random numbers, called like this."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    # Attention is marked although it draws for its dropout only; RReLU while training only.
    probability = argument_of(func, args, kwargs, "dropout_p")
    training = argument_of(func, args, kwargs, "training", "train")
    return not (probability == 0.0 or training is False)


def takes_batch_statistics(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation is a batch norm in training mode."""
    return "batch_norm" in func._schema.name and argument_of(func, args, kwargs, "training", "train") is True


class Dependence(TorchDispatchMode):
    """Follows what depends on things that change, by memory: `reasons` has the storages that do, and why.

    Args:
        model: its parameters and buffers are known by name.
        trainable: names of the parameters that train.
        known: reasons of an earlier pass, of storages that still live: a model may keep what it computed then.

    Attributes:
        sources: the reasons in the order in which the pass met them.
    """

    def __init__(self, model: nn.Module, trainable: Collection[str], known: Mapping[int, str] | None = None) -> None:
        super().__init__()
        self.reasons: dict[int, str] = dict(known or {})
        self.sources: dict[str, None] = {}
        self.host_reason: str | None = None
        self.calls: list[Call] = []
        self.created: dict[int, Call | None] = {}
        self.state: dict[int, str] = {}
        self._kept: list[Any] = []
        for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            self._keep(tensor)
            self.state[storage_of(tensor)] = name
            self.created[storage_of(tensor)] = None
            if name in trainable:
                self.reasons[storage_of(tensor)] = f"'{name}' trains"

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would load its whole compiler, in two seconds, to keep it away from what is never compiled."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reason = self.reason_of(func, args, kwargs)
        out = func(*args, **kwargs)
        self.note(func, args, kwargs, out, reason)
        return out

    def reason_of(self, func: Any, args: Any, kwargs: Any) -> str | None:
        """Why what the operation gives may be something else next time; None when it may not."""
        reason = self.host_reason
        for tensor in tensors_in((args, kwargs)):
            reason = reason or self.reasons.get(storage_of(tensor))
        if reason is None and draws(func, args, kwargs):
            name, module = self._where()
            what = "draws at random while training"
            reason = f"dropout '{name}' is on" if isinstance(module, _DROPOUT) else f"'{name}' {what} ({_short(func)})"
        if reason is None and takes_batch_statistics(func, args, kwargs):
            reason = self._batch_statistics()
        for tensor in written_by(func, args, kwargs):
            if reason is None and storage_of(tensor) in self.state:
                name, module = self._where()
                counts = isinstance(module, nn.modules.batchnorm._NormBase)
                written = self.state[storage_of(tensor)]
                reason = self._batch_statistics() if counts else f"'{name}' writes to '{written}'"
        return reason

    def note(self, func: Any, args: Any, kwargs: Any, out: Any, reason: str | None) -> None:
        """Write down what the operation did."""
        for tensor in tensors_in(out):
            key = storage_of(tensor)
            if key not in self.created:
                self.created[key] = self.calls[-1] if self.calls else None
                self._keep(tensor)
            if reason is not None:
                self.reasons.setdefault(key, reason)
        for tensor in written_by(func, args, kwargs):
            key = storage_of(tensor)
            if reason is not None:
                self.reasons.setdefault(key, reason)
            for call in self.calls:
                if not _inside(self.created.get(key), call):
                    call.mutates.add(key)
        if reason is not None and (torch.Tag.data_dependent_output in func.tags or shapes_by_data(func, args)):
            self.host_reason = self.host_reason or reason
        if reason is not None:
            self.sources.setdefault(reason)
        flops = _flops(func, args, kwargs, out)
        for call in self.calls:
            call.ops += 1
            call.flops += flops
            call.reason = call.reason or reason

    def read_by_host(self, tensor: torch.Tensor) -> None:
        """A tensor's numbers have reached Python by a way that is no operation."""
        self.host_reason = self.host_reason or self.reasons.get(storage_of(tensor))

    def _batch_statistics(self) -> str:
        return f"'{self._where()[0]}' takes the statistics of each batch while training"

    def _where(self) -> tuple[str, nn.Module | None]:
        return (self.calls[-1].name or "the model", self.calls[-1].module) if self.calls else ("the model", None)

    def _keep(self, tensor: torch.Tensor) -> None:
        # An address may be given to another tensor once its owner is gone.
        with contextlib.suppress(NotImplementedError, RuntimeError):
            self._kept.append(tensor.untyped_storage())


class HostReads(TorchFunctionMode):
    """Tells a `Dependence` of numbers that Python reads without an operation (`tolist`, `numpy`, ...)."""

    def __init__(self, told: Callable[[torch.Tensor], None]) -> None:
        self.told = told

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _HOST_READS:
            for tensor in tensors_in(args):
                self.told(tensor)
        return func(*args, **(kwargs or {}))


class Watched:
    """Takes the place of a module's `forward` and reports the call."""

    def __init__(self, trace: _Calls, name: str, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.trace, self.name, self.module, self.forward = trace, name, module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        call = self.trace.enter(self.name, self.module)
        try:
            out = self.forward(*args, **kwargs)
        finally:
            self.trace.leave()
        self.trace.look_at(call, out)
        return out


class _Calls:
    """The tree of module calls of one forward pass."""

    def __init__(self, dependence: Dependence) -> None:
        self.dependence = dependence
        self.root: Call | None = None
        self.count = 0
        self.host_states: list[Any] = []

    def enter(self, name: str, module: nn.Module) -> Call:
        open_calls = self.dependence.calls
        parent = open_calls[-1] if open_calls else None
        call = Call(name, self.count, parent, module, reason=_hook_reason(module))
        self.count += 1
        if parent is not None:
            parent.children.append(call)
        elif self.root is None:
            self.root = call
        open_calls.append(call)
        self.host_states.append(_host_random_state())
        return call

    def leave(self) -> None:
        call = self.dependence.calls[-1]
        if self.host_states.pop() != _host_random_state() and call.reason is None:
            reason = f"'{call.name}' draws from random or numpy"
            self.dependence.sources[reason] = None
            self.dependence.host_reason = self.dependence.host_reason or reason
            for one in self.dependence.calls:
                one.reason = one.reason or reason
        self.dependence.calls.pop()

    def look_at(self, call: Call, out: Any) -> None:
        """Whether what the call gives can be stored."""
        dependence = self.dependence
        call.reason = call.reason or dependence.host_reason
        if not call.ops:
            call.reason = call.reason or "it computes nothing"
        for leaf in tree_leaves(out):
            if not isinstance(leaf, torch.Tensor):
                if not isinstance(leaf, _CONSTANTS):
                    call.reason = call.reason or f"it gives a {type(leaf).__name__}"
                continue
            key = storage_of(leaf)
            if leaf.layout != torch.strided or leaf.is_quantized:
                call.reason = call.reason or "it gives a tensor that is not dense"
            call.reason = call.reason or dependence.reasons.get(key)
            if not _inside(dependence.created.get(key), call) and key not in call.mutates:
                call.reason = call.reason or "it gives on what it was given"


def trace(model: nn.Module, trainable: Collection[str], run: Callable[[], object]) -> tuple[Call, Dependence]:
    """The calls of the one forward pass that `run` makes, in the modes that the modules are in, without gradients.

    What trains must be known by name; buffers that the pass has written to come out as reasons, and are not put back.
    """
    dependence = Dependence(model, trainable)
    calls = _Calls(dependence)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with (
        torch.no_grad(),
        in_place_of_forward(model, lambda name, module, forward: Watched(calls, name, module, forward)),
        HostReads(dependence.read_by_host),
        dependence,
    ):
        run()
    changed = [n for n, b in model.named_buffers() if n not in before or not _same_bits(before[n], b)]
    if calls.root is None:
        raise RuntimeError("the model was not called")
    _mark_stateful(calls.root, changed)
    return calls.root, dependence


@contextlib.contextmanager
def in_place_of_forward(
    model: nn.Module,
    make: Callable[[str, nn.Module, Callable[..., Any]], Any],
    names: Collection[str] | None = None,
) -> Iterator[None]:
    """Give modules what `make(name, module, forward)` makes as their forward, and afterwards their own back.

    Args:
        names: of the modules; None for all.
    """
    replaced: list[tuple[nn.Module, Any, bool]] = []
    pairs = model.named_modules() if names is None else ((name, model.get_submodule(name)) for name in names)
    try:
        for name, module in pairs:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            replaced.append((module, module.__dict__.get("forward"), "forward" in module.__dict__))
            module.__dict__["forward"] = make(name, module, module.forward)
        yield
    finally:
        for module, own, had in reversed(replaced):
            if had:
                module.__dict__["forward"] = own
            else:
                module.__dict__.pop("forward", None)


def _mark_stateful(call: Call, changed: list[str]) -> None:
    """Calls of modules that hold a buffer that has changed: not every operation tells what it writes to."""
    for name in changed:
        if name.startswith(f"{call.name}." if call.name else ""):
            call.reason = call.reason or f"it changes '{name}'"
    for child in call.children:
        _mark_stateful(child, changed)


def _hook_reason(module: nn.Module) -> str | None:
    """Hooks of the user's on modules inside would not run."""
    for name, inner in module.named_modules():
        if inner is not module and (inner._forward_hooks or inner._forward_pre_hooks):
            return f"'{name}' in it has a forward hook"
    return None


def _inside(maker: Call | None, call: Call) -> bool:
    while maker is not None:
        if maker is call:
            return True
        maker = maker.parent
    return False


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    count = flop_registry.get(func._overloadpacket)
    if count is None:
        return 0
    with contextlib.suppress(Exception):  # a formula may not know an overload; the count is an estimate
        return int(count(*args, **kwargs, out_val=out))
    return 0


def shapes_by_data(func: Any, args: Any) -> bool:
    """Whether the sizes of what an operation gives depend on values: numbers that reach Python unseen."""
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def _short(func: Any) -> str:
    return str(func._schema.name.rpartition("::")[2])


def _host_random_state() -> tuple[Any, Any]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), (kind, keys.tobytes(), *rest)  # type: ignore[attr-defined]


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
