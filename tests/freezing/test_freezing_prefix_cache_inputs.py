"""What only the stored part takes need not be made again: playback without inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from frozen_bodies import Body, X, both_ways, frozen, make, residual

from pyft.errors import ConfigError
from pyft.freezing.prefix_cache import PrefixCache
from pyft.freezing.prefix_cache_play import StandInError


def test_stored_samples_need_no_inputs() -> None:
    model, cache = make(residual)
    cache.fill([(range(12), X)])
    assert cache.inputs_like(3) is None  # the first batches are compared with the real thing
    for index in ([0, 1, 2], [4, 5]):
        with cache.batch(index):
            model(X[index])
    for index in ([7, 3, 11], [1, 2, 3, 4, 5, 6]):
        with cache.batch(index):
            right = model(X[index])
        with cache.batch(index):
            found = model(cache.inputs_like(len(index)))
        assert torch.equal(found, right)
    found.sum().backward()
    assert model.tail.weight.grad is not None
    assert (cache.reason, cache.played) == (None, 6)


def plain_code_reads(model: Body, x: torch.Tensor) -> torch.Tensor:
    return model.head(model.tail(model.two(model.one(x * 2))))


def tail_reads(model: Body, x: torch.Tensor) -> torch.Tensor:
    return model.head(model.tail(model.two(model.one(x))) + x.mean())


def numbers_are_read(model: Body, x: torch.Tensor) -> torch.Tensor:
    return model.head(model.tail(model.two(model.one(x)))) * (2.0 if x.tolist()[0][0] > 1e9 else 1.0)


def given_back(model: Body, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return model.head(model.tail(model.two(model.one(x)))), x


@pytest.mark.parametrize("forward", [plain_code_reads, tail_reads, numbers_are_read, given_back])
def test_a_model_that_reads_its_inputs_gets_them(forward: Callable[..., Any]) -> None:
    model, cache = make(forward, checks=0)
    both_ways(model, cache)
    assert cache.inputs_like(4) is None


def test_inputs_that_are_missed_after_all() -> None:
    def forward(model: Body, x: torch.Tensor) -> torch.Tensor:
        out = model.head(model.tail(model.two(model.one(x))))
        return out + x.sum() if len(x) == 7 else out

    model = frozen(Body(forward))
    said: list[str] = []
    cache = PrefixCache(model, X[:5], checks=0, say=said.append)
    cache.fill([(range(12), X)])
    with pytest.raises(StandInError, match="reads its inputs"), cache.batch(range(7)):
        model(cache.inputs_like(7))
    assert len(said) == 1
    assert cache.inputs_like(4) is None


def test_samples_that_are_not_stored_need_inputs() -> None:
    model, cache = make(checks=0)
    cache.fill([(range(4), X[:4])])
    with pytest.raises(ConfigError, match="not all samples of this batch are stored"), cache.batch([3, 4]):
        model(cache.inputs_like(2))
    assert cache.reason is None
