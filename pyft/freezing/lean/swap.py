"""Modules become lean forms by their class, and torch's own again."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Literal

from torch import nn

from pyft.errors import ConfigError
from pyft.freezing.lean import convolution, dropout, linear, norms, pooling, transformers_activations
from pyft.freezing.lean.activations import BIT_FORMS, RECOMPUTED_FORMS, LeanReLU

Activations = Literal["keep", "recompute"]

_WITH_WEIGHT = {**convolution.FORMS, **norms.FORMS, **linear.FORMS}
_WITHOUT_PARAMETERS = {**pooling.FORMS, **dropout.FORMS}
# A ReLU before a layer that trains is kept whole by that layer anyway.
_NEAR_FROZEN = BIT_FORMS


class LeanForms:
    """The lean forms in a model. Printing it gives how many there are of each class.

    Attributes:
        names: dotted name -> name of the class it was.
    """

    def __init__(self, model: nn.Module, names: dict[str, str]) -> None:
        self._model = model
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        counts = Counter(self.names.values())
        return f"LeanForms({', '.join(f'{count} {name}' for name, count in sorted(counts.items()))})"

    def release(self) -> None:
        """Give every module of the model its own class back."""
        release(self._model)
        self.names = {}


def lean(model: nn.Module, *, activations: Activations = "keep") -> LeanForms:
    """Let frozen modules keep only what the gradient of their input needs. In place; values and gradients stay.

    torch keeps the whole input of a frozen convolution, BatchNorm, activation or pooling layer for the backward pass.
    A lean form keeps nothing (convolutions, average pooling), one number for each channel (BatchNorm in eval mode), one
    bit for each element (ReLU, ReLU6, Hardtanh, LeakyReLU, Dropout) or one byte for each output (max pooling). Modules
    are swapped by their exact class; a layer with a weight only while that is frozen, its bias may train. Where nothing
    is kept anyway (no gradient, torch.compile, export, jit tracing, functorch) the module is torch's own. Bits and
    bytes are for CPU tensors, and for CUDA tensors where the CUDA core is there; elsewhere those modules stay torch's
    own.

    A second call starts anew. Copies and pickles carry their forms with them: `lean(copy).release()` releases a copy.

    Args:
        model: with what trains and what does not set: `pyft.freeze` calls this itself.
        activations: "keep": GELU and SiLU keep their input, as in torch. "recompute": where it comes straight from a
            frozen linear layer with a smaller input, that is kept instead, and the layer runs again in the backward
            pass: less memory, one more product for each.

    Returns:
        What is lean now. `release()` undoes it.

    Raises:
        ConfigError: `activations` is something else.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).requires_grad_(False)
    >>> forms = lean(net)
    >>> forms
    LeanForms(2 Conv2d, 1 ReLU)
    >>> forms.release(); type(net[0]).__name__
    'Conv2d'
    """
    if activations not in ("keep", "recompute"):
        raise ConfigError(f"activations={activations!r}: 'keep' or 'recompute' is expected")
    release(model)
    if all(parameter.requires_grad for parameter in model.parameters()):
        return LeanForms(model, {})
    recompute = activations == "recompute"
    near = _near_frozen_weights(model)
    for module in model.modules():
        form = _form_of(module, id(module) in near, recompute)
        if form is not None:
            module.__class__ = form
    for module in model.modules():
        if type(module) is nn.Sequential and _has_norm_and_relu(module):
            module.__class__ = norms.LeanSequential
    return LeanForms(model, {name: plain_class(type(m)).__name__ for name, m in model.named_modules() if is_lean(m)})


def _form_of(module: nn.Module, near_frozen: bool, recompute: bool) -> type[nn.Module] | None:
    cls = type(module)
    if cls in _WITH_WEIGHT:
        weight = module._parameters.get("weight")
        if weight is not None and weight.requires_grad:
            return None
        return linear.PRODUCING_FORMS[cls] if recompute and cls in linear.PRODUCING_FORMS else _WITH_WEIGHT[cls]
    if cls in _NEAR_FROZEN:
        return _NEAR_FROZEN[cls] if near_frozen else None
    if recompute and cls in RECOMPUTED_FORMS:
        return RECOMPUTED_FORMS[cls]
    return _WITHOUT_PARAMETERS.get(cls) or transformers_activations.forms(recompute).get(cls)


def _near_frozen_weights(model: nn.Module) -> set[int]:
    """Modules without parameters whose nearest ancestor with a matrix, a kernel or the like holds a frozen one."""
    near: set[int] = set()

    def walk(module: nn.Module, frozen: bool) -> None:
        weights = [p for p in module.parameters() if p.ndim > 1]
        if weights:
            frozen = any(not p.requires_grad for p in weights)
        for child in module.children():
            if next(child.parameters(), None) is not None:
                walk(child, frozen)
            elif frozen:
                near.update(id(inner) for inner in child.modules())

    walk(model, any(not p.requires_grad for p in model.parameters()))
    return near


def _has_norm_and_relu(sequential: nn.Sequential) -> bool:
    modules = list(sequential)
    return any(isinstance(a, norms._LeanBatchNorm) and type(b) is LeanReLU for a, b in pairwise(modules))


def release(model: nn.Module) -> None:
    """Give every module of `model` that is a lean form its own class back."""
    for module in model.modules():
        if is_lean(module):
            module.__class__ = plain_class(type(module))


def is_lean(module: nn.Module) -> bool:
    """Whether a module is a lean form now."""
    return type(module).__module__.startswith(f"{__package__}.")


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a lean form stands for; any other class itself.

    >>> plain_class(norms.LeanBatchNorm2d)
    <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    return next(base for base in cls.__mro__ if not base.__module__.startswith(f"{__package__}."))
