"""`pyft.freeze(model, {glob: value})`: what each weight is to do, and the parts that follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pyft.errors import ConfigError
from pyft.freezing.entries import Entries, make_entries
from pyft.freezing.partial_modules import refusal
from pyft.freezing.parts import named_weights, owners
from pyft.freezing.select_rows import Chosen, Loss, Rows, choose_rows, draft_rows
from pyft.freezing.selection import Selection, select

PLACES = {"rows", "columns", "blocks", "block_size"}
POLICY = {"fraction", "count", "by", "seed"}


@dataclass(frozen=True)
class Wishes:
    """What a dict says.

    Attributes:
        named: names of parameters and modules that have the value True.
        let: those that have the value False.
        parts: the part that trains, by the first name of the weight.
        partly: every name of these weights.
    """

    named: Selection
    let: Selection
    parts: dict[str, Chosen]
    partly: frozenset[str]


def read_wishes(
    model: nn.Module,
    what: Mapping[Any, Any],
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    *,
    draft: bool = False,
) -> Wishes:
    """Take a dict apart; a later key takes the place of an earlier one for what both name.

    Args:
        draft: choose no rows by data, but say how many there will be.

    Raises:
        ConfigError: as `pyft.freeze`.
    """
    values: dict[str, Any] = {}
    modules: dict[str, Any] = {}
    for key, value in what.items():
        _check_value(key, value)
        if not (isinstance(key, str) or callable(key)):
            raise ConfigError(f"freeze: the key {key!r} of the dict is a {type(key).__name__}: a glob is expected")
        found = select(model, key)
        values.update(dict.fromkeys(found.parameters, value))
        modules.update(dict.fromkeys(found.modules, value))
    first = dict(named_weights(model))
    names: dict[int, list[str]] = {}
    for name, parameter in named_weights(model, remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    wanted = {}
    for name, parameter in first.items():
        asked = [(other, values[other]) for other in names[id(parameter)] if other in values]
        partly = [(other, value) for other, value in asked if not isinstance(value, bool)]
        if not partly:
            continue
        if any(value is not partly[0][1] for _, value in asked):
            raise ConfigError(
                f"freeze: '{asked[0][0]}' and '{asked[1][0]}' are one tensor and are given two values: give them one"
            )
        wanted[name] = partly[0][1]
    parts = _parts(model, first, wanted, batches, loss, draft)
    whole = {flag: _selection(values, modules, flag) for flag in (True, False)}
    partly_names = frozenset(other for name in parts for other in names[id(first[name])])
    return Wishes(whole[True], whole[False], parts, partly_names)


def _selection(values: Mapping[str, Any], modules: Mapping[str, Any], flag: bool) -> Selection:
    return Selection(
        frozenset(name for name, value in values.items() if value is flag),
        frozenset(name for name, value in modules.items() if value is flag),
    )


def _check_value(key: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        keys = set(value)
        if not keys or not (keys <= PLACES or keys <= POLICY):
            raise ConfigError(
                f"freeze: the dict for {key!r} holds {', '.join(map(repr, value)) or 'nothing'}: rows, columns, blocks "
                "and block_size, or fraction, count, by and seed, are expected"
            )
        return
    given = value is None or isinstance(value, str | float)
    if given or (isinstance(value, int) and not isinstance(value, bool)):
        raise ConfigError(
            f"freeze: {key!r} has the value {value!r}: pyft.Rows(...), indices, a mask or a slice of rows, a dict of "
            "rows=, columns=, blocks=, or True or False for the whole is expected"
        )


def _parts(
    model: nn.Module,
    first: Mapping[str, nn.Parameter],
    wanted: Mapping[str, Any],
    batches: Iterable[Any] | None,
    loss: Loss | None,
    draft: bool,
) -> dict[str, Chosen]:
    policies: dict[str, tuple[nn.Parameter, Rows]] = {}
    named: dict[str, Chosen] = {}
    for name, value in wanted.items():
        parameter = first[name]
        value = Rows(**value) if isinstance(value, Mapping) and set(value) <= POLICY else value
        if isinstance(value, Rows):
            if not parameter.ndim or not parameter.numel():
                raise ConfigError(f"freeze: '{name}' has the shape {tuple(parameter.shape)}, and so no rows")
            check_holders(model, name, parameter, Entries(tuple(parameter.shape), torch.arange(1)))
            policies[name] = (parameter, value)
            continue
        places = dict(value) if isinstance(value, Mapping) else {"rows": value}
        entries = make_entries(parameter.shape, **places, name=f"freeze: '{name}'")
        check_holders(model, name, parameter, entries)
        named[name] = Chosen(entries)
    chosen = draft_rows(policies) if draft else choose_rows(model, policies, batches, loss)
    return {name: chosen[name] if name in chosen else named[name] for name in wanted}


def check_holders(model: nn.Module, name: str, parameter: nn.Parameter, entries: Entries) -> None:
    """Refuse a weight that cannot train in part.

    Raises:
        ConfigError: with its name and the reason.
    """
    for module, key in owners(model, parameter):
        reason = refusal(module, key, entries)
        if reason is not None:
            raise ConfigError(
                f"'{name}' cannot train in part: {reason}. Train it whole or freeze it "
                f"({{..., '{name}': False}} or True in a dict), or name other weights"
            )
