"""Which parameters and modules `what` names."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from pyft.errors import ConfigError
from pyft.freezing.parts import named_weights

Predicate = Callable[[str, Any], bool]
What = str | Iterable[str] | int | Predicate | None


@dataclass(frozen=True)
class Selection:
    """Names of parameters (every name of a shared one), and of modules that were named themselves."""

    parameters: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()


def select(model: nn.Module, what: What) -> Selection:
    """What `what` names in `model`; the forms are those of `pyft.freeze`.

    Raises:
        ConfigError: a name or glob without a match, a depth that the model does not have, another type.
    """
    names = [name for name, _ in named_weights(model, remove_duplicate=False)]
    if what is None:
        return Selection()
    if isinstance(what, str):
        return _by_globs(model, names, [what])
    if isinstance(what, bool):
        raise ConfigError(f'freeze={what}: a glob ("encoder*"), a list of them, a depth or a function is expected')
    if isinstance(what, int):
        return _by_depth(model, what)
    if callable(what) and not isinstance(what, nn.Module):
        return _by_predicate(model, what)
    if isinstance(what, Mapping):
        raise ConfigError("freeze: a dict is for pyft.freeze(model, {...}); here names, globs or a depth are expected")
    patterns: list[Any] = list(what) if isinstance(what, Iterable) else [what]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(
                f"freeze: {type(pattern).__name__} came; names or globs (str), a depth (int), a function "
                "(name, parameter) -> bool, a FreezePlan or None are expected"
            )
    return _by_globs(model, names, patterns)


def _by_predicate(model: nn.Module, chosen: Predicate) -> Selection:
    named = named_weights(model, remove_duplicate=False)
    modules = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if is_only_buffers(module)
        and all(chosen(f"{name}.{key}" if name else key, buffer) for key, buffer in module.named_buffers())
    }
    return Selection(frozenset(name for name, parameter in named if chosen(name, parameter)), frozenset(modules))


def is_only_buffers(module: nn.Module) -> bool:
    """Whether a module has buffers and no parameters, as BatchNorm(affine=False)."""
    return next(module.parameters(), None) is None and next(module.buffers(), None) is not None


def _by_globs(model: nn.Module, names: list[str], patterns: list[str]) -> Selection:
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    parameters: set[str] = set()
    chosen: set[str] = set()
    for pattern in patterns:
        hit = {name for name in modules if fnmatchcase(name, pattern)}
        below = tuple(f"{name}." for name in hit if name)
        direct = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(_plain_name(name), pattern)}
        inside = set(names) if "" in hit else {name for name in names if name.startswith(below)}
        if not hit and not direct:
            raise ConfigError(
                f"freeze={pattern!r}: matches no parameter or module; {nearest(pattern, names + modules)}"
            )
        parameters |= direct | inside
        chosen |= hit
    return Selection(frozenset(parameters), frozenset(chosen))


def _plain_name(name: str) -> str:
    """`conv.parametrizations.weight.original0` is what the user knows as `conv.weight`."""
    return re.sub(r"(^|\.)parametrizations\.(\w+)\.original\d*$", r"\1\2", name)


def nearest(pattern: str, names: list[str]) -> str:
    """Names that were likely meant, in words."""
    plain = pattern.strip("*.")
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.5)
    near = near or [name for name in names if plain and plain.lower() in name.lower()][:3]
    near = near or [name for name in names if name and "." not in name][:6]
    return "nearest names: " + ", ".join(f"'{name}'" for name in near) if near else "the model has no parameters"


def blocks_of(model: nn.Module) -> list[str]:
    """The model's blocks in order: the children with parameters of its largest row of ModuleLists and Sequentials.

    Lists side by side (layer1, layer2, ... of a ResNet) count as one row; a list inside a block does not count.

    Raises:
        ConfigError: no list with at least two blocks.

    >>> blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    ['0', '2']
    """
    rows: dict[str, list[str]] = defaultdict(list)

    def walk(module: nn.Module, name: str, parent: str) -> None:
        if isinstance(module, nn.Sequential | nn.ModuleList):
            filled = [_join(name, key) for key, child in module.named_children() if _has_parameters(child)]
            if len(filled) > 1:
                rows[parent].extend(filled)
                return
        for key, child in module.named_children():
            walk(child, _join(name, key), name)

    walk(model, "", "")
    if not rows:
        raise ConfigError(
            "freeze: a depth needs a model with a ModuleList or Sequential of at least two blocks; "
            "name the layers or give a glob instead"
        )
    size = {key: sum(_numel(model.get_submodule(name)) for name in row) for key, row in rows.items()}
    return rows[max(rows, key=lambda key: size[key])]


def _by_depth(model: nn.Module, depth: int) -> Selection:
    """What is registered before the first block that trains; nothing for depth 0."""
    if depth == 0:
        return Selection()
    blocks = blocks_of(model)
    count = depth if depth > 0 else len(blocks) + depth
    if not 0 <= count <= len(blocks):
        raise ConfigError(f"freeze={depth}: the model has {len(blocks)} blocks ({blocks[0]} to {blocks[-1]})")
    named = model.named_modules(remove_duplicate=False)
    modules = [name for name, module in named if is_only_buffers(module)]
    everything = [name for name, _ in model.named_modules(remove_duplicate=False)]
    parameters = [name for name, _ in named_weights(model, remove_duplicate=False)]
    block = blocks[min(count, len(blocks) - 1)] + "."

    def before(names: list[str], inside: list[bool]) -> list[str]:
        if count < len(blocks):
            return names[: inside.index(True)]
        return names[: len(inside) - inside[::-1].index(True)]

    first = before(parameters, [name.startswith(block) for name in parameters])
    passed = set(before(everything, [f"{name}.".startswith(block) for name in everything]))
    return Selection(frozenset(first), frozenset(passed.intersection(modules)))


def check_shared(model: nn.Module, frozen: frozenset[str], trainable: Iterable[str]) -> None:
    """Refuse a plan that freezes one name of a tensor and trains another.

    Raises:
        ConfigError: with both names.
    """
    parameters = dict(named_weights(model, remove_duplicate=False))
    by_tensor: dict[Any, str] = {}
    for name in sorted(frozen):
        for key in _keys(parameters[name]):
            by_tensor.setdefault(key, name)
    for name in trainable:
        for key in _keys(parameters[name]):
            if key in by_tensor:
                raise ConfigError(
                    f"freeze: '{by_tensor[key]}' (to freeze) and '{name}' (to train) are one tensor: "
                    "name both or neither"
                )


def _keys(parameter: nn.Parameter) -> list[Any]:
    """By identity, and by the memory that two parameters may share."""
    keys: list[Any] = [id(parameter)]
    if parameter.numel() and parameter.device.type != "meta":
        keys.append((parameter.device, parameter.data_ptr()))
    return keys


def require_values(model: nn.Module) -> None:
    """Refuse lazy parameters.

    Raises:
        ConfigError: with the first name.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigError(f"freeze: '{name}' has no values yet: call the model once before freezing")


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _numel(module: nn.Module) -> int:
    return sum(torch.numel(parameter) for parameter in module.parameters())


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
