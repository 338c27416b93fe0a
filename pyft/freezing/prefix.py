"""Run the frozen part of a model once, and train the head on what comes out of it.

Between the frozen part and the head only dropout may stand that is on while training: it belongs to the tail that is
trained (`head_tail`), and the features are what goes into it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pyft.errors import ConfigError
from pyft.freezing.eval_mode import kept
from pyft.freezing.no_trace import no_trace, random_state_kept
from pyft.freezing.plan import unwrap

Inputs = torch.Tensor | Mapping[str, torch.Tensor]

_DROPOUT = nn.modules.dropout._DropoutNd
# Two ways to the same number may differ by rounding; dropout or batch statistics differ by far more.
_ROUNDING = 1e-5


def cut_reason(model: nn.Module, head_name: str, inputs: Inputs) -> str | None:
    """Why the head cannot be trained alone on cached features; None when it can.

    It can when everything outside the head is frozen and gives the same in train and eval mode, each sample's
    features depend on that sample only, and the model's output is the output of the head's single call with one
    tensor. All of this is tried on the batch; modes, buffers and random state are left as they were.

    Args:
        head_name: dotted name of the head, as `find_head` gives it.
        inputs: a batch of at least two samples: Tensor (B, ...), or a mapping from argument name to Tensor (B, ...).

    Raises:
        ConfigError: the model has no such module.
    """
    model = unwrap(model)
    head = _head(model, head_name)
    own = {id(parameter) for parameter in head.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not name.startswith(f"{head_name}."):
            return f"the head's weight is also '{name}'"
        if id(parameter) not in own and parameter.requires_grad:
            return f"'{name}' outside the head trains"
    with no_trace(model):
        _set_mode(model, False)
        reason, features = _reason_in_eval(model, head, inputs)
        if features is None:
            return reason
        model.train()
        return _reason_in_train(model, head, inputs, features)


def head_inputs(model: nn.Module, head_name: str, inputs: Inputs) -> torch.Tensor:
    """Features (B, ...): what goes into `head_tail`. The forward pass stops there.

    Runs in inference mode; what is given back is an ordinary tensor, fit for training on it.

    Raises:
        ConfigError: the model has no such module, or does not call it.
    """
    model = unwrap(model)
    with random_state_kept(model), torch.inference_mode(), _watch(model, _head(model, head_name), stop=True) as trace:
        _run(model, inputs, trace)
        features = trace.features
    if features is None:
        raise ConfigError(f"head={head_name!r}: the model does not call it with one tensor")
    return features.clone()


def head_tail(model: nn.Module, head_name: str, inputs: Inputs) -> nn.Module:
    """What turns `head_inputs` into the model's outputs: the head, behind the dropout modules just before it.

    The modules are the model's own: training the tail trains the model.
    """
    model = unwrap(model)
    head = _head(model, head_name)
    with no_trace(model), torch.no_grad(), _watch(model, head, stop=True) as trace:
        _set_mode(model, False)
        _run(model, inputs, trace)
    if not trace.dropouts:
        return head
    tail = nn.Sequential(*trace.dropouts, head)
    tail.training = model.training  # not train(): the modules in it keep their own modes
    return tail


def _reason_in_eval(model: nn.Module, head: nn.Module, inputs: Inputs) -> tuple[str | None, torch.Tensor | None]:
    """A reason, or the features that are right."""
    with torch.enable_grad(), _watch(model, head, stop=False) as trace:
        output = _first_tensor(_run(model, inputs, trace))
    if trace.calls != 1:
        return f"the head is called {trace.calls} times per forward", None
    if trace.features is None:
        return "the head is called with something else than one tensor", None
    if trace.features.requires_grad:
        return "the head's input depends on a parameter that trains", None
    if output is not trace.output or output is None or not torch.equal(output, trace.copy):
        return "something after the head changes its output", None
    batch = len(trace.features)
    if output.ndim == 0 or len(output) != batch or batch != _length(inputs):
        return "the head does not get one row per sample", None
    if batch > 1:
        half = batch // 2
        with torch.no_grad(), _watch(model, head, stop=True) as part:
            _run(model, _rows(inputs, half), part)
        if part.features is None or not _same(part.features, trace.features[:half]):
            return "the features of a sample depend on the other samples of its batch", None
    return None, trace.features.detach()


def _reason_in_train(model: nn.Module, head: nn.Module, inputs: Inputs, features: torch.Tensor) -> str | None:
    with torch.no_grad(), _watch(model, head, stop=True) as trace:
        _run(model, inputs, trace)
    if trace.features is not None and _same(trace.features, features):
        return None
    for name, module in model.named_modules():
        if module.training and isinstance(module, _DROPOUT) and module.p > 0 and module not in trace.dropouts:
            return f"dropout '{name}' before the head is on while training"
        if module.training and isinstance(module, nn.modules.batchnorm._NormBase):
            return f"'{name}' before the head takes the statistics of each batch while training"
    return "what comes before the head gives something else in train mode (dropout by function call?)"


@dataclass
class _Trace:
    """What was seen of one forward pass."""

    calls: int = 0
    features: torch.Tensor | None = None
    dropouts: list[nn.Module] = field(default_factory=list)
    output: Any = None
    copy: Any = None


class _StopForwardError(BaseException):
    """Ends a forward pass at the head; not an Exception, so that no handler inside a model takes it."""


@contextlib.contextmanager
def _watch(model: nn.Module, head: nn.Module, stop: bool) -> Iterator[_Trace]:
    trace = _Trace()
    given: dict[int, torch.Tensor] = {}
    passed: list[tuple[nn.Module, torch.Tensor, Any]] = []

    def before_dropout(module: nn.Module, args: tuple[Any, ...]) -> None:
        given[id(module)] = args[0].clone() if module.inplace and module.training else args[0]

    def after_dropout(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        passed.append((module, given.pop(id(module)), output))

    def before_head(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.calls += 1
        single = [*args, *kwargs.values()]
        if trace.calls == 1 and len(single) == 1 and isinstance(single[0], torch.Tensor) and args:
            trace.features, trace.dropouts = _before_dropouts(single[0], passed)
        if stop:
            raise _StopForwardError
        if trace.features is not None:
            trace.features = trace.features.clone()  # the head may write to its input

    def after_head(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        trace.output = output
        trace.copy = output.detach().clone() if isinstance(output, torch.Tensor) else None

    inside = set(head.modules())
    hooks = [head.register_forward_pre_hook(before_head, with_kwargs=True), head.register_forward_hook(after_head)]
    for module in model.modules():
        if isinstance(module, _DROPOUT) and module not in inside and kept(module) is None:
            hooks += [module.register_forward_pre_hook(before_dropout), module.register_forward_hook(after_dropout)]
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


def _before_dropouts(
    features: torch.Tensor, passed: list[tuple[nn.Module, torch.Tensor, Any]]
) -> tuple[torch.Tensor, list[nn.Module]]:
    """Walk back from the head over dropout modules whose output is handed on as it is."""
    dropouts: list[nn.Module] = []
    for module, given, output in reversed(passed):
        if output is features:
            features = given
            if module.p > 0:
                dropouts.insert(0, module)
    return features, dropouts


def _run(model: nn.Module, inputs: Inputs, trace: _Trace) -> Any:
    with contextlib.suppress(_StopForwardError):
        return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return None


def _first_tensor(output: Any) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    return found if isinstance(found, torch.Tensor) else None


def _head(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ConfigError(f"head={name!r}: the model has no such module") from None


def _set_mode(model: nn.Module, training: bool) -> None:
    for module in model.modules():
        module.training = training


def _rows(inputs: Inputs, count: int) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: value[:count] for name, value in inputs.items()}
    return inputs[:count]


def _length(inputs: Inputs) -> int:
    return len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.numel() or torch.equal(one, other):
        return True
    scale = other.abs().max().item()
    return (one - other).abs().max().item() <= _ROUNDING * scale
