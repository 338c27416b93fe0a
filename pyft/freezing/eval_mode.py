"""Modules that stay in eval mode whatever `model.train()` says."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class StayInEval:
    """Takes the place of a module's `train` method and keeps the module in eval mode.

    An object and not a closure, so that `copy.deepcopy` and pickling carry it over to the copy.

    Attributes:
        module: the module that is kept.
        mode: the mode that was last asked for, given back on release.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.mode = module.training

    def __call__(self, mode: bool = True) -> nn.Module:
        """What `module.train(mode)` does: note the mode, pass it on, stay in eval."""
        self.mode = mode
        # cuDNN refuses the backward pass of an RNN in eval mode; without dropout the mode changes nothing else.
        self.module.training = mode and _mode_is_for_cudnn_only(self.module)
        for child in self.module.children():
            child.train(mode)
        return self.module


def keep_in_eval(modules: Iterable[nn.Module]) -> None:
    """Put modules into eval mode and keep them there. Their children are not touched: name them too."""
    for module in modules:
        keeper = kept(module)
        if keeper is None:
            keeper = StayInEval(module)
            module.__dict__["train"] = keeper
        module.training = keeper.mode and _mode_is_for_cudnn_only(module)


def let_train(modules: Iterable[nn.Module]) -> None:
    """Undo `keep_in_eval`: modules get the mode that was last asked for."""
    for module in modules:
        keeper = kept(module)
        if keeper is not None:
            del module.__dict__["train"]
            module.training = keeper.mode


def kept(module: nn.Module) -> StayInEval | None:
    """What keeps a module in eval mode, or None."""
    found = module.__dict__.get("train")
    return found if isinstance(found, StayInEval) else None


def _mode_is_for_cudnn_only(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase) and module.dropout == 0 and any(p.is_cuda for p in module.parameters(False))
