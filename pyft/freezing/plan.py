"""What trains and what stays as it is; frozen means bit-identical, statistics and all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pyft.errors import ConfigError, FrozenError
from pyft.freezing.eval_mode import keep_in_eval, let_train
from pyft.freezing.fingerprint import Fingerprint, difference, fingerprint
from pyft.freezing.lean.swap import lean as make_lean
from pyft.freezing.lean.swap import release as release_lean
from pyft.freezing.partial_modules import attach, detach
from pyft.freezing.parts import PARTS, SUFFIX, layers_with_parts, named_weights, owners
from pyft.freezing.regroup import Group, check_optimizer, follow
from pyft.freezing.select_rows import Chosen, Loss
from pyft.freezing.selection import Selection, What, check_shared, is_only_buffers, require_values, select
from pyft.freezing.table import Row, format_table, make_rows, part_lines
from pyft.freezing.wishes import Wishes, check_holders, read_wishes

RECORD = "_pyft_frozen"


def freeze(
    model: nn.Module,
    what: What | Mapping[Any, Any] | FreezePlan,
    *,
    only: bool = False,
    lean: bool = True,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> FreezePlan:
    """Freeze a part of `model`, in place, and give the plan of what trains. Make the optimizer afterwards.

    Frozen parameters get no gradient. A module whose parameters are all frozen stays in eval mode whatever
    `model.train()` says: BatchNorm keeps its statistics, dropout inside is off. A second call takes the place of the
    first. Parameters that had `requires_grad=False` before the first call stay frozen, unless `only` names them.

    With a dict, weights can train in part: `{"encoder.*.weight": pyft.Rows(0.1)}`. The rest of such a weight is frozen
    bit for bit, and its gradient and optimizer state exist for the part only; see `pyft.train_only`.

    Args:
        what: a glob on dotted parameter or module names ("encoder*"; `*` crosses dots), or several; a depth: the
            first k blocks and everything registered before them, negative: all but the last k (see
            `pyft.freezing.selection.blocks_of`); a function (name, parameter) -> True to freeze, also asked for
            the buffers of modules without parameters; a FreezePlan; None for nothing. Or a dict from glob or function
            to one of: `pyft.Rows(...)`, rows as indices, mask or slice, a dict of `rows`, `columns`, `blocks`,
            `block_size` as `pyft.train_only` takes them: only that part trains; True: frozen; False: trains whole.
            Later keys win over earlier ones, and what no key names trains.
        only: `what` names what trains instead, and everything else is frozen. In a dict, True is then: trains whole.
        lean: frozen modules keep only what the gradient of their input needs (`pyft.lean`). False leaves them as they
            are, as does a FreezePlan whose `lean` is False.
        batches, loss: what `pyft.Rows` by "gradient" and "fisher" are measured on: one or a few pairs
            (inputs, targets), and (outputs, targets) -> mean loss; or dicts for a model that gives `.loss`.

    Raises:
        ConfigError: a name or glob without a match; a depth that the model does not have; one tensor that is to be
            frozen under one name and trained under another; a weight that cannot train in part; an index out of range;
            rows to be chosen by gradients without batches.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    >>> plan = freeze(model, ["0", "1"])
    >>> plan.trainable
    ['2.weight', '2.bias']
    >>> model.train()[1].training
    False
    >>> plan = freeze(model, {"0": True, "2.weight": [1]})
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['1.weight', '1.bias', '2.bias', '2.weight_part']
    """
    plan = make_plan(model, what, only=only, batches=batches, loss=loss)
    plan.lean = plan.lean and lean
    return plan.apply(model)


def make_plan(
    model: nn.Module,
    what: What | Mapping[Any, Any] | FreezePlan,
    *,
    only: bool = False,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    draft: bool = False,
) -> FreezePlan:
    """The plan that `freeze` would apply. Nothing is changed. Arguments and errors as in `freeze`.

    Args:
        draft: choose no rows by data: how many train is right, which is not.
    """
    model = unwrap(model)
    require_values(model)
    if isinstance(what, FreezePlan):
        if only:
            raise ConfigError("only=True: a FreezePlan says already what is frozen")
        what.check_names(model)
        plan = make_from(model, Selection(what.names, frozenset(what.named_modules)), what.parts)
        plan.lean = what.lean
        return plan
    if isinstance(what, Mapping):
        wishes = read_wishes(model, what, batches, loss, draft=draft)
    else:
        wishes = Wishes(select(model, what), Selection(), {}, frozenset())
    chosen = wishes.named
    named = dict(named_weights(model, remove_duplicate=False))
    if only:
        rest = {name for name, p in named.items() if name not in chosen.parameters or not _can_train(p)}
        modules = _buffer_modules(model, chosen.modules)
        return make_from(model, Selection(frozenset(rest - wishes.partly), modules), wishes.parts)
    before = _record(model)
    already = {name for name, p in named.items() if not before.get(name, p.requires_grad)}
    frozen = (chosen.parameters | already) - wishes.partly
    return make_from(model, Selection(frozen, chosen.modules), wishes.parts)


@dataclass(repr=False)
class FreezePlan:
    """What trains and what is frozen, by name. Printing it gives a short table.

    Attributes:
        trainable: names of the parameters that train, whole or in part, in the order of `model.named_parameters()`.
        frozen: names of those that do not.
        num_trainable: elements that train; a shared tensor counts once.
        num_total: elements of all parameters.
        eval_modules: names of the modules that stay in eval mode.
        notes: lines worth telling the user.
        lean: whether `apply` swaps frozen modules to forms that keep little for backward (`pyft.lean`).
        parts: the part that trains of the weights that do not train whole, and why it was chosen, by name.
    """

    trainable: list[str]
    frozen: list[str]
    num_trainable: int
    num_total: int
    eval_modules: list[str]
    notes: list[str]
    names: frozenset[str]
    named_modules: list[str]
    rows: list[Row]
    fingerprints: dict[str, Fingerprint] | None = None
    lean: bool = True
    parts: dict[str, Chosen] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Trainable elements divided by all elements; 0.0 for a model without parameters."""
        return self.num_trainable / self.num_total if self.num_total else 0.0

    def __str__(self) -> str:
        kept = f"{len(self.eval_modules)} modules stay in eval mode" if self.eval_modules else ""
        footer = [f"{self.share:.2%} of the parameters train{'; ' + kept if kept else ''}"]
        footer += [*part_lines(self.parts), *self.notes]
        return format_table(self.rows, self.num_trainable, self.num_total, footer)

    def __repr__(self) -> str:
        return f"FreezePlan({len(self.trainable)} train, {len(self.frozen)} frozen, share {self.share:.4f})"

    def apply(self, model: nn.Module) -> FreezePlan:
        """Make `model` as the plan says, in place of any plan before, and note the bits of what is frozen.

        Gradients of frozen parameters are dropped, so that an optimizer that knows them leaves them alone.

        Raises:
            ConfigError: the parameters of `model` have other names than those the plan was made for.
        """
        model = unwrap(model)
        self.check_names(model)
        named = dict(named_weights(model, remove_duplicate=False))
        record = _record(model)
        record = {name: record.get(name, parameter.requires_grad) for name, parameter in named.items()}
        release_lean(model)
        kept_parts = self._detach_others(model)
        for name, parameter in named.items():
            if name in self.names:
                parameter.requires_grad_(False)
                parameter.grad = None
            elif _can_train(parameter) and id(parameter) not in kept_parts:
                parameter.requires_grad_(True)
        for name, chosen in self.parts.items():
            if id(named[name]) not in kept_parts:
                attach(owners(model, named[name]), chosen.entries)
        modules = dict(model.named_modules())
        keep = [modules[name] for name in self.eval_modules]
        kept_ids = {id(module) for module in keep}
        let_train(module for module in modules.values() if id(module) not in kept_ids)
        keep_in_eval(keep)
        if self.lean:
            make_lean(model)
        for module in model.modules():
            module.__dict__.pop(RECORD, None)
        model.__dict__[RECORD] = record
        self.fingerprints = {name: fingerprint(tensor) for name, tensor in self._frozen_tensors(model)}
        return self

    def _detach_others(self, model: nn.Module) -> set[int]:
        """Undo the parts that this plan does not have; `id` of each weight whose part stays as it is."""
        named = dict(named_weights(model))
        wanted = {id(named[name]): chosen.entries for name, chosen in self.parts.items()}
        kept: set[int] = set()
        for parameter in named.values():
            held = [(layer, key, layer.__dict__.get(PARTS, {}).get(key)) for layer, key in owners(model, parameter)]
            entries = wanted.get(id(parameter))
            same = entries is not None and all(part is not None and part.entries == entries for *_, part in held)
            if same and len({id(part) for *_, part in held}) == 1:
                kept.add(id(parameter))
                continue
            for layer, key, part in held:
                if part is not None:
                    detach(layer, key)
        return kept

    def check_names(self, model: nn.Module) -> None:
        """Refuse a model whose parameters have other names.

        Raises:
            ConfigError: with the first name.
        """
        names = {name for name, _ in named_weights(unwrap(model), remove_duplicate=False)}
        # Of a shared tensor that trains, the plan holds the first name only.
        first = [name for name, _ in named_weights(unwrap(model))]
        planned = self.names | set(self.trainable)
        for name in [*self.frozen, *self.trainable, *sorted(first)]:
            if name not in names or name not in planned:
                where = "the model" if name not in names else "the plan"
                raise ConfigError(f"freeze: the plan was made for another model: {where} has no parameter '{name}'")

    def release(self, model: nn.Module) -> None:
        """Undo everything: plain layers, `requires_grad` as before the first freeze, modes as last asked for."""
        model = unwrap(model)
        record = _record(model)
        release_lean(model)
        for layer in layers_with_parts(model):
            for key in list(layer.__dict__[PARTS]):
                detach(layer, key)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(record.get(name, parameter.requires_grad))
        let_train(model.modules())
        for module in model.modules():
            module.__dict__.pop(RECORD, None)

    def extend(self, model: nn.Module, what: What, *, optimizer: torch.optim.Optimizer | None = None) -> FreezePlan:
        """Freeze more: a new plan with `what` frozen too, applied to `model`.

        Args:
            optimizer: drops the parameters that froze, and their state.
        """
        more = select(unwrap(model), what)
        modules = frozenset(self.named_modules) | more.modules
        parts = {name: chosen for name, chosen in self.parts.items() if name not in more.parameters}
        frozen = Selection(self.names | more.parameters, modules)
        return self._change(unwrap(model), frozen, parts, optimizer, None)

    def thaw(
        self,
        model: nn.Module,
        what: What,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        group: Group = None,
    ) -> FreezePlan:
        """Freeze less: a new plan with `what` trained, applied to `model`.

        Args:
            optimizer: of pyft or torch: the new parameters join it with a step count of 0, the state of the others
                stays. Without it, tell the optimizer yourself, or make another one.
            group: number of the group that they join, or a dict of hyperparameters for a new group, which a scheduler
                that exists does not know. None: the group that holds the most parameters of their kind, matrices, or
                biases and norms.

        Raises:
            ConfigError: as `freeze`, and an optimizer or a group that cannot be used. Nothing is changed then.

        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> plan = freeze(model, "0")
        >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        >>> plan = plan.thaw(model, "0", optimizer=optimizer)
        >>> len(optimizer.param_groups[0]["params"])
        4
        """
        less = select(unwrap(model), what)
        modules = frozenset(self.named_modules) - less.modules
        parts = {name: chosen for name, chosen in self.parts.items() if name not in less.parameters}
        frozen = Selection(self.names - less.parameters, modules)
        return self._change(unwrap(model), frozen, parts, optimizer, group)

    def _change(
        self,
        model: nn.Module,
        frozen: Selection,
        parts: Mapping[str, Chosen],
        optimizer: torch.optim.Optimizer | None,
        group: Group,
    ) -> FreezePlan:
        if optimizer is not None:
            check_optimizer(optimizer, group)
        plan = make_from(model, frozen, parts)
        plan.lean = self.lean
        before = list(model.parameters())
        plan.apply(model)
        if optimizer is not None:
            follow(optimizer, model, group, before)
        return plan

    def verify(self, model: nn.Module) -> None:
        """Compare all that is frozen bit for bit with the start: parameters, the frozen entries of those that train in
        part, and the buffers of modules kept in eval mode.

        Raises:
            FrozenError: with the first name that differs, and how many do.
            ConfigError: the plan was never applied.
        """
        model = unwrap(model)
        if self.fingerprints is None:
            raise ConfigError("verify: this plan was not applied to a model yet: call plan.apply(model) first")
        now = {name: fingerprint(tensor) for name, tensor in self._frozen_tensors(model)}
        changed = []
        for name, before in self.fingerprints.items():
            how = difference(before, now[name]) if name in now else "it is gone"
            if how is not None:
                changed.append((name, how))
        if changed:
            name, how = changed[0]
            buffers = dict(model.named_buffers(remove_duplicate=False))
            how = f"of its frozen entries {how}" if name in self.parts else how
            more = f" ({len(changed) - 1} more like it)" if len(changed) > 1 else ""
            raise FrozenError(
                f"{'buffer' if name in buffers else 'parameter'} '{name}' was to stay frozen, but {how}{more}. "
                "Something wrote to it: an optimizer that was made before freezing, load_state_dict, an in-place "
                "operation, or a cast of the model. Freeze after such changes, and make the optimizer afterwards"
            )

    def without_gradient(self, model: nn.Module) -> list[str]:
        """Names of trainable parameters whose gradient is None; after a backward pass it should be empty.

        Reentrant activation checkpointing (`use_reentrant=True`) behind frozen layers loses all gradients without
        an error; this shows it.
        """
        named = dict(unwrap(model).named_parameters(remove_duplicate=False))
        trained = {name: f"{name}{SUFFIX}" if f"{name}{SUFFIX}" in named else name for name in self.trainable}
        return [name for name, held in trained.items() if held in named and named[held].grad is None]

    def _frozen_tensors(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        named = dict(named_weights(model, remove_duplicate=False))
        yield from ((name, named[name]) for name in self.frozen if name in named)
        for name, chosen in self.parts.items():
            if name in named:
                # What has another shape by now differs as it is.
                fits = tuple(named[name].shape) == chosen.entries.shape
                yield name, chosen.entries.rest(named[name]) if fits else named[name]
        modules = dict(model.named_modules())
        for name in self.eval_modules:
            module = modules.get(name)
            if module is None:
                continue
            for key, buffer in module.named_buffers(recurse=False):
                # Buffers that are not saved are caches, and a module may refill them at any call.
                if key not in module._non_persistent_buffers_set:
                    yield f"{name}.{key}" if name else key, buffer


def unwrap(model: nn.Module) -> nn.Module:
    """The user's model inside torch.compile, DataParallel or DistributedDataParallel."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def make_from(model: nn.Module, frozen: Selection, parts: Mapping[str, Chosen]) -> FreezePlan:
    """The plan that freezes exactly `frozen`, and trains the weights that `parts` names in part.

    Raises:
        ConfigError: a tensor with a frozen and a trained name, or a weight that cannot train in part.
    """
    named = dict(named_weights(model, remove_duplicate=False))
    names = frozen.parameters
    check_shared(model, names, [name for name in named if name not in names])
    first = dict(named_weights(model))
    for name, chosen in parts.items():
        if tuple(first[name].shape) != chosen.entries.shape:
            shape = tuple(first[name].shape)
            raise ConfigError(f"'{name}' has the shape {shape}, and the part is one of {chosen.entries.shape}")
        check_holders(model, name, first[name], chosen.entries)
    trains = {name: first[name].numel() for name in first if name not in names}
    trains.update({name: chosen.entries.count for name, chosen in parts.items()})
    keep, notes = _kept_modules(model, frozen)
    return FreezePlan(
        trainable=list(trains),
        frozen=[name for name in first if name in names],
        num_trainable=sum(trains.values()),
        num_total=sum(parameter.numel() for parameter in first.values()),
        eval_modules=keep,
        notes=notes,
        names=names,
        named_modules=sorted(frozen.modules),
        rows=make_rows(model, {id(first[name]): count for name, count in trains.items()}),
        parts=dict(parts),
    )


def _kept_modules(model: nn.Module, frozen: Selection) -> tuple[list[str], list[str]]:
    """Names of the modules that stay in eval mode, one per module, and notes."""
    trains = {
        id(parameter) for name, parameter in named_weights(model, remove_duplicate=False)
        if name not in frozen.parameters
    }  # fmt: skip
    inside: dict[int, list[str]] = defaultdict(list)
    outside: dict[int, list[str]] = defaultdict(list)

    def walk(module: nn.Module, name: str, inherited: bool) -> None:
        parameters = list(module.parameters())
        if parameters:
            keep = all(id(parameter) not in trains for parameter in parameters)
        else:
            keep = inherited or name in frozen.modules
        (inside if keep else outside)[id(module)].append(name)
        for key, child in module._modules.items():
            if child is not None:
                walk(child, f"{name}.{key}" if name else key, keep)

    walk(model, "", False)
    notes = [
        f"'{inside[key][0]}' and '{outside[key][0]}' are one module: it stays in eval mode for both"
        for key in inside
        if key in outside and isinstance(model.get_submodule(inside[key][0]), _WITH_MODE)
    ]
    return [name for name, module in model.named_modules() if id(module) in inside], notes


def _buffer_modules(model: nn.Module, trained: frozenset[str]) -> frozenset[str]:
    """Modules with buffers and without parameters that are not among, or below, the `trained` ones."""
    return frozenset(
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if is_only_buffers(module) and not any(name == top or name.startswith(f"{top}.") or not top for top in trained)
    )


def _can_train(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _record(model: nn.Module) -> dict[str, bool]:
    """`requires_grad` of every parameter before the first plan, for it or for a part of it; empty where none is."""
    record: dict[str, bool] = {}
    for prefix, module in reversed(list(model.named_modules())):
        for name, flag in module.__dict__.get(RECORD, {}).items():
            record[f"{prefix}.{name}" if prefix else name] = flag
    return record


_WITH_MODE = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
