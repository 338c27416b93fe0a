"""Unfreezing in the middle of a run: the optimizer follows, old state stays, schedulers and resuming go on."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import pyft
from pyft.errors import ConfigError

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch.AdamW": torch.optim.AdamW,
    "torch.SGD": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "torch.RMSprop": torch.optim.RMSprop,
    "pyft.AdamW": lambda params: pyft.optim.AdamW(params, lr=1e-3),
    "pyft.AdamW.int8": lambda params: pyft.optim.AdamW(params, lr=1e-3, state_dtype="int8"),
    "pyft.AdamW.backward": lambda params: pyft.optim.AdamW(params, lr=1e-3, step_in_backward=True),
    "pyft.AdamW.norms": lambda params: pyft.optim.AdamW(params, lr=1e-3, clip_norm=1.0, norm_in_backward=True),
    "pyft.SGD": lambda params: pyft.optim.SGD(params, lr=0.01, momentum=0.9),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(number))
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def step_count(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    return int(optimizer.state[parameter]["step"])


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_new_parameters_start_fresh_and_old_ones_go_on(make: Callable[..., Any]) -> None:
    """Against two optimizers side by side, one for the old and one made at the moment of unfreezing for the new."""
    model, twin = net(), net()
    plan = pyft.freeze(model, ["0", "2"])
    optimizer = make(trainable(model))
    head = make(list(twin[4].parameters()))
    twin[0].requires_grad_(False)
    twin[2].requires_grad_(False)
    for i in range(3):
        step(model, optimizer, i)
        step(twin, head, i)
    plan = plan.thaw(model, "2", optimizer=optimizer)
    twin[2].requires_grad_(True)
    body = make(list(twin[2].parameters()))
    for i in range(3, 6):
        step(model, optimizer, i)
        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(i))
        twin(x).square().mean().backward()
        for one in (head, body):
            one.step()
            one.zero_grad()
    settings = getattr(optimizer, "settings", None)
    # Clipped together, or rounded by a seed that depends on the parameter's number, the two differ.
    if settings is None or (not settings.limits.any and settings.state_dtype != "int8"):
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    plan.verify(model)
    if "step" in optimizer.state[model[4].weight]:
        assert step_count(optimizer, model[4].weight) == 6
        assert step_count(optimizer, model[2].weight) == 3


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_froze_leaves_with_its_state(make: Callable[..., Any]) -> None:
    model = net()
    plan = pyft.freeze(model, "0")
    optimizer = make(trainable(model))
    for i in range(2):
        step(model, optimizer, i)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = plan.extend(model, "2", optimizer=optimizer)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in trainable(model)}
    assert model[2].weight not in optimizer.state
    for i in range(2, 4):
        step(model, optimizer, i)
    assert torch.equal(model[2].weight, before["2.weight"])
    assert not torch.equal(model[4].weight, before["4.weight"])
    plan.thaw(model, "2", optimizer=optimizer)
    step(model, optimizer, 5)
    if "step" in optimizer.state[model[2].weight]:
        assert step_count(optimizer, model[2].weight) == 1
        assert step_count(optimizer, model[4].weight) == 5


@pytest.mark.parametrize("make", [torch.optim.AdamW, pyft.optim.AdamW], ids=["torch", "pyft"])
def test_a_resumed_run_ends_with_the_same_bits(make: Callable[..., Any]) -> None:
    """Lightning: resume after unfreezing fails, or freezes again."""

    def begin() -> tuple[nn.Module, Any, Any, Any]:
        model = net()
        plan = pyft.freeze(model, ["0", "2"])
        optimizer = make(trainable(model), lr=1e-3)
        return model, plan, optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)

    model, plan, optimizer, schedule = begin()
    for i in range(3):
        schedule.step(step(model, optimizer, i))
    plan = plan.thaw(model, "2", optimizer=optimizer)
    for i in range(3, 5):
        schedule.step(step(model, optimizer, i))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    for i in range(5, 8):
        schedule.step(step(model, optimizer, i))

    file.seek(0)
    weights, state, of_schedule = torch.load(file, weights_only=True)
    for anew in (False, True):
        again, plan, optimizer, schedule = begin()
        again.load_state_dict(weights)
        plan = plan.thaw(again, "2", optimizer=None if anew else optimizer)
        if anew:
            optimizer = make(trainable(again), lr=1e-3)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        optimizer.load_state_dict(copy.deepcopy(state))  # torch's steps write into what was loaded
        schedule.load_state_dict(of_schedule)
        for i in range(5, 8):
            schedule.step(step(again, optimizer, i))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        assert again[2].weight.requires_grad
        assert not again[0].weight.requires_grad


def test_plateau_and_other_schedules_keep_working_on_every_group() -> None:
    """Lightning: ReduceLROnPlateau breaks when a callback adds groups."""
    model = net()
    plan = pyft.freeze(model, ["0", "2"])
    decay, rest = [model[4].weight], [model[4].bias]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1.0
    )
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, min_lr=[1e-3, 1e-2])
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda i: 1 / (i + 1), lambda i: 1.0])
    plan.thaw(model, "2", optimizer=optimizer)
    assert [[p.ndim for p in group["params"]] for group in optimizer.param_groups] == [[2, 2], [1, 1]]
    for _ in range(9):
        optimizer.step()
        plateau.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 1e-2])
    cosine.step()


def test_where_new_parameters_go_can_be_said() -> None:
    model = net()
    plan = pyft.freeze(model, ["0", "2"])
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = pyft.optim.AdamW([{"params": named, "lr": 1e-3}])
    plan = plan.thaw(model, "2", optimizer=optimizer, group={"lr": 1e-4, "weight_decay": 0.5})
    plan = plan.thaw(model, "0", optimizer=optimizer, group=-1)
    assert optimizer.param_groups[1]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert optimizer.param_groups[1]["lr"] == 1e-4
    assert optimizer.param_groups[0]["param_names"] == ["4.weight", "4.bias"]
    before = copy.deepcopy(optimizer.state_dict())
    plan.thaw(model, "0", optimizer=optimizer)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_parameters_of_others_stay_and_shared_ones_come_once() -> None:
    model, other = net(), nn.Linear(3, 3)
    model.again = model[2]
    plan = pyft.freeze(model, ["0", "2", "again"])
    optimizer = torch.optim.SGD([*other.parameters(), *trainable(model)], lr=0.1)
    plan = plan.thaw(model, ["2", "again"], optimizer=optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 2 + 4
    assert all(any(p is q for q in optimizer.param_groups[0]["params"]) for p in other.parameters())
    plan.extend(model, "*", optimizer=optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in other.parameters()]


def test_what_cannot_follow_is_refused_before_anything_changes() -> None:
    model = net()
    plan = pyft.freeze(model, "0")
    good = torch.optim.SGD(trainable(model), lr=0.1)
    for wrong, group, message in [
        (torch.optim.LBFGS(trainable(model)), None, "LBFGS"),
        (model, None, "Sequential came"),
        (good, 1, "group=1"),
        (good, True, "group=True"),
        (good, {"params": []}, "leave them out"),
        (good, "first", "group='first'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            plan.thaw(model, "0", optimizer=wrong, group=group)
        assert not model[0].weight.requires_grad
        assert len(good.param_groups[0]["params"]) == 4


def test_unfreezing_gives_back_torchs_own_classes_and_the_memory_of_what_froze() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    x = torch.randn(2, 3, 12, 12)
    plan = pyft.freeze(model, ["1", "3"])
    names = [type(m).__name__ for m in model]
    assert names == ["Conv2d", "LeanConv2d", "LeanReLU", "LeanConv2d"]
    little = pyft.saved_bytes(lambda: model(x), model)
    plan = plan.thaw(model, "1")
    assert [type(m).__name__ for m in model] == ["Conv2d", "Conv2d", "LeanReLU", "LeanConv2d"]
    assert pyft.saved_bytes(lambda: model(x), model) > little
    plan = plan.extend(model, "1")
    assert pyft.saved_bytes(lambda: model(x), model) == little
    plan.release(model)
    assert {type(m) for m in model} == {nn.Conv2d, nn.ReLU}
