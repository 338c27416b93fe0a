"""Passes of a model that leave nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def no_trace(model: nn.Module, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run training steps inside, and leave gradients, buffers, modes and random state as they were.

    Parameters are not guarded: run no optimizer step inside.
    """
    device = torch.device(device)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    for parameter, _ in gradients:
        parameter.grad = None
    devices = [] if device.type == "cpu" else [device.index or 0]
    try:
        with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                buffer.copy_(values)
                module._buffers[name] = buffer
        for module, training in modes:
            module.training = training
