"""Frozen Linear layers that are called by the hundred: their weights are packed once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyft.freezing.lean.linear import LeanLinear, ProducingLinear
from pyft.freezing.prefix_cache_trace import in_place_of_forward
from pyft.ops.packed_linear import LEAST_WIDTH, pack_linear, packed_linear, packing_pays

_KINDS = (nn.Linear, LeanLinear, ProducingLinear)


@contextlib.contextmanager
def packed_products(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Inside, Linear layers in the named modules multiply with a packed copy of their weight where that is faster.

    Results differ from torch's by the order of additions. The weights must not change meanwhile; they take their memory
    once more. Without effect on GPUs, under autocast, in other dtypes than float32, where a gradient is wanted, without
    the compiled core, and on CPUs for which torch's own product is the faster one.
    """
    layers = set(_layers(model, names)) if packing_pays() else set()
    with in_place_of_forward(model, _packed, layers):
        yield


def _layers(model: nn.Module, names: Collection[str]) -> Iterator[str]:
    """Names of the layers that take part: of these very classes, since a subclass may do anything."""
    for name, module in model.named_modules():
        inside = any(name == one or name.startswith(f"{one}." if one else "") for one in names)
        if inside and type(module) in _KINDS and "forward" not in vars(module):
            weight = module.weight
            plain = type(weight) in (nn.Parameter, Tensor) and weight.device.type == "cpu"
            if plain and weight.dtype == torch.float32 and min(weight.shape) >= LEAST_WIDTH:
                yield name


def _packed(name: str, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    assert isinstance(layer, nn.Linear)
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    kept: list[Tensor] = []

    def multiply(input: Tensor) -> Tensor:
        plain = type(input) is Tensor and input.dtype == torch.float32 and input.device.type == "cpu"
        if not plain or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return forward(input)
        if not kept:
            kept.append(pack_linear(weight))
        return packed_linear(input, kept[0], bias, weight.shape[0])

    return multiply
