"""An optimizer follows a plan that changes in mid-training: new parameters come in, frozen ones go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pyft.errors import ConfigError

Group = int | Mapping[str, Any] | None


def check_optimizer(optimizer: object, group: Group) -> None:
    """Refuse what cannot follow, before anything is changed.

    Raises:
        ConfigError: not an optimizer, one that flattens its parameters, or a group that it does not have.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer: a torch.optim.Optimizer is expected, {type(optimizer).__name__} came")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError("optimizer: LBFGS keeps all parameters as one vector: make another one after unfreezing")
    count = len(optimizer.param_groups)
    if isinstance(group, int) and not isinstance(group, bool) and -count <= group < count:
        return
    if group is not None and not isinstance(group, Mapping):
        raise ConfigError(f"group={group!r}: the number of one of the {count} groups, or a dict, is expected")
    if isinstance(group, Mapping) and "params" in group:
        raise ConfigError("group: 'params' are those that are unfrozen; leave them out")


def follow(
    optimizer: torch.optim.Optimizer, model: nn.Module, group: Group = None, before: Iterable[nn.Parameter] = ()
) -> None:
    """Make the parameters of `optimizer` those of `model` that train, beside any that are not the model's.

    What froze leaves its group, and its state is dropped. What is new joins a group and has no state yet, so that its
    step count begins at 0. All other state stays. Groups stay in place, empty ones too, so that schedulers, which
    count them, go on. Within a group the model's parameters are in the model's order: a state_dict fits an optimizer
    that is made anew from the parameters that train.

    Args:
        group: where new parameters go. A number: that group. A dict: a new group with these hyperparameters, of which
            schedulers that exist know nothing. None: matrices to the group with the most matrices, biases and norms to
            the group with the most of those.
        before: parameters that the model had; those that it has no more, parts of weights, leave as if they froze.
    """
    check_optimizer(optimizer, group)
    named = dict(model.named_parameters())
    order = {id(parameter): (i, name) for i, (name, parameter) in enumerate(named.items())}
    out = {id(p) for p in before if id(p) not in order} | {id(p) for p in named.values() if not p.requires_grad}
    for of_group in optimizer.param_groups:
        gone = [p for p in of_group["params"] if id(p) in out]
        _set_params(of_group, [p for p in of_group["params"] if id(p) not in out], order)
        for parameter in gone:
            optimizer.state.pop(parameter, None)
    known = {id(p) for of_group in optimizer.param_groups for p in of_group["params"]}
    new = [p for p in named.values() if p.requires_grad and id(p) not in known]
    if isinstance(group, Mapping) and new:
        with_names = any("param_names" in of_group for of_group in optimizer.param_groups)
        optimizer.add_param_group({**group, "params": [(order[id(p)][1], p) for p in new] if with_names else new})
    else:
        targets = [_target(optimizer, p, group) for p in new]
        for number, of_group in enumerate(optimizer.param_groups):
            joining = [p for p, target in zip(new, targets, strict=True) if target == number]
            _set_params(of_group, [*of_group["params"], *joining], order)
    # pyft's optimizers hold plans and hooks for the parameters that they have seen.
    changed = getattr(optimizer, "params_changed", None)
    if changed is not None:
        changed()


def _set_params(of_group: dict[str, Any], params: list[Any], order: dict[int, tuple[int, str]]) -> None:
    """Put the model's parameters, in its order, behind those that are not the model's."""
    names = dict(zip(map(id, of_group["params"]), of_group.get("param_names", []), strict=False))
    params = sorted(params, key=lambda p: order.get(id(p), (-1, ""))[0])
    of_group["params"] = params
    if "param_names" in of_group:
        of_group["param_names"] = [names.get(id(p)) or order[id(p)][1] for p in params]


def _target(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, group: int | Mapping[str, Any] | None) -> int:
    """The number of the group that a new parameter joins."""
    groups = optimizer.param_groups
    if isinstance(group, int):
        return group % len(groups)
    alike = [sum((p.ndim > 1) == (parameter.ndim > 1) for p in of_group["params"]) for of_group in groups]
    if not any(alike):
        alike = [len(of_group["params"]) for of_group in groups]
    return alike.index(max(alike))
