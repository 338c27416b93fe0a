"""Pictures are read for the features of the frozen part, and not again in the epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pyft
from pyft import cached_features
from pyft.data.images import ImagePreprocess

pytest.importorskip("PIL", reason="pip install 'pyft[image]'")

CHECKED = 2
"""Batches that are compared with the real thing before inputs are left out."""


class Small(nn.Module):
    """A network for 16-pixel pictures with two frozen layers and two that train."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = scale
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale != 1.0:
            x = x * self.scale
        return self.head(self.last(self.two(self.one(x))).mean((2, 3)))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the size of each batch of pictures that is made."""
    sizes: list[int] = []
    for source in ("ImageInputs", "CalledInputs"):
        cls = getattr(pyft.data.inputs, source)
        own = cls.fetch
        monkeypatch.setattr(
            cls, "fetch", lambda self, index, epoch, own=own: sizes.append(len(index)) or own(self, index, epoch)
        )
    return sizes


def shrink(image: Any) -> torch.Tensor:
    """A preprocessing of the user's."""
    array = np.asarray(image.convert("RGB").resize((16, 16)), dtype=np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1)


def tune(colours: Path, out: Path, model: nn.Module | None = None, **keywords: Any) -> pyft.Result:
    options = {
        "preprocess": ImagePreprocess(16), "freeze": ["one", "two"], "strategy": "full", "epochs": 5, "lr": 1e-2,
        "batch_size": 8, "export": None, "progress": False, "precision": "fp32",
    }  # fmt: skip
    return pyft.finetune(model or Small(), colours, out=out, **{**options, **keywords})


def counted(monkeypatch: pytest.MonkeyPatch, fetched: list[int]) -> list[int]:
    """Gets, at the end of each fill, how many batches had been made until then."""
    ends: list[int] = []
    own = cached_features.StageFeatures.fill

    def fill(self: cached_features.StageFeatures) -> None:
        own(self)
        ends.append(len(fetched))

    monkeypatch.setattr(cached_features.StageFeatures, "fill", fill)
    return ends


@pytest.mark.parametrize("preprocess", [ImagePreprocess(16), shrink])
def test_no_picture_is_made_after_the_fill(
    preprocess: Any, colours: Path, tmp_path: Path, fetched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = counted(monkeypatch, fetched)
    before: list[int] = []
    own = pyft.finetune.__globals__["evaluate_tuned"]
    monkeypatch.setitem(
        pyft.finetune.__globals__, "evaluate_tuned", lambda *given: before.append(len(fetched)) or own(*given)
    )
    result = tune(colours, tmp_path / "run", preprocess=preprocess)
    assert "features" in result.seconds
    # 5 epochs of 6 batches and validation: 2 batches are made again, to compare what is stored with.
    assert before[0] - ends[0] == CHECKED
    monkeypatch.setattr(cached_features.StageFeatures, "reads_inputs", True)
    whole = tune(colours, tmp_path / "whole", preprocess=preprocess)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], value), name
    assert [row["val_loss"] for row in result.history] == [row["val_loss"] for row in whole.history]


def test_copies_of_pictures_are_not_made_again(
    colours: Path, tmp_path: Path, fetched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = counted(monkeypatch, fetched)
    kept = tune(colours, tmp_path / "kept", augment="flip", augment_views=2, val=None)
    assert len(fetched) - ends[0] == CHECKED
    monkeypatch.setattr(cached_features.StageFeatures, "reads_inputs", True)
    made = tune(colours, tmp_path / "made", augment="flip", augment_views=2, val=None)
    for name, value in made.model.state_dict().items():
        assert torch.equal(kept.model.state_dict()[name], value), name


def test_a_model_that_reads_its_pictures_gets_them(
    colours: Path, tmp_path: Path, fetched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = counted(monkeypatch, fetched)
    tune(colours, tmp_path / "run", Small(scale=2.0), val=None)
    assert len(fetched) - ends[0] == 5 * 8


def test_pictures_come_back_when_the_cache_is_given_up(
    colours: Path, tmp_path: Path, fetched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = counted(monkeypatch, fetched)
    whole = tune(colours, tmp_path / "whole", val=None, cache_features=False)
    fetched.clear()
    own = cached_features.StageFeatures.call
    calls: list[int] = []

    def giving_up(self: cached_features.StageFeatures, model: nn.Module, inputs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 13:
            self.cache.give_up("a test says so")
        return own(self, model, inputs)

    monkeypatch.setattr(cached_features.StageFeatures, "call", giving_up)
    result = tune(colours, tmp_path / "run", val=None)
    # The batch that came without pictures gets them, and all after it.
    assert len(fetched) - ends[-1] == CHECKED + (5 * 8 - 12)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], value, rtol=1e-3, atol=1e-5)
