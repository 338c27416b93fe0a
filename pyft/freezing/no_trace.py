"""Passes of a model that leave nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from pyft.freezing.eval_mode import kept


@contextlib.contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """Run training steps inside, and leave gradients, buffers, modes and random state as they were.

    Modes include those that were asked of modules which a plan keeps in eval mode. Parameters are not guarded: run no
    optimizer step inside.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training, kept(module)) for module in model.modules()]
    asked = [keeper.mode if keeper is not None else False for _, _, keeper in modes]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with random_state_kept(model):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                buffer.copy_(values)
                module._buffers[name] = buffer
        for (module, training, keeper), mode in zip(modes, asked, strict=True):
            module.training = training
            if keeper is not None:
                keeper.mode = mode


def random_state_kept(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Random state of the CPU and of the model's devices is afterwards as it was."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    return torch.random.fork_rng(devices=sorted({device.index or 0 for device in devices}), device_type=kind)
