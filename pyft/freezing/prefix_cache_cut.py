"""Where the frozen prefix of a model ends: which calls are replayed, and which of their values others use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pyft.freezing.prefix_cache_play import (
    BATCH,
    LENGTH,
    Dim,
    Key,
    Leaf,
    Replayed,
    Returned,
    Script,
    Stage,
    StandIn,
    memory_order,
    real,
    run_model,
    site_key,
)
from pyft.freezing.prefix_cache_trace import (
    Dependence,
    HostReads,
    Site,
    find_sites,
    in_place_of_forward,
    shapes_by_data,
    storage_of,
    tensors_in,
    trace,
    written_by,
)

# Each round takes a call out or finds a value that is needed; a model settles in two or three.
_MOST_ROUNDS = 40


class CannotCutError(Exception):
    """Nothing of the model can be replayed; the reason in words."""


@dataclass
class Cut:
    """The prefix of a model.

    Attributes:
        script: what is replayed.
        share: of the forward pass' work (matrix products and convolutions), in [0, 1], that is replayed.
        total_flops: of the whole pass, for the example.
        blocked: what ends the prefix, in words, the first first.
        constants: what is given to replayed calls beside tensors.
        origins: names of the parameters and buffers that reach them through plain code.
    """

    script: Script
    share: float
    total_flops: int
    blocked: list[str]
    constants: list[str]
    origins: set[str]


def find_cut(model: nn.Module, trainable: Collection[str], variants: Variants) -> Cut:
    """The prefix of a model for given trainable parameters.

    The model is run a few times on variants of the example: in the modes that it comes in, and in eval mode. Modes,
    buffers and random state must be guarded by the caller.

    Raises:
        CannotCutError: there is no prefix.
    """
    modes = [(module, module.training) for module in model.modules()]
    root, dependence = trace(model, trainable, lambda: run_model(model, variants.base))
    blocked = list(dependence.sources)
    excluded: set[int] = set()
    needed: set[Key] = set()
    for _ in range(_MOST_ROUNDS):
        sites = find_sites(root, excluded)
        if not sites:
            raise CannotCutError(blocked[0] if blocked else "no module can be replayed")
        records = []
        for training, inputs in variants:
            for module, mode in modes:
                module.training = mode and training
            records.append(rehearse(model, dependence, set(sites), needed, inputs))
        found = needed.union(*(record.needed for record in records))
        out = set().union(*(record.unfit for record in records))
        script, unfit, forced = _merge(records, variants, found)
        out |= unfit
        if out:
            excluded |= {sites[site].order for site in out}
            needed = set()
            continue
        if found | forced == needed:
            break
        if not forced and not any(record.affected_by(found - needed) for record in records):
            needed = found
            break
        needed = _first_new(needed, found | forced)
    else:
        raise CannotCutError("its forward pass does not settle")
    order = {key: place for place, key in enumerate(records[0].order)}
    script.needed = sorted(needed, key=lambda key: order.get(key, len(order)))
    if not script.needed:
        raise CannotCutError("nothing that is computed in the frozen part is used after it")
    flops = sum(sites[site].flops for site in script.sites)
    share = flops / root.flops if root.flops else 0.0
    origins = set[str]().union(*(record.origins for record in records))
    return Cut(script, share, root.flops, blocked, records[0].constants, origins)


def _first_new(needed: set[Key], found: set[Key]) -> set[Key]:
    """The needed values with the first new ones: a stored value changes the places of the operations after it."""
    new = found - needed
    if any(key[0] == "call" for key in new):
        return {key for key in found if key[0] == "call"}
    first = min(int(key[1]) for key in new)
    return {key for key in found if key[0] == "call" or int(key[1]) <= first}


# ---------------------------------------------------------------- the variants of the example


@dataclass
class Variants:
    """The example, with fewer rows, and with a shorter padded length.

    Attributes:
        base, fewer, shorter: inputs of the model; `shorter` is None where there is no length.
        batch, few: rows. length, short: padded lengths; 0 where there is none.
    """

    base: Any
    fewer: Any
    shorter: Any
    batch: int
    few: int
    length: int
    short: int

    def __iter__(self) -> Iterator[tuple[bool, Any]]:
        """(training, inputs) of every rehearsal."""
        for inputs in (self.base, self.fewer, *([] if self.shorter is None else [self.shorter])):
            yield False, inputs
        yield True, self.base

    def dims(self, shapes: list[tuple[int, ...]]) -> tuple[Dim, ...] | None:
        """The meaning of each dimension, from the shapes in the order of `__iter__`; None where there is none."""
        base, fewer = shapes[0], shapes[1]
        shorter = shapes[2] if self.shorter is not None else base
        if not len(base) == len(fewer) == len(shorter):
            return None
        dims: list[Dim] = []
        for sizes in zip(base, fewer, shorter, strict=True):
            if sizes[0] == sizes[1] == sizes[2]:
                dims.append(sizes[0])
            elif sizes == (self.batch, self.few, self.batch):
                dims.append(BATCH)
            elif sizes == (self.length, self.length, self.short):
                dims.append(LENGTH)
            else:
                return None
        return tuple(dims)


# ---------------------------------------------------------------- rehearsal


@dataclass
class Record:
    """What was seen of one rehearsal.

    Attributes:
        returned: of each replayed call. ops: operations on stand-ins, with what they read.
        needed: values that something else than a replayed call or such an operation reads.
        unfit: calls that cannot be replayed after all. order: keys in the order in which they were made.
        constants: what replayed calls and operations get that is no tensor.
        origins: names of the parameters and buffers that reach them through plain code.
        writes: whether something writes to what a replayed call gave.
    """

    returned: dict[Site, tuple[Any, list[Any]]] = field(default_factory=dict)
    ops: list[tuple[str, Any, list[Any], list[Key]]] = field(default_factory=list)
    needed: set[Key] = field(default_factory=set)
    unfit: set[Site] = field(default_factory=set)
    order: list[Key] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    origins: set[str] = field(default_factory=set)
    writes: bool = False

    def affected_by(self, new: set[Key]) -> bool:
        """Whether the pass would have been another one with these values as real tensors."""
        return self.writes or any(key in new for *_, read in self.ops for key in read)


class Rehearsal(Dependence):
    """A pass with stand-ins that have values, which finds out who reads them.

    It has the methods of a `Player` that modules and stand-ins call.
    """

    def __init__(self, model: nn.Module, earlier: Dependence, sites: set[Site], needed: set[Key]) -> None:
        super().__init__(model, (), known=earlier.reasons)
        self.sites, self.plain = sites, needed
        self.record = Record()
        self.counts: dict[str, int] = {}
        # Storages made by plain code, or known before; those that a replayed call writes to.
        self.known_outside = set(self.state)
        self.inside: set[int] | None = None
        self.owners: dict[int, set[Key]] = {}
        self.origins: dict[int, set[str]] = {storage: {name} for storage, name in self.state.items()}
        self.spent: set[Key] = set()

    def call(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a module with replayed calls."""
        if self.inside is not None:
            return forward(*args, **kwargs)
        number = self.counts.get(name, 0)
        self.counts[name] = number + 1
        site = (name, number)
        if site not in self.sites:
            return forward(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, StandIn)]
        self._check_spent(given)
        self._take(name, (args, kwargs))
        lent = {storage_of(leaf.value) for leaf in given if leaf.value is not None}
        self.inside = set()
        try:
            out = forward(*real(args), **real(kwargs))
            written = self.inside
        finally:
            self.inside = None
        if written - lent:
            # It writes to memory that others than the prefix may read.
            self.record.unfit.add(site)
        for storage in written:
            self.record.writes = True
            self.spent |= self.owners.pop(storage, set())
        leaves, structure = tree_flatten(out)
        self.record.returned[site] = (structure, [_facts(leaf) for leaf in leaves])
        return self._give(leaves, structure, lambda leaf: site_key(site, leaf))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = [leaf for leaf in tensors_in((args, kwargs)) if isinstance(leaf, StandIn)]
        args, kwargs = real(args), real(kwargs)
        reason = self.reason_of(func, args, kwargs)
        written = {storage_of(tensor) for tensor in written_by(func, args, kwargs)}
        out = func(*args, **kwargs)
        if self.inside is not None:
            # What it made itself it may write to.
            self.inside |= {storage for storage in written if storage in self.owners or storage in self.known_outside}
        else:
            self._written(written)
        self.note(func, args, kwargs, out, reason)
        if self.inside is None:
            made = {storage_of(tensor) for tensor in tensors_in(out)}
            self.known_outside |= made
            for storage in made | written:
                self.origins.setdefault(storage, set()).update(*self._origins((args, kwargs)))
        if not found or self.inside is not None:
            return out
        self._check_spent(found)
        host = torch.Tag.data_dependent_output in func.tags or shapes_by_data(func, args)
        if reason is not None or written or host or not tensors_in(out):
            self.record.needed |= {leaf.key for leaf in found}
            return out
        place = len(self.record.ops)
        self._take(str(func), (args, kwargs))
        leaves, structure = tree_flatten(out)
        facts = [_facts(leaf) for leaf in leaves]
        self.record.ops.append((str(func), structure, facts, [leaf.key for leaf in found]))
        return self._give(leaves, structure, lambda leaf: ("op", place, leaf))

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Only reached where the mode is off: inside of `func` itself."""
        return func(*real(args), **real(kwargs))

    def finish(self, out: Any) -> Record:
        """Stand-ins that the model gives are needed."""
        self.record.needed |= {leaf.key for leaf in tree_leaves(out) if isinstance(leaf, StandIn)}
        return self.record

    def read_by_host(self, tensor: torch.Tensor) -> None:
        """A stand-in whose numbers Python reads must be a real tensor."""
        if isinstance(tensor, StandIn):
            self.record.needed.add(tensor.key)
            raise _AgainError
        super().read_by_host(tensor)

    def _origins(self, given: Any) -> list[set[str]]:
        return [self.origins.get(storage_of(tensor), set()) for tensor in tensors_in(real(given))]

    def _take(self, name: str, given: Any) -> None:
        """Note what a replayed call or operation gets beside the values of others."""
        self.record.origins.update(*self._origins(given))
        leaves = tree_leaves(given)
        self.record.constants.append(
            f"{name}{[repr(leaf) for leaf in leaves if isinstance(leaf, bool | float | str | torch.dtype)]}"
        )

    def _give(self, leaves: list[Any], structure: Any, key_of: Callable[[int], Key]) -> Any:
        given = []
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                given.append(leaf)
                continue
            key = key_of(place)
            self.record.order.append(key)
            self.owners.setdefault(storage_of(leaf), set()).add(key)
            if key in self.plain:
                given.append(leaf)
                continue
            facts = Leaf(tuple(leaf.shape), memory_order(leaf), leaf.dtype, leaf.device)
            given.append(StandIn(self, key, facts, tuple(leaf.shape), leaf))  # type: ignore[arg-type]
        return tree_unflatten(given, structure)

    def _written(self, storages: set[int]) -> None:
        """Plain code writes to values that the prefix gives: under one name that is harmless."""
        for storage in storages:
            keys = self.owners.get(storage, set())
            self.record.writes |= bool(keys)
            if len(keys & self.plain) > 1:
                raise CannotCutError("later code changes in place what the frozen part gives under two names")
            if len(keys) > 1:
                self.spent |= keys - self.plain

    def _check_spent(self, found: list[StandIn]) -> None:
        if any(leaf.key in self.spent for leaf in found):
            raise CannotCutError("a tensor of the frozen part is used after it was changed in place")


class _AgainError(BaseException):
    """A rehearsal has learned something and must begin again."""


def rehearse(model: nn.Module, earlier: Dependence, sites: set[Site], needed: set[Key], inputs: Any) -> Record:
    """One pass over `inputs` with the given replayed calls and needed values."""
    rehearsal = Rehearsal(model, earlier, sites, needed)
    stage = Stage(rehearsal)  # type: ignore[arg-type]
    rehearsal.known_outside.update(storage_of(tensor) for tensor in tensors_in(_as_tree(inputs)))
    with (
        contextlib.suppress(_AgainError),
        torch.no_grad(),
        in_place_of_forward(
            model, lambda name, module, forward: Replayed(stage, name, forward), {name for name, _ in sites}
        ),
        HostReads(rehearsal.read_by_host),
        rehearsal,
    ):
        rehearsal.finish(run_model(model, inputs))
    return rehearsal.record


def _as_tree(inputs: Any) -> Any:
    return dict(inputs) if hasattr(inputs, "keys") else inputs


def _facts(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return Leaf(tuple(leaf.shape), memory_order(leaf), leaf.dtype, leaf.device)


def _merge(records: list[Record], variants: Variants, needed: set[Key]) -> tuple[Script, set[Site], set[Key]]:
    """One script out of all rehearsals; calls that are unfit; values that are needed because others are unfit."""
    first, unfit, forced = records[0], set[Site](), set[Key]()
    for record in records[1:]:
        unfit |= set(first.returned) ^ set(record.returned)
    script = Script()
    for site in first.returned.keys() - unfit:
        returned = _merge_returned([record.returned[site] for record in records], variants)
        used = {place for place in range(len(first.returned[site][1])) if site_key(site, place) in needed}
        if returned is None or not _storable(returned, used):
            unfit.add(site)
        else:
            script.sites[site] = returned
    if unfit:
        return script, unfit, forced
    for place, (name, _, facts, read) in enumerate(first.ops):
        same = all(place < len(r.ops) and r.ops[place][0] == name and r.ops[place][3] == read for r in records)
        returned = None
        if same:
            returned = _merge_returned([(r.ops[place][1], r.ops[place][2]) for r in records], variants)
        used = {leaf for leaf in range(len(facts)) if ("op", place, leaf) in needed}
        if returned is None or not _storable(returned, used) or _repeats(script, read, returned):
            # What it reads is stored instead; all later numbers of operations change.
            forced |= set(read)
            break
        script.ops.append((name, returned))
    if not forced and any(len(record.ops) != len(first.ops) for record in records):
        longest = max(records, key=lambda record: len(record.ops))
        forced |= set(longest.ops[len(script.ops)][3])
    return script, unfit, forced


def _merge_returned(seen: list[tuple[Any, list[Any]]], variants: Variants) -> Returned | None:
    structure, leaves = seen[0]
    if any(other != structure or len(more) != len(leaves) for other, more in seen):
        return None
    merged: list[Any] = []
    for several in zip(*(more for _, more in seen), strict=True):
        if not isinstance(several[0], Leaf):
            if any(type(one) is not type(several[0]) or one != several[0] for one in several):
                return None
            merged.append(several[0])
            continue
        if not all(isinstance(one, Leaf) for one in several):
            return None
        dims = variants.dims([one.dims for one in several])
        same = {(one.dtype, one.device) for one in several}
        if dims is None or len(same) > 1 or several[-1].dims != several[0].dims:
            return None
        merged.append(Leaf(dims, several[0].order, several[0].dtype, several[0].device))
    return Returned(structure, merged)


def _repeats(script: Script, read: list[Key], returned: Returned) -> bool:
    """Whether an operation repeats for each sample what is the same for all: that is computed anew, not stored."""
    grows = any(isinstance(leaf, Leaf) and BATCH in leaf.dims for leaf in returned.leaves)
    return grows and bool(read) and all(BATCH not in script.leaf(key).dims for key in read)


def _storable(returned: Returned, needed: set[int]) -> bool:
    """Whether the needed leaves have one row per sample."""
    leaves = [returned.leaves[place] for place in needed]
    return all(isinstance(leaf, Leaf) and leaf.dims.count(BATCH) == 1 for leaf in leaves)


def row_inputs(inputs: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Inputs with every tensor changed."""
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf, _as_tree(inputs))
