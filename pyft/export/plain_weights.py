"""A model with plain weights: what computes a weight anew at each call is worked out once, on a copy."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from pyft.errors import ExportError
from pyft.export.run import first_line

# Hooks of torch that compute a weight before each call, and how the weight becomes a parameter again.
_HOOKS = ("WeightNorm", "SpectralNorm", "BasePruningMethod")


def plain_weights(model: nn.Module) -> nn.Module:
    """The model itself, or a copy with LoRA layers merged, and parametrisations, weight norms and pruning folded.

    The copy shares every tensor that is not changed; the model is left as it is. In eval mode both give the same.

    Raises:
        ExportError: an adapter cannot be merged.
    """
    touched = [module for module in model.modules() if _is_adapter(module) or _computes_weights(module)]
    if not touched:
        return model
    own = {id(value) for module in touched for value in [*module.parameters(), *module.buffers()]}
    memo: dict[int, Any] = {id(v): v for v in [*model.parameters(), *model.buffers()] if id(v) not in own}
    for module in touched:
        # A weight that a hook has computed under autograd cannot be copied with its history.
        memo.update({id(v): v.detach() for v in vars(module).values() if isinstance(v, torch.Tensor) and not v.is_leaf})
    copied = copy.deepcopy(model, memo)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, module in list(copied.named_modules()):
            _fold(module)
            if _is_adapter(module):
                copied = _without_adapter(copied, name, module)
    return copied


def _computes_weights(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) or any(_kind(hook) for hook in module._forward_pre_hooks.values())


def _kind(hook: Any) -> str:
    """Which of torch's weight-computing hooks it is, or ""."""
    if not type(hook).__module__.startswith("torch.nn.utils."):
        return ""
    names = {base.__name__ for base in type(hook).__mro__}
    return next((name for name in _HOOKS if name in names), "")


def _fold(module: nn.Module) -> None:
    if parametrize.is_parametrized(module):
        # torch's own remove_parametrizations changes the class, which the copy shares with the model.
        names = list(module.parametrizations)  # type: ignore[arg-type]
        values = {name: getattr(module, name).detach().clone() for name in names}
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for key, hook in list(module._forward_pre_hooks.items()):
        if _kind(hook):
            hook.remove(module)  # type: ignore[attr-defined]
            del module._forward_pre_hooks[key]


def _is_adapter(module: nn.Module) -> bool:
    """Whether it is a layer that peft has put in the place of another, such as one with LoRA weights beside it."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and isinstance(module, peft.BaseTunerLayer) and isinstance(module, nn.Module)


def _without_adapter(model: nn.Module, name: str, layer: Any) -> nn.Module:
    """The model with the merged plain layer in the adapter's place."""
    if not layer.disable_adapters:
        try:
            layer.merge(safe_merge=True)
        except Exception as error:
            raise ExportError(
                f"model: the adapter '{name}' ({type(layer).__name__}) cannot be merged into its weight: "
                f"{first_line(error)}. Merge it by hand and export the result"
            ) from error
    elif layer.merged:
        layer.unmerge()
    plain = layer.get_base_layer()
    if not name:
        return plain
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, plain)
    return model
