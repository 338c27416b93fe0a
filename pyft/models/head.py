"""Find the layer that gives the outputs, and give it the size that the data asks for."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from pyft.errors import ConfigError
from pyft.models.call import Inputs, call_model, probing
from pyft.models.init import INIT, init_linear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KNOWN_NAMES = ("classifier", "head", "heads", "fc", "_fc", "linear", "score", "out", "output", "last_linear", "logits")
WIDTH_ATTRIBUTES = ("num_classes", "num_labels", "n_classes", "num_outputs")


@dataclass(frozen=True)
class HeadReport:
    """What became of the head.

    Attributes:
        name: its dotted name; None where the model has no replaceable head and needs none.
        old_shape: shape of the weight found, first the number of outputs; None without a head.
        new_shape: shape of the weight now.
        init: how the new weight was drawn; "" when nothing was replaced.
        replaced: whether it was replaced.
        message: all of this in one line, and what else the user should know about the outputs.
    """

    name: str | None
    old_shape: tuple[int, ...] | None
    new_shape: tuple[int, ...] | None
    init: str
    replaced: bool
    message: str


def find_head(model: nn.Module, inputs: Inputs | None = None) -> tuple[str, nn.Module]:
    """The layer whose width is the number of outputs of the model.

    Args:
        inputs: one batch, as `call_model` takes it. With it the answer is proven: of the Linear and 1x1 convolution
            layers, last called first, the one whose doubled output doubles the model's outputs. Without it the answer
            is by name (timm's `get_classifier`, classifier, head, fc, ...), else the last such layer registered.

    Returns:
        Dotted name and layer.

    Raises:
        ConfigError: there is none.
    """
    if inputs is not None:
        _materialize(model, inputs)
    found = _by_trace(model, inputs, "") if inputs is not None else _by_name(model)
    if found is None:
        raise ConfigError(
            "head: no Linear or 1x1 convolution layer was found whose width is the number of outputs. "
            'Name it: head="<module name>"'
        )
    return found, model.get_submodule(found)


def fit_head(
    model: nn.Module, num_outputs: int, inputs: Inputs | None = None, head: str = "auto", seed: int = 0
) -> HeadReport:
    """Replace the head in place when its width is not `num_outputs`; keep it otherwise.

    The new layer has the same input width, bias, dtype, device and mode as the old one. Its weight is drawn from a
    truncated normal with std 0.02, cut at two std, and its bias is 0.

    Args:
        num_outputs: C classes or labels, or K regression targets.
        inputs: one batch; with it the head is proven before, and the outputs are checked after.
        head: "auto", or the dotted name of the head or of a module that holds it.
        seed: of the new weight.

    Raises:
        ConfigError: no head is found and the outputs have another size; no module of that name; a head that is
            neither Linear nor 1x1 convolution.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> print(fit_head(model, 5).message)
    head '2' replaced: 3 -> 5 outputs, weight (3, 8) -> (5, 8), truncated normal with std 0.02, bias 0
    """
    if num_outputs < 1:
        raise ConfigError(f"num_outputs={num_outputs}: at least 1 is expected")
    if inputs is not None:
        _materialize(model, inputs)
    name = _choose(model, head, inputs)
    if name is None:
        return _without_head(model, num_outputs, inputs)
    old: Any = model.get_submodule(name)
    old_shape = tuple(old.weight.shape)
    tied = _tied_names(model, old)
    if old_shape[0] == num_outputs:
        _check_width(model, name, num_outputs, inputs)
        notes = [f"its weight is also '{tied[0]}', which trains along"] if tied else []
        message = "; ".join(
            [f"head '{name}' kept: {num_outputs} outputs", *notes, *_endings(model, num_outputs, inputs)]
        )
        return HeadReport(name, old_shape, old_shape, "", False, message)
    notes = [f"no longer tied to '{tied[0]}', which keeps its values"] if tied else []
    if parametrize.is_parametrized(old) or hasattr(old, "weight_g") or hasattr(old, "weight_orig"):
        notes.append("the parametrization of the old weight is gone")
    new: Any = _new_layer(old, num_outputs, seed)
    _swap(model, old, new)
    renamed = _rename_width(model, old_shape[0], num_outputs)
    try:
        _check_width(model, name, num_outputs, inputs)
    except ConfigError:
        _swap(model, new, old)
        for attribute in renamed:
            setattr(model, attribute, old_shape[0])
        raise
    _rename_labels(model, old_shape[0], num_outputs)
    new_shape = tuple(new.weight.shape)
    first = (
        f"head '{name}' replaced: {old_shape[0]} -> {num_outputs} outputs, weight {old_shape} -> {new_shape}, {INIT}"
    )
    message = "; ".join([first, *notes, *_endings(model, num_outputs, inputs)])
    return HeadReport(name, old_shape, new_shape, INIT, True, message)


def _choose(model: nn.Module, head: str, inputs: Inputs | None) -> str | None:
    if head == "auto":
        return _by_name(model) if inputs is None else _by_trace(model, inputs, "")
    modules = dict(model.named_modules())
    if head not in modules:
        near = difflib.get_close_matches(head, [name for name in modules if name], n=3, cutoff=0.3)
        raise ConfigError(f"head={head!r}: the model has no such module; nearest: {', '.join(near) or 'none'}")
    if _is_candidate(modules[head]):
        return head
    found = _last_candidate(modules[head]) if inputs is None else _by_trace(model, inputs, head)
    if found is None:
        raise ConfigError(
            f"head={head!r}: {type(modules[head]).__name__} is neither Linear nor a 1x1 convolution, and holds none "
            "that gives the outputs. Replace it yourself and give the model with the right number of outputs"
        )
    return found if inputs is not None else f"{head}.{found}"


def _without_head(model: nn.Module, num_outputs: int, inputs: Inputs | None) -> HeadReport:
    if inputs is not None:
        with probing(model):
            shape = tuple(call_model(model, inputs).shape)
        if shape[1:] == (num_outputs,) or (num_outputs == 1 and len(shape) == 1):
            message = f"head kept: the outputs have the size asked for ({num_outputs}), no layer to replace was found"
            return HeadReport(None, None, None, "", False, "; ".join([message, *_endings(model, num_outputs, inputs)]))
        size = f"the outputs have shape {shape}, {num_outputs} per sample are needed"
    else:
        size = f"{num_outputs} outputs are needed"
    raise ConfigError(
        f"head: {size}, and no Linear or 1x1 convolution layer was found that gives them. "
        'Name it: head="<module name>", or give a model with that many outputs'
    )


def _is_candidate(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):  # the inside of an attention layer
        return False
    if isinstance(module, CONVOLUTIONS):
        return set(module.kernel_size) == {1} and module.groups == 1
    return isinstance(module, nn.Linear)


def _last_candidate(module: nn.Module) -> str | None:
    names = [name for name, child in module.named_modules() if name and _is_candidate(child)]
    return names[-1] if names else None


def _by_name(model: nn.Module) -> str | None:
    """The head by timm's convention, by a known name, or the last layer registered."""
    for named in (_timm_head(model), *(name for name in KNOWN_NAMES if name in dict(model.named_children()))):
        if named is None:
            continue
        module = model.get_submodule(named)
        if _is_candidate(module):
            return named
        inner = _last_candidate(module)
        if inner is not None:
            return f"{named}.{inner}"
    return "" if _is_candidate(model) else _last_candidate(model)


def _timm_head(model: nn.Module) -> str | None:
    getter = getattr(model, "get_classifier", None)
    layer = getter() if callable(getter) else None
    return next((name for name, module in model.named_modules() if module is layer), None)


def _by_trace(model: nn.Module, inputs: Inputs, under: str) -> str | None:
    """Of the layers below `under`, last called first, the one that sets the number of outputs."""
    called: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _m, _a, _o, name=name: called.append(name))
        for name, module in model.named_modules()
        if _is_candidate(module) and (not under or name == under or name.startswith(under + "."))
    ]
    try:
        with probing(model):
            before = call_model(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    order = list(dict.fromkeys(reversed(called)))
    timm = _timm_head(model)
    if timm in order:
        order = [timm, *(name for name in order if name != timm)]
    return next((name for name in order if _sets_width(model, name, inputs, before)), None)


def _sets_width(model: nn.Module, name: str, inputs: Inputs, before: torch.Tensor) -> bool:
    """Whether doubling what layer `name` gives doubles the last axis (or the channels) of the outputs."""
    layer: Any = model.get_submodule(name)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    hook = layer.register_forward_hook(lambda _m, _a, output: torch.cat([output, output], dim=axis))
    width = layer.weight.shape[0]
    try:
        with probing(model), _width_attributes(model, width, 2 * width):
            after = call_model(model, inputs)
    except (RuntimeError, ValueError, IndexError, TypeError):  # a later layer refuses the doubled width
        return False
    finally:
        hook.remove()
    if before.ndim < 2:
        return tuple(after.shape) == (*before.shape, 2)
    doubled = [i for i in range(1, before.ndim) if after.ndim == before.ndim and after.shape[i] == 2 * before.shape[i]]
    return len(doubled) == 1 and after.numel() == 2 * before.numel()


@contextlib.contextmanager
def _width_attributes(model: nn.Module, old: int, new: int) -> Iterator[None]:
    """Set num_classes and its like on the model from `old` to `new` for a while; forward may reshape by them."""
    names = [name for name in WIDTH_ATTRIBUTES if model.__dict__.get(name) == old]
    for name in names:
        setattr(model, name, new)
    try:
        yield
    finally:
        for name in names:
            setattr(model, name, old)


def _rename_width(model: nn.Module, old: int, new: int) -> list[str]:
    names = [name for name in WIDTH_ATTRIBUTES if model.__dict__.get(name) == old]
    for name in names:
        setattr(model, name, new)
    return names


def _rename_labels(model: nn.Module, old: int, new: int) -> None:
    config = getattr(model, "config", None)
    if getattr(config, "num_labels", None) == old:
        config.num_labels = new  # type: ignore[union-attr]


def _new_layer(old: Any, num_outputs: int, seed: int) -> nn.Module:
    options = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Linear):
        new: nn.Module = nn.utils.skip_init(nn.Linear, old.in_features, num_outputs, **options)
    else:
        kind = next(kind for kind in CONVOLUTIONS if isinstance(old, kind))
        geometry = {"stride": old.stride, "padding": old.padding, "padding_mode": old.padding_mode}
        new = nn.utils.skip_init(kind, old.in_channels, num_outputs, 1, **geometry, **options)
    init_linear(new, seed)
    return new.train(old.training)


def _swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is registered."""
    if old is model:
        raise ConfigError(
            f"head: the model is one {type(old).__name__} layer, which cannot be replaced in place. "
            "Wrap it: torch.nn.Sequential(layer)"
        )
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def _tied_names(model: nn.Module, head: nn.Module) -> list[str]:
    own = {id(parameter) for parameter in head.parameters()}
    inside = {
        f"{name}.{key}" for name, module in model.named_modules(remove_duplicate=False) if module is head
        for key, _ in head.named_parameters()
    }  # fmt: skip
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if id(parameter) in own and name not in inside and head is not model]


def _check_width(model: nn.Module, name: str, num_outputs: int, inputs: Inputs | None) -> None:
    if inputs is None:
        return
    try:
        with probing(model):
            shape = tuple(call_model(model, inputs).shape)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ConfigError(f"head={name!r}: with {num_outputs} outputs the model no longer runs: {error}") from error
    if num_outputs not in shape[1:] and not (num_outputs == 1 and len(shape) == 1):
        raise ConfigError(
            f"head={name!r}: with {num_outputs} outputs the model still gives shape {shape}: it is not the layer "
            'that gives the outputs. Name the right one: head="<module name>"'
        )


def _endings(model: nn.Module, num_outputs: int, inputs: Inputs | None) -> list[str]:
    """What the user should know about a softmax or sigmoid behind the head."""
    ending = _last_registered(model) if inputs is None else _shown_by_values(model, inputs)
    if ending == "softmax":
        return [
            "the model ends in softmax, but cross-entropy expects logits: remove it, or training is slow and stalls"
        ]
    if ending == "sigmoid":
        return ["the model ends in sigmoid, but the losses expect logits: remove it, or training is slow and stalls"]
    if ending == "log-softmax" and num_outputs > 1:
        return ["the model ends in log-softmax, which cross-entropy takes as it is"]
    return []


def _last_registered(model: nn.Module) -> str:
    last = [module for module in model.modules() if not isinstance(module, nn.Flatten | nn.Identity)][-1]
    names = {nn.Softmax: "softmax", nn.Softmax2d: "softmax", nn.LogSoftmax: "log-softmax", nn.Sigmoid: "sigmoid"}
    return names.get(type(last), "")


def _shown_by_values(model: nn.Module, inputs: Inputs) -> str:
    with probing(model):
        outputs = call_model(model, inputs).double()
    if outputs.ndim < 2 or not outputs.numel() or not torch.isfinite(outputs).all():
        return ""
    low, high = outputs.min().item(), outputs.max().item()
    if low >= 0 and _sums_to_one(outputs) and outputs.shape[1] > 1:
        return "softmax"
    if high <= 0 and _sums_to_one(outputs.exp()) and outputs.shape[1] > 1:
        return "log-softmax"
    return "sigmoid" if isinstance(list(model.modules())[-1], nn.Sigmoid) and low >= 0 and high <= 1 else ""


def _sums_to_one(values: torch.Tensor) -> bool:
    return bool(((values.sum(1) - 1).abs() < 1e-2).all())


def _materialize(model: nn.Module, inputs: Inputs) -> None:
    """Let lazy layers find their sizes."""
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters()):
        with probing(model):
            call_model(model, inputs)
