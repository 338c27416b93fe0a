"""Convolutions with their channels last in memory: the same numbers, often much sooner."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from pyft.freezing.no_trace import no_trace

# A layout that wins by less is not worth another last bit.
_LEAST_SPEEDUP = 1.1
# Of the time of the job, seconds at most.
_SHARE, _MOST_SECONDS = 0.02, 3.0
# Sums in another order differ in the last digits; a model that reads memory its own way differs in the first.
_TOLERANCE = 1e-3


def convolution_weights(model: nn.Module) -> list[nn.Parameter]:
    """The 4-D weights of the 2-D convolutions, each once. Empty where one of them has a layout of the user's choice."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    found = {id(weight): weight for module in convolutions if (weight := module._parameters.get("weight")) is not None}
    return list(found.values()) if all(weight.is_contiguous() for weight in found.values()) else []


@contextlib.contextmanager
def channels_last(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Inside, the weights of 2-D convolutions have their channels last, and so has what these give to later layers.

    Afterwards each weight is where it was in memory, with the new values: others may look at the same memory.
    """
    places = [(weight, weight.data) for weight in convolution_weights(model)] if wanted else []
    for weight, place in places:
        weight.data = place.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for weight, place in places:
            weight.data = place.copy_(weight.data)


def choose_layout(
    model: nn.Module, forward: Callable[[], Tensor], device: torch.device, batches: int
) -> tuple[bool, str | None]:
    """Whether to train with channels last, and the reason in one line where that was found faster.

    Both layouts run forward and backward in training mode; gradients, buffers, modes and random state stay as they
    were. A model that fails with channels last (`view` on what is not contiguous), or gives other outputs, keeps its
    own layout.

    Args:
        forward: runs the model on one batch and returns its output.
        batches: forward and backward passes of the whole job; the trial takes about a fiftieth of their time.
    """
    if not convolution_weights(model):
        return False, None
    with no_trace(model):
        try:
            if not _same_outputs(model, forward):
                return False, None
            model.train()
            plain, last = _time_both(model, forward, device, batches)
        except RuntimeError:
            return False, None
    if plain < _LEAST_SPEEDUP * last:
        return False, None
    return True, f"channels last: {last * 1e3:.3g} ms a batch of the trial, {plain * 1e3:.3g} ms with channels first"


def _same_outputs(model: nn.Module, forward: Callable[[], Tensor]) -> bool:
    model.eval()
    with torch.no_grad():
        plain = forward().float()
        with channels_last(model):
            last = forward().float()
    return bool((plain - last).abs().max() <= _TOLERANCE * plain.abs().max())


def _time_both(
    model: nn.Module, forward: Callable[[], Tensor], device: torch.device, batches: int
) -> tuple[float, float]:
    """Shortest seconds of one pass with channels first and one with channels last, taken in turn."""
    best = [float("inf"), float("inf")]
    begin = time.perf_counter()
    for turn in range(10):
        for number in (0, 1):
            with channels_last(model, bool(number)):
                start = time.perf_counter()
                forward().float().square().mean().backward()
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
                # The first pass of each pays for what later ones find ready.
                if turn:
                    best[number] = min(best[number], time.perf_counter() - start)
            for parameter in model.parameters():
                parameter.grad = None
        if turn and time.perf_counter() - begin > min(_MOST_SECONDS, _SHARE * batches * best[0]):
            break
    return best[0], best[1]
