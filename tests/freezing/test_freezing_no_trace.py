"""A look at a model leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyft
from pyft.freezing.no_trace import no_trace


@pytest.mark.parametrize("asked", [True, False])
def test_the_mode_asked_of_a_frozen_module_comes_back(asked: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    plan = pyft.freeze(model, ["0", "1"])
    model.train(asked)
    with no_trace(model):
        model.train(not asked)
    assert [module.training for module in model] == [False, False, asked]
    plan.release(model)
    assert [module.training for module in model] == [asked] * 3


def test_an_error_inside_leaves_no_trace_either() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random = torch.get_rng_state()

    def step() -> None:
        with no_trace(model):
            model.train()(torch.randn(4, 2)).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
