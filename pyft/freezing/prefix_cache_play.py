"""One forward pass in which the calls of the frozen prefix are filled in: their work is stored, or not done at all.

What a replayed call gives goes on as a stand-in, a tensor with shape and dtype. An operation of plain code on
stand-ins only (a residual sum, a view) gives a stand-in as well. Whatever else takes a value has it from the store.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from pyft.errors import PyftError
from pyft.freezing.prefix_cache_trace import Site, tensors_in

Key = tuple[str, str | int, int]
"""A value: ("call", "<module>#<call>", leaf) or ("op", place among the operations on stand-ins, leaf)."""
Dim = int | str
BATCH, LENGTH = "B", "T"
_COMPOSED = torch._C.DispatchKey.CompositeImplicitAutograd


class StandInError(PyftError, RuntimeError):
    """The values of a stand-in were asked for: the forward pass takes another way than the one that was looked at."""


@dataclass(frozen=True)
class Leaf:
    """A tensor that a replayed call or operation gives.

    Attributes:
        dims: per dimension its size, "B" for the samples of the batch, "T" for its padded length.
        order: the dimensions in the order of memory, the slowest first.
    """

    dims: tuple[Dim, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def shape(self, batch: int, length: int) -> tuple[int, ...]:
        """The sizes for a batch."""
        return tuple(batch if dim == BATCH else length if dim == LENGTH else int(dim) for dim in self.dims)


@dataclass
class Returned:
    """What one replayed call or operation returns: its structure, and per leaf a `Leaf` or a constant."""

    structure: TreeSpec
    leaves: list[Any]


@dataclass
class Script:
    """All that is known of the prefix of a model.

    Attributes:
        sites: replayed calls.
        ops: operations of plain code on stand-ins, by name, in order.
        needed: values that others than replayed calls use: these are stored. In the order in which they come.
    """

    sites: dict[Site, Returned] = field(default_factory=dict)
    ops: list[tuple[str, Returned]] = field(default_factory=list)
    needed: list[Key] = field(default_factory=list)

    def leaf(self, key: Key) -> Leaf:
        """The tensor of a key."""
        if key[0] == "op":
            return self.ops[int(key[1])][1].leaves[key[2]]
        name, _, number = str(key[1]).rpartition("#")
        return self.sites[name, int(number)].leaves[key[2]]


def site_key(site: Site, leaf: int) -> Key:
    """The key of what a replayed call gives."""
    return ("call", f"{site[0]}#{site[1]}", leaf)


class StandIn(torch.Tensor):
    """A tensor without values, or with values that only the prefix may see.

    Attributes:
        player: of the pass it belongs to.
        key: what it stands for.
        value: the real tensor while the store is being filled; None when it is played back.
    """

    player: Player | NoInputs
    key: Key
    value: torch.Tensor | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[StandIn],
        player: Player | NoInputs,
        key: Key,
        leaf: Leaf,
        shape: tuple[int, ...],
        value: torch.Tensor | None,
    ) -> StandIn:
        """Nothing is allocated."""
        strides = value.stride() if value is not None else strides_of(shape, leaf.order)
        made = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=leaf.dtype, device=leaf.device, requires_grad=False
        )
        made.player, made.key, made.value = player, key, value
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StandIn({self.key}, {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = [tensor.player for tensor in tensors_in((args, kwargs)) if isinstance(tensor, StandIn)]
        player = next((one for one in found if not isinstance(one, NoInputs)), found[0])
        return player.operation(func, args, kwargs)


def real(value: Any) -> Any:
    """Stand-ins in nested structures replaced by their values."""
    return tree_map(lambda leaf: leaf.value if isinstance(leaf, StandIn) else leaf, value)


def strides_of(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions lie in memory in this order, the slowest first.

    >>> strides_of((2, 3, 4, 4), (0, 2, 3, 1))
    (48, 1, 12, 3)
    """
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dimensions in the order of memory, the slowest first; ties as they come.

    >>> memory_order(torch.empty(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    (0, 2, 3, 1)
    """
    strides = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim)))


def _composed(func: Any) -> bool:
    """Whether torch's kernel of an operation calls others. `func.decompose` prefers Python forms that may be others:
    dropout that is off would be a copy."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSED)


class StopForwardError(BaseException):
    """Ends a forward pass; not an Exception, so that no handler inside a model takes it."""


class Player:
    """One forward pass.

    Args:
        script: what is replayed, and what of it is needed.
        batch, length: of the batch.
        stored: gives the value of a key for the samples of the batch; None: calls run, and `captured` is told.
        captured: called with each needed value, just after it was made. It must copy: later code may write to it.
        stop: end the pass by `StopForwardError` when the last needed value has come.
    """

    def __init__(
        self,
        script: Script,
        batch: int,
        length: int,
        stored: Callable[[Key], torch.Tensor] | None = None,
        captured: Callable[[Key, torch.Tensor], None] | None = None,
        stop: bool = False,
    ) -> None:
        self.script, self.batch, self.length = script, batch, length
        self.stored, self.captured, self.stop = stored, captured, stop
        self.needed = set(script.needed)
        self.left = len(self.needed)
        self.counts: dict[str, int] = {}
        self.done_ops = 0
        self.inside = False

    def call(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a module with replayed calls."""
        if self.inside:
            return forward(*args, **kwargs)
        number = self.counts.get(name, 0)
        self.counts[name] = number + 1
        known = self.script.sites.get((name, number))
        if known is None:
            return forward(*args, **kwargs)
        if self.stored is None:
            self.inside = True
            try:
                with torch.no_grad():
                    out = forward(*real(args), **real(kwargs))
            finally:
                self.inside = False
            return self._give(known, lambda leaf: site_key((name, number), leaf), out)
        return self._give(known, lambda leaf: site_key((name, number), leaf))

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation of plain code that takes a stand-in."""
        if self.inside:
            return func(*real(args), **real(kwargs))
        if torch.is_inference_mode_enabled() and _composed(func):
            # Inference mode leaves out the layer at which composed operations are taken apart.
            return func._op_dk(_COMPOSED, *args, **kwargs)
        place = self.done_ops
        name, known = self.script.ops[place] if place < len(self.script.ops) else ("none", None)
        if known is None or str(func) != name:
            raise StandInError(
                f"the model asks for values that are not stored: {func} where {name} was expected; its forward pass "
                "takes another way for this batch than for the one that was looked at"
            )
        self.done_ops += 1
        out = func(*real(args), **real(kwargs)) if self.stored is None else None
        return self._give(known, lambda leaf: ("op", place, leaf), out)

    def _give(self, known: Returned, key_of: Callable[[int], Key], out: Any = None) -> Any:
        """Stored values and stand-ins for the leaves; from `out` where the call was made."""
        if self.stored is None:
            leaves, structure = tree_flatten(out)
            if structure != known.structure or any(
                isinstance(leaf, torch.Tensor) != isinstance(expected, Leaf)
                for leaf, expected in zip(leaves, known.leaves, strict=True)
            ):
                raise StandInError(f"{key_of(0)[1]} gives another structure for this batch than for the first one")
        else:
            leaves = known.leaves
        given = [
            self._leaf(key_of(place), expected, leaf if self.stored is None else None)
            if isinstance(expected, Leaf)
            else expected
            for place, (expected, leaf) in enumerate(zip(known.leaves, leaves, strict=True))
        ]
        return tree_unflatten(given, known.structure)

    def _leaf(self, key: Key, leaf: Leaf, value: torch.Tensor | None) -> torch.Tensor:
        if key not in self.needed:
            shape = leaf.shape(self.batch, self.length) if value is None else tuple(value.shape)
            return StandIn(self, key, leaf, shape, value)
        self.left -= 1
        if value is None:
            assert self.stored is not None
            return self.stored(key)
        if self.captured is not None:
            self.captured(key, value)
        if self.stop and not self.left:
            raise StopForwardError
        return value


class NoInputs:
    """Takes the place of a player in inputs without values, which only replayed calls may take."""

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation that takes nothing but such inputs reads them."""
        raise StandInError(f"the model reads its inputs outside of its frozen modules: {func}")


def without_values(inputs: Any, count: int) -> Any:
    """Inputs like these, of `count` samples, that have sizes and dtypes and no values."""

    def blank(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        shape = (count, *leaf.shape[1:])
        facts = Leaf(shape, memory_order(leaf), leaf.dtype, leaf.device)
        return StandIn(NoInputs(), ("inputs", 0, 0), facts, shape, None)

    return tree_map(blank, dict(inputs) if isinstance(inputs, Mapping) else inputs)


class Replayed:
    """Takes the place of a module's `forward` while a batch is played.

    Attributes:
        stage: holds the player of the pass in progress, or None.
    """

    def __init__(self, stage: Stage, name: str, forward: Callable[..., Any]) -> None:
        self.stage, self.name, self.forward = stage, name, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, or what it gave before."""
        player = self.stage.player
        if player is None:
            return self.forward(*args, **kwargs)
        return player.call(self.name, self.forward, args, kwargs)


@dataclass
class Stage:
    """Where the player of the pass in progress is found."""

    player: Player | None = None


def run_model(model: Callable[..., Any], inputs: Any) -> Any:
    """`model(**inputs)` for a mapping, `model(*inputs)` for a tuple or list, else `model(inputs)`."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def run_uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Inside, what torch.compile made runs as the Python it was made of: the compiler would take our stand-ins in."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
