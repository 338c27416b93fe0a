"""The record of a weight of which a part trains, and where the parts of a model are.

The whole weight stays under its name as a frozen parameter, and the part is a second, compact parameter beside it,
`<name>_part`: what an optimizer, clipping, weight decay or DistributedDataParallel sees. A part that is whole rows
side by side is a view of the weight's memory. Any other is a copy, which is written into the weight when it has
changed: before each forward pass, state_dict, and reading of `layer.weight`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyft.errors import ConfigError
from pyft.freezing.entries import Entries
from pyft.ops.distributed import is_distributed

PARTS = "_pyft_parts"
SUFFIX = "_part"


class _Steps:
    """Counts the steps of all optimizers: torch's fused ones write without raising the version of what they write.

    Only from `watch` on, since a hook makes every step of every optimizer a little slower.
    """

    def __init__(self) -> None:
        self.count = 0
        self.watching = False

    def watch(self) -> None:
        """Count from now on."""
        if not self.watching:
            self.watching = True
            register_optimizer_step_post_hook(self)

    def __call__(self, *step: object) -> None:
        self.count += 1


_STEPS = _Steps()
watch_steps = _STEPS.watch


class Part:
    """Which entries of a weight train, and what the weight and the part were when they last agreed.

    Modules that share the weight share this object.

    Attributes:
        entries: the entries.
        view: whether the part was made as a view of the weight's memory.
        seen: identity, version and place of weight and part at that time; None when that is not known.
    """

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self.view = False
        self.seen: tuple[Any, ...] | None = None
        self.steps = -1

    def shares(self, full: Tensor, part: Tensor) -> bool:
        """Whether the part lies in the weight's memory now. `.data` may have moved either."""
        start = self.entries.run
        if not self.view or start is None or full.device != part.device or full.dtype != part.dtype:
            return False
        place = full.data_ptr() + start * full.stride(0) * full.element_size()
        return part.data_ptr() == place and part.stride() == full.stride()

    def agree(self, full: Tensor, part: Tensor) -> None:
        """Make weight and part agree, where one has changed since they last did.

        The part is what an optimizer writes, so it wins; but a weight that alone was written, or replaced, by hand or
        by a load, is the newer.

        Raises:
            ConfigError: one of them is spread over processes.
        """
        if is_distributed(full) or is_distributed(part):
            raise ConfigError(
                f"the weight of shape {tuple(full.shape)} of which a part trains was spread over processes by "
                "fully_shard, which would spread the part as other rows; use DistributedDataParallel, or train whole "
                "parameters"
            )
        if self.shares(full, part):
            return
        watch_steps()
        now, stepped = stamp(full, part), self.steps != _STEPS.count
        if now == self.seen and not stepped:
            return
        self.steps = _STEPS.count
        moved = self.seen is None or now[:3] != self.seen[:3]
        if self.seen is not None and now[:5] == self.seen[:5] and stepped:
            moved = not torch.equal(self.entries.take(full.detach()), part.detach())
        if moved:
            self.entries.write_(full, part)
            self.seen = stamp(full, part)
        elif self.seen is not None and now[3:5] != self.seen[3:5]:
            self.refresh(full, part)
        else:
            self.seen = now  # the same values in another place

    def refresh(self, full: Tensor, part: Tensor) -> None:
        """Take the part's values from the weight."""
        with torch.no_grad():
            if not self.shares(full, part):
                part.copy_(self.entries.take(full))
        self.seen = stamp(full, part)

    def lay(self, full: Tensor, part: Tensor) -> None:
        """Put the part into the weight's memory again, where it was made so and a conversion moved the weight."""
        start = self.entries.run
        if self.view and start is not None and not self.shares(full, part):
            part.data = full.detach().narrow(0, start, self.entries.part_shape[0])
        self.seen = stamp(full, part)


def stamp(full: Tensor, part: Tensor) -> tuple[Any, ...]:
    """What changes when either is written, replaced or moved."""
    return id(part), part._version, part.data_ptr(), id(full), full._version, full.data_ptr()


def layers_with_parts(model: nn.Module) -> list[nn.Module]:
    """The layers of `model` that train in part, each once."""
    return [module for module in model.modules() if module.__dict__.get(PARTS)]


def named_weights(model: nn.Module, remove_duplicate: bool = True) -> list[tuple[str, nn.Parameter]]:
    """`model.named_parameters()` without the parts: the names that the plain model has."""
    parts = {
        id(module._parameters[name + SUFFIX]) for module in layers_with_parts(model) for name in module.__dict__[PARTS]
    }
    named = model.named_parameters(remove_duplicate=remove_duplicate)
    return [(name, parameter) for name, parameter in named if id(parameter) not in parts]


def attached(model: nn.Module) -> dict[str, Entries]:
    """The entries that train of each weight that trains in part, by its first name."""
    found = {
        id(layer._parameters[key]): part.entries
        for layer in layers_with_parts(model)
        for key, part in layer.__dict__[PARTS].items()
    }
    return {name: found[id(weight)] for name, weight in named_weights(model) if id(weight) in found}


def whole_names(model: nn.Module) -> dict[str, str]:
    """By the name of each part, the name of its weight; tied ones under all their names."""
    return {
        f"{prefix}.{key}{SUFFIX}" if prefix else f"{key}{SUFFIX}": f"{prefix}.{key}" if prefix else key
        for prefix, layer in model.named_modules(remove_duplicate=False)
        for key in layer.__dict__.get(PARTS, ())
    }


def owners(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Every module that holds `parameter`, and under which key; tied weights have several."""
    return [
        (module, key) for module in model.modules() for key, held in module._parameters.items() if held is parameter
    ]


def refresh_layer(layer: Any) -> None:
    """Take the values of a layer's parts from its whole weights, which were just loaded."""
    for name, part in layer.__dict__[PARTS].items():
        part.refresh(layer._parameters[name], layer._parameters[name + SUFFIX])
        part.lay(layer._parameters[name], layer._parameters[name + SUFFIX])


def bring_up_to_date(model: nn.Module) -> None:
    """Write every part of `model` into its whole weight, where it has changed."""
    for layer in layers_with_parts(model):
        for name in layer.__dict__[PARTS]:
            layer._whole(name)  # type: ignore[operator]


def refresh_parts(model: nn.Module) -> None:
    """Take the values of every part of `model` from its whole weight, which was just written."""
    for layer in layers_with_parts(model):
        refresh_layer(layer)
