"""Which stages a strategy makes, and what each freezes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from pyft.errors import ConfigError
from pyft.training.stages import Stage, make_stages, outside_head


@pytest.mark.parametrize(
    ("strategy", "epochs", "wanted"),
    [
        ("head", 5, [("head", 5, "head")]),
        ("full", 5, [("full", 5, "full")]),
        ("gradual", 5, [("head", 1, "head"), ("full", 4, "full")]),
        ("gradual", 9, [("head", 3, "head"), ("full", 6, "full")]),
        ("gradual", 2, [("head", 1, "head"), ("full", 1, "full")]),
        ("gradual", 1, [("head", 1, "head")]),
    ],
)
def test_epochs_are_shared_out(strategy: str, epochs: int, wanted: list[tuple[str, int, str]]) -> None:
    stages = make_stages(strategy, epochs, "classifier")
    assert [(stage.name, stage.epochs, stage.kind) for stage in stages] == wanted


def test_freeze_goes_to_every_stage() -> None:
    head, full = make_stages("gradual", 4, "head", "body.0*")
    assert full.freeze == "body.0*"
    parameter = nn.Parameter()
    assert head.freeze("body.1.weight", parameter)
    assert head.freeze("header.weight", parameter)
    assert not head.freeze("head.weight", parameter)


@pytest.mark.parametrize(
    "freeze",
    [
        "head.0",
        ["body*", "head.0.*"],
        lambda name, parameter: name.startswith("head.0"),
        SimpleNamespace(frozen=["head.0.weight", "head.0.bias"]),
    ],
)
def test_what_the_user_freezes_inside_the_head_stays_frozen(freeze: Any) -> None:
    predicate = outside_head("head", freeze)
    parameter = nn.Parameter()
    assert predicate("head.0.weight", parameter)
    assert not predicate("head.1.weight", parameter)


def test_a_model_that_is_its_own_head_has_nothing_outside() -> None:
    assert not outside_head("")("weight", nn.Parameter())


def test_own_stages_are_taken_as_they_are() -> None:
    stages = [Stage("a", epochs=2), Stage("b", ["x*"], 3, 0.1, "head")]
    assert make_stages(stages, 99, None) == stages


@pytest.mark.parametrize(
    ("strategy", "epochs", "head", "message"),
    [
        ("heads", 1, "h", "strategy must be"),
        ("head", 1, None, "needs a head"),
        ("gradual", 3, None, "needs a head"),
        ("full", 0, "h", "epochs of stage 'full'"),
        ([], 1, "h", "no stages"),
        ([Stage("a"), Stage("a")], 1, "h", "two stages are named 'a'"),
        ([Stage("a", lr_scale=0.0)], 1, "h", "lr_scale of stage 'a'"),
        ([Stage("a", kind="tail")], 1, "h", "kind of stage 'a'"),  # type: ignore[arg-type]
        (["a"], 1, "h", "it holds str"),
    ],
)
def test_bad_stages(strategy: Any, epochs: int, head: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_stages(strategy, epochs, head)
