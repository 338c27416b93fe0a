"""Settings are checked before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyft.errors import ConfigError
from pyft.training.settings import Settings, auto_lr, describe, higher_is_better, resolve, stage_lr
from pyft.training.stages import Stage


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", "adam"),
        ("schedule", "exponential"),
        ("precision", "fp16"),
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("accumulate", 0),
        ("seed", 1.0),
        ("patience", 0),
        ("lr", 0.0),
        ("lr", -1e-3),
        ("lr", "fast"),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("clip", 0.0),
        ("weight_decay", -0.1),
        ("momentum", 1.0),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("warmup", 1.0),
        ("warmup", -1),
        ("warmup", "some"),
        ("loss", "mse"),
        ("loss", 3),
    ],
)
def test_a_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name}") as caught:
        resolve(Settings(**{name: value}), "classification", "text")
    assert repr(value) in str(caught.value) or type(value).__name__ in str(caught.value)


@pytest.mark.parametrize(
    ("problem", "loss", "metric"),
    [
        ("classification", "cross_entropy", "macro_f1"),
        ("multilabel", "bce", "macro_f1"),
        ("regression", "mse", "rmse"),
    ],
)
def test_auto_depends_on_the_problem(problem: Any, loss: str, metric: str) -> None:
    settings = resolve(Settings(), problem, "image")
    assert (settings.loss, settings.metric, settings.kind) == (loss, metric, "image")


def test_a_metric_may_be_named_as_in_the_table() -> None:
    assert resolve(Settings(metric="val_accuracy"), "classification", "text").metric == "accuracy"


@pytest.mark.parametrize("metric", ["loss", "val_loss", "rmse", "mae", "mse", "max_error", "hamming_loss"])
def test_lower_is_better(metric: str) -> None:
    assert not higher_is_better(metric)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "r2", "balanced_accuracy", "macro_precision"])
def test_higher_is_better(metric: str) -> None:
    assert higher_is_better(metric)


def test_lr_auto_is_larger_for_a_head_than_for_a_pretrained_body() -> None:
    for optimizer in ("adamw", "sgd"):
        for kind in ("text", "image", "array"):
            head, reason = auto_lr(optimizer, "head", kind)  # type: ignore[arg-type]
            full, _ = auto_lr(optimizer, "full", kind)  # type: ignore[arg-type]
            assert head > full
            assert f"{head:g}" in reason


def test_stage_lr_takes_the_scale_of_the_stage() -> None:
    assert stage_lr(Settings(lr=0.5), Stage("a", lr_scale=0.1)) == (0.05, None)
    lr, reason = stage_lr(Settings(kind="text"), Stage("a", lr_scale=0.5))
    assert lr == 0.5 * auto_lr("adamw", "full", "text")[0]
    assert reason is not None
    assert "lr_scale 0.5" in reason


def test_describe_is_plain_and_tells_settings_apart() -> None:
    one = describe(Settings(loss=torch.nn.functional.mse_loss, class_weight=torch.tensor([1.0, 2.0])))  # type: ignore[arg-type]
    assert one["loss"] == "torch.nn.functional.mse_loss"
    assert one["class_weight"] == [1.0, 2.0]
    assert one != describe(Settings(loss=torch.nn.functional.l1_loss, class_weight=[1.0, 2.0]))
    assert describe(Settings(loss=torch.nn.L1Loss()))["loss"] == "torch.nn.modules.loss.L1Loss"
