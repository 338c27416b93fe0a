"""A module as it came, to be given back so when something is wrong with the arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.parameter import is_lazy

from pyft.models.head import WIDTH_ATTRIBUTES


class Untouched:
    """A module as it came: its submodules, modes, requires_grad flags, widths and device; `put_back` restores them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.children = {module: dict(module._modules) for module in model.modules()}
        self.modes = {module: module.training for module in model.modules()}
        self.flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.widths = {name: model.__dict__[name] for name in WIDTH_ATTRIBUTES if name in model.__dict__}
        self.num_labels = getattr(getattr(model, "config", None), "num_labels", None)
        self.devices = {parameter.device for parameter in model.parameters()}

    def put_back(self) -> None:
        """Undo what `inspect` did to the module."""
        for module, had in self.children.items():
            module._modules.update(had)
        for module, mode in self.modes.items():
            module.training = mode
        for parameter, flag in self.flags:
            # A lazy layer that has not seen a batch takes no call, and nothing has changed its flag.
            if not is_lazy(parameter):
                parameter.requires_grad_(flag)
        self.model.__dict__.update(self.widths)
        if self.num_labels is not None:
            self.model.config.num_labels = self.num_labels  # type: ignore[union-attr]
        if len(self.devices) == 1:
            self.model.to(next(iter(self.devices)))


@contextlib.contextmanager
def given_back_on_error(before: Untouched) -> Iterator[None]:
    """On an exception inside, the module is put back as it came."""
    try:
        yield
    except BaseException:
        before.put_back()
        raise
