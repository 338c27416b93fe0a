"""Parts of weights, lean frozen layers and stored features in one model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pyft
from pyft.freezing.lean import is_lean
from pyft.freezing.partial_modules import PartialConv2d, PartialLinear


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
ROWS = {"0": [1, 4], "2": True, "3": True, "7": True}


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = pyft.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def test_rows_before_lean_layers() -> None:
    plain, lean = net(), net()
    pyft.freeze(plain, ROWS, lean=False)
    plan = pyft.freeze(lean, ROWS)
    assert type(lean[0]) is PartialConv2d
    assert is_lean(lean[2])
    assert is_lean(lean[1])
    assert not any(map(is_lean, plain))
    train(plain)
    train(lean)
    plan.verify(lean)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(lean.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    plan.release(lean)
    assert [type(module) for module in lean] == [type(module) for module in net()]


def test_a_lean_layer_can_train_in_part_later() -> None:
    model = net()
    pyft.freeze(model, ["0", "2", "3"])
    assert is_lean(model[2])
    plan = pyft.train_only(model, "2", rows=[0, 7])
    assert type(model[2]) is PartialConv2d
    assert type(copy.deepcopy(model)[2]) is PartialConv2d
    before = model[2].weight.detach().clone()
    train(model)
    changed = (model[2].weight.detach() != before).flatten(1).any(1)
    assert changed.tolist() == [True, False, False, False, False, False, False, True]
    plan.verify(model)


def test_a_plan_of_parts_changes_with_its_optimizer() -> None:
    model = net()
    plan = pyft.freeze(model, {"0": [1, 4], "2": True, "3": True})
    optimizer = pyft.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, clip_norm=1.0)

    def step() -> None:
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()

    step()
    part = model[0].weight_part
    plan = plan.thaw(model, "0", optimizer=optimizer)
    assert type(model[0]) is nn.Conv2d
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert part not in optimizer.state
    step()
    assert float(optimizer.state[model[0].weight]["step"]) == 1.0
    assert float(optimizer.state[model[7].weight]["step"]) == 2.0
    plan.verify(model)


@pytest.mark.parametrize("rows", [[0, 3], slice(0, 2)])
@pytest.mark.parametrize("with_plan", [False, True])
def test_features_end_before_a_layer_that_trains_in_part(rows: object, with_plan: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(8, 4)
    plan = pyft.freeze(model, {"0": True, "2": rows, "4": True})
    assert type(model[2]) is PartialLinear
    cache = pyft.PrefixCache(model, x, plan=plan if with_plan else None)
    twin = copy.deepcopy(model)
    optimizers = [pyft.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, twin)]
    for _ in range(4):
        with cache.batch(range(8)):
            loss = model(x).square().mean()
        for found, optimizer in zip((loss, twin(x).square().mean()), optimizers, strict=True):
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
    assert cache.reason is None
    assert cache.played > 0
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-7)
