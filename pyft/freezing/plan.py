"""What trains and what stays as it is; frozen means bit-identical, statistics and all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pyft.errors import ConfigError, FrozenError
from pyft.freezing.eval_mode import keep_in_eval, let_train
from pyft.freezing.fingerprint import Fingerprint, difference, fingerprints
from pyft.freezing.lean.swap import lean as make_lean
from pyft.freezing.lean.swap import release as release_lean
from pyft.freezing.regroup import Group, check_optimizer, follow
from pyft.freezing.selection import Selection, What, check_shared, is_only_buffers, require_values, select
from pyft.freezing.table import Row, format_table, make_rows

RECORD = "_pyft_frozen"


def freeze(model: nn.Module, what: What | FreezePlan, *, only: bool = False, lean: bool = True) -> FreezePlan:
    """Freeze a part of `model`, in place, and give the plan of what trains. Make the optimizer afterwards.

    Frozen parameters get no gradient. A module whose parameters are all frozen stays in eval mode whatever
    `model.train()` says: BatchNorm keeps its statistics, dropout inside is off. A second call takes the place of the
    first. Parameters that had `requires_grad=False` before the first call stay frozen, unless `only` names them.

    Args:
        what: a glob on dotted parameter or module names ("encoder*"; `*` crosses dots), or several; a depth: the
            first k blocks and everything registered before them, negative: all but the last k (see
            `pyft.freezing.selection.blocks_of`); a function (name, parameter) -> True to freeze, also asked for
            the buffers of modules without parameters; a FreezePlan; None for nothing.
        only: `what` names what trains instead, and everything else is frozen.
        lean: frozen modules keep only what the gradient of their input needs (`pyft.lean`). False leaves them as they
            are, as does a FreezePlan whose `lean` is False.

    Raises:
        ConfigError: a name or glob without a match; a depth that the model does not have; one tensor that is to be
            frozen under one name and trained under another.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    >>> plan = freeze(model, ["0", "1"])
    >>> plan.trainable
    ['2.weight', '2.bias']
    >>> model.train()[1].training
    False
    """
    plan = make_plan(model, what, only=only)
    plan.lean = plan.lean and lean
    return plan.apply(model)


def make_plan(model: nn.Module, what: What | FreezePlan, *, only: bool = False) -> FreezePlan:
    """The plan that `freeze` would apply. Nothing is changed. Arguments and errors as in `freeze`."""
    model = unwrap(model)
    require_values(model)
    if isinstance(what, FreezePlan):
        if only:
            raise ConfigError("only=True: a FreezePlan says already what is frozen")
        what.check_names(model)
        plan = _plan(model, Selection(what.names, frozenset(what.named_modules)))
        plan.lean = what.lean
        return plan
    chosen = select(model, what)
    named = dict(model.named_parameters(remove_duplicate=False))
    if only:
        frozen = {name for name, p in named.items() if name not in chosen.parameters or not _can_train(p)}
        return _plan(model, Selection(frozenset(frozen), _buffer_modules(model, chosen.modules)))
    before = _record(model)
    already = {name for name, p in named.items() if not before.get(name, p.requires_grad)}
    return _plan(model, Selection(chosen.parameters | already, chosen.modules))


@dataclass(repr=False)
class FreezePlan:
    """What trains and what is frozen, by name. Printing it gives a short table.

    Attributes:
        trainable: names of the parameters that train, in the order of `model.named_parameters()`.
        frozen: names of those that do not.
        num_trainable: elements that train; a shared tensor counts once.
        num_total: elements of all parameters.
        eval_modules: names of the modules that stay in eval mode.
        notes: lines worth telling the user.
        lean: whether `apply` swaps frozen modules to forms that keep little for backward (`pyft.lean`).
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

    @property
    def share(self) -> float:
        """Trainable elements divided by all elements; 0.0 for a model without parameters."""
        return self.num_trainable / self.num_total if self.num_total else 0.0

    def __str__(self) -> str:
        kept = f"{len(self.eval_modules)} modules stay in eval mode" if self.eval_modules else ""
        footer = [f"{self.share:.2%} of the parameters train{'; ' + kept if kept else ''}", *self.notes]
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
        named = dict(model.named_parameters(remove_duplicate=False))
        record = _record(model)
        record = {name: record.get(name, parameter.requires_grad) for name, parameter in named.items()}
        for name, parameter in named.items():
            if name in self.names:
                parameter.requires_grad_(False)
                parameter.grad = None
            elif _can_train(parameter):
                parameter.requires_grad_(True)
        modules = dict(model.named_modules())
        keep = [modules[name] for name in self.eval_modules]
        kept_ids = {id(module) for module in keep}
        let_train(module for module in modules.values() if id(module) not in kept_ids)
        keep_in_eval(keep)
        release_lean(model)
        if self.lean:
            make_lean(model)
        model.__dict__[RECORD] = record
        self.fingerprints = fingerprints(dict(self._frozen_tensors(model)))
        return self

    def check_names(self, model: nn.Module) -> None:
        """Refuse a model whose parameters have other names.

        Raises:
            ConfigError: with the first name.
        """
        model = unwrap(model)
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        trains = set(self.trainable)
        planned = set(self.names | trains)
        names = set()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.add(name)
            # A shared tensor that trains stands in the plan under its first name.
            if first[id(parameter)] in trains:
                planned.add(name)
        for name in [*self.frozen, *self.trainable, *sorted(names)]:
            if name not in names or name not in planned:
                where = "the model" if name not in names else "the plan"
                raise ConfigError(f"freeze: the plan was made for another model: {where} has no parameter '{name}'")

    def release(self, model: nn.Module) -> None:
        """Undo everything: `requires_grad` as before the first freeze, modes as last asked for."""
        model = unwrap(model)
        record = _record(model)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(record.get(name, parameter.requires_grad))
        let_train(model.modules())
        release_lean(model)
        model.__dict__.pop(RECORD, None)

    def extend(self, model: nn.Module, what: What, *, optimizer: torch.optim.Optimizer | None = None) -> FreezePlan:
        """Freeze more: a new plan with `what` frozen too, applied to `model`.

        Args:
            optimizer: drops the parameters that froze, and their state.
        """
        more = select(unwrap(model), what)
        modules = frozenset(self.named_modules) | more.modules
        return self._change(unwrap(model), Selection(self.names | more.parameters, modules), optimizer, None)

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
        return self._change(unwrap(model), Selection(self.names - less.parameters, modules), optimizer, group)

    def _change(
        self, model: nn.Module, frozen: Selection, optimizer: torch.optim.Optimizer | None, group: Group
    ) -> FreezePlan:
        if optimizer is not None:
            check_optimizer(optimizer, group)
        plan = _plan(model, frozen)
        plan.lean = self.lean
        plan.apply(model)
        if optimizer is not None:
            follow(optimizer, model, group)
        return plan

    def verify(self, model: nn.Module) -> None:
        """Compare every frozen parameter, and the buffers of modules kept in eval mode, bit for bit with the start.

        Raises:
            FrozenError: with the first name that differs, and how many do.
            ConfigError: the plan was never applied.
        """
        model = unwrap(model)
        if self.fingerprints is None:
            raise ConfigError("verify: this plan was not applied to a model yet: call plan.apply(model) first")
        tensors = _tensors(model)
        now = fingerprints({name: tensors[name] for name in self.fingerprints if name in tensors})
        changed = []
        for name, before in self.fingerprints.items():
            how = difference(before, now[name]) if name in now else "it is gone"
            if how is not None:
                changed.append((name, how))
        if changed:
            name, how = changed[0]
            buffers = dict(model.named_buffers(remove_duplicate=False))
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
        return [name for name in self.trainable if name in named and named[name].grad is None]

    def _frozen_tensors(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        named = dict(model.named_parameters(remove_duplicate=False))
        yield from ((name, named[name]) for name in self.frozen)
        for name in self.eval_modules:
            module = model.get_submodule(name)
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


def _plan(model: nn.Module, frozen: Selection) -> FreezePlan:
    named = dict(model.named_parameters(remove_duplicate=False))
    names = frozen.parameters
    check_shared(model, names, [name for name in named if name not in names])
    first = dict(model.named_parameters())
    trainable = [name for name in first if name not in names]
    keep, notes = _kept_modules(model, frozen)
    ids = {id(first[name]) for name in trainable}
    return FreezePlan(
        trainable=trainable,
        frozen=[name for name in first if name in names],
        num_trainable=sum(first[name].numel() for name in trainable),
        num_total=sum(parameter.numel() for parameter in first.values()),
        eval_modules=keep,
        notes=notes,
        names=names,
        named_modules=sorted(frozen.modules),
        rows=make_rows(model, ids),
    )


def _kept_modules(model: nn.Module, frozen: Selection) -> tuple[list[str], list[str]]:
    """Names of the modules that stay in eval mode, one per module, and notes."""
    trains = {
        id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)
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
    """`requires_grad` of every parameter before the first plan; empty where there is none."""
    return model.__dict__.get(RECORD, {})


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


_WITH_MODE = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
