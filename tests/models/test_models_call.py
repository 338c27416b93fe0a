"""One way to call every model, and one check of what it gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pyft.errors import ConfigError
from pyft.models.call import call_model, check_outputs, probing
from pyft.samples import Batch


class Giving(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        return self.wrap(x if y is None else x + y)


class Named:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x, x + 1), lambda x: [x], Named, lambda x: {"loss": x + 1, "logits": x}],
    ids=["tensor", "tuple", "list", "object", "mapping"],
)
def test_finds_the_logits(wrap: Any) -> None:
    x = torch.rand(2, 3)
    assert torch.equal(call_model(Giving(wrap), x), x)
    assert torch.equal(call_model(Giving(wrap), {"x": x, "y": x}), x + x)


@pytest.mark.parametrize("wrap", [lambda x: "text", lambda x: {"hidden": x}, lambda x: (), lambda x: None])
def test_says_what_came_instead(wrap: Any) -> None:
    with pytest.raises(ConfigError, match="a Tensor of logits"):
        call_model(Giving(wrap), torch.rand(2, 3))


def test_outputs_that_fit() -> None:
    check_outputs(torch.zeros(4, 3), "classification", 3, 4)
    check_outputs(torch.zeros(4, 3), "multilabel", 3, 4)
    check_outputs(torch.zeros(4, 2), "regression", 2, 4)
    check_outputs(torch.zeros(4), "regression", 1, 4)
    check_outputs(torch.zeros(4, 1), "regression", 1, 4)
    check_outputs(torch.zeros(2, 3), "classification", 3, Batch(torch.zeros(2, 5), None, torch.arange(2)))


@pytest.mark.parametrize(
    ("shape", "problem", "classes", "message"),
    [
        ((4, 2), "classification", 3, "3 classes"),
        ((4, 2), "regression", 1, "1 targets"),
        ((4,), "classification", 2, "one row per sample"),
        ((4, 7, 3), "classification", 3, "one row per sample"),
        ((7, 3), "classification", 3, "batch_first"),
    ],
)
def test_outputs_that_do_not_fit(shape: tuple[int, ...], problem: Any, classes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_outputs(torch.zeros(shape), problem, classes, 4)


def test_integer_outputs_are_refused() -> None:
    with pytest.raises(ConfigError, match="int64"):
        check_outputs(torch.zeros(4, 3, dtype=torch.int64), "classification", 3, 4)


def test_probing_leaves_no_trace() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2)).train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()

    def failing() -> None:
        with probing(model):
            outputs.extend([model(torch.ones(4, 3)), model(torch.ones(4, 3))])
            torch.rand(5)
            raise ValueError("stop")

    outputs: list[torch.Tensor] = []
    with pytest.raises(ValueError, match="stop"):
        failing()
    first, second = outputs
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert [module.training for module in model] == [True, True, False]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
