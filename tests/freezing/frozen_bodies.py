"""A small model with a frozen body, and the proof that it is played back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import pyft
from pyft.freezing.prefix_cache import PrefixCache

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """A frozen body of two blocks, a trainable block and head; `forward` may be anything."""

    def __init__(self, forward: Callable[[Body, torch.Tensor], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True))
        self.two = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.tail = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.own = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.tail(self.two(self.one(x)))) if self.own is None else self.own(self, x)


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            with torch.no_grad():
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    pyft.freeze(model, list(names or ("one", "two")))
    return model.train()


def make(forward: Callable[[Body, torch.Tensor], Any] | None = None, **options: Any) -> tuple[Body, PrefixCache]:
    model = frozen(Body(forward))
    return model, PrefixCache(model, X[:5], **options)  # type: ignore[return-value]


def first(output: Any) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        output = output[0] if isinstance(output, tuple) else next(iter(output.values()))
    return output


def both_ways(model: nn.Module, cache: PrefixCache, rounds: int = 4) -> None:
    """Fill with fixed batches and play them: outputs and gradients are those of the model, bit for bit."""
    cuts = [torch.arange(0, 4), torch.tensor([9, 4, 7]), torch.tensor([5, 6, 8, 10, 11])]
    for turn in range(rounds):
        for index in cuts:
            results = []
            for cached in (False, True):
                torch.manual_seed(turn)
                model.zero_grad()
                if cached:
                    with cache.batch(index):
                        out = first(model(X[index].clone()))
                else:
                    out = first(model(X[index].clone()))
                out.square().mean().backward()
                grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
                results.append([out.detach(), *grads])
            assert len(results[0]) == len(results[1]) > 1
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert cache.reason is None
    assert (cache.filled, cache.played) == (len(cuts), len(cuts) * (rounds - 1))


def residual(model: Body, x: torch.Tensor) -> torch.Tensor:
    a = model.one(x)
    b = a + model.two(a)
    return model.head(model.tail(b.view(len(x), 2, 4).transpose(1, 2).reshape(len(x), 8)) + 1)
