"""Learning rates step by step, against closed forms and torch's own schedulers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pyft.errors import ConfigError
from pyft.training.schedules import PlateauSchedule, make_schedule, warmup_steps


def sgd(lr: float = 2.0) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("warmup", [0, 4, 0.2])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_every_step(name: str, warmup: float | int) -> None:
    optimizer, total = sgd(), 20
    warm = 0 if warmup == 0 else 4
    seen = rates(optimizer, make_schedule(name, optimizer, total, warmup), total)
    for step, lr in enumerate(seen):
        done = (step - warm) / (total - warm)
        after = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[name]
        wanted = (step + 1) / warm if step < warm else after
        assert lr == pytest.approx(2.0 * wanted, rel=1e-12), step
    end = optimizer.param_groups[0]["lr"]
    assert end == pytest.approx(2.0 if name == "constant" else 0.0, abs=1e-12)


def test_the_first_step_moves_and_one_step_is_enough() -> None:
    optimizer = sgd()
    assert rates(optimizer, make_schedule("cosine", optimizer, 1, 0.5), 1) == [2.0]
    assert warmup_steps(0.5, 1) == 0
    assert warmup_steps(0.999, 10) == 9


def test_plateau_after_the_warmup_is_that_of_torch() -> None:
    values = [1.0, 0.5, 0.6, 0.7, 0.4, 0.4, 0.4, 0.4, 0.4, 0.1]
    optimizer, reference = sgd(), sgd()
    schedule = make_schedule("plateau", optimizer, 100, 3)
    wanted = torch.optim.lr_scheduler.ReduceLROnPlateau(reference, "min", factor=0.5, patience=1)
    assert isinstance(schedule, PlateauSchedule)
    assert rates(optimizer, schedule, 3) == pytest.approx([2 / 3, 4 / 3, 2.0])
    for value in values:
        schedule.epoch_end(value)
        wanted.step(value)
        assert rates(optimizer, schedule, 2) == [reference.param_groups[0]["lr"]] * 2
    assert optimizer.param_groups[0]["lr"] < 1.0


def test_plateau_leaves_the_warmup_alone_and_can_look_upwards() -> None:
    optimizer = sgd()
    schedule = make_schedule("plateau", optimizer, 100, 4, higher_is_better=True)
    assert isinstance(schedule, PlateauSchedule)
    for _ in range(4):
        schedule.epoch_end(0.0)
    assert rates(optimizer, schedule, 5) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    for value in (0.1, 0.2, 0.3, 0.4):
        schedule.epoch_end(value)
    assert optimizer.param_groups[0]["lr"] == 2.0
    schedule.epoch_end(0.4)
    schedule.epoch_end(0.4)
    assert optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "plateau"])
def test_state_goes_on_where_it_was(name: str) -> None:
    def run(stop: int | None) -> list[float]:
        optimizer = sgd()
        schedule = make_schedule(name, optimizer, 30, 5)
        seen = []
        for step in range(30):
            if step == stop:
                states = optimizer.state_dict(), schedule.state_dict()
                optimizer = sgd()
                schedule = make_schedule(name, optimizer, 30, 5)
                optimizer.load_state_dict(states[0])
                schedule.load_state_dict(states[1])
            seen += rates(optimizer, schedule, 1)
            if isinstance(schedule, PlateauSchedule) and step % 3 == 2:
                schedule.epoch_end(1.0)
        return seen

    whole = run(None)
    assert len(set(whole)) >= 5
    for stop in (2, 5, 17):
        assert run(stop) == whole


def test_bad_requests() -> None:
    with pytest.raises(ConfigError, match="'step'"):
        make_schedule("step", sgd(), 10)
    with pytest.raises(ConfigError, match="total_steps"):
        make_schedule("cosine", sgd(), 0)
