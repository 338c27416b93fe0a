"""finetune with kept features: the same run from memory, from disk, interrupted, and as without them."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pyft
from pyft import cached_features
from pyft.errors import ConfigError
from pyft.plan import recalled

SIZES = [3, 5, 2, 8, 6, 4, 7, 3, 9, 5]


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.one = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3))
        self.two = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.two(self.one(x))))


def blobs(count: int = 240) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    return torch.randn(count, 6, generator=draw) + 2 * y.view(-1, 1), y


def tune(out: Path, model: nn.Module | None = None, **keywords: Any) -> pyft.Result:
    options = {
        "strategy": "full", "freeze": "one", "epochs": 4, "lr": 1e-2, "batch_size": 16, "export": None,
        "progress": False, "precision": "fp32",
    }  # fmt: skip
    data = keywords.pop("data", None) or blobs()
    return pyft.finetune(Net(0.2) if model is None else model, data, out=out, **{**options, **keywords})


def weights(result: pyft.Result) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in result.model.state_dict().items()}


def same_bits(one: pyft.Result, other: pyft.Result) -> None:
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name]), name
    assert [{**row, "seconds": 0} for row in one.history] == [{**row, "seconds": 0} for row in other.history]


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for features and plans; the core stays where it is built."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(cached_features, "cache_root", lambda: folder)
    monkeypatch.setattr(importlib.import_module("pyft.plan"), "cache_root", lambda: folder)
    return folder


@pytest.mark.parametrize("freeze", ["one", ["one", "two"]])
def test_memory_and_disk_give_the_same_bits_and_agree_with_the_whole_model(
    freeze: Any, tmp_path: Path, cache_dir: Path
) -> None:
    runs = {
        where: tune(tmp_path / str(where), freeze=freeze, cache_features=where)
        for where in ("auto", "ram", "disk", False)
    }
    assert all(("features" in run.seconds) == bool(where) for where, run in runs.items())
    same_bits(runs["auto"], runs["ram"])
    same_bits(runs["ram"], runs["disk"])
    again = tune(tmp_path / "again", freeze=freeze, cache_features="disk")
    same_bits(runs["disk"], again)
    for name, value in weights(runs["ram"]).items():
        torch.testing.assert_close(value, weights(runs[False])[name], rtol=1e-3, atol=1e-5)


def test_where_there_is_no_room_in_memory_files_of_the_run_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tune(tmp_path / "memory", cache_features="ram")
    monkeypatch.setattr("pyft.freezing.prefix_cache.free_memory", lambda: 1000)
    files = tune(tmp_path / "files")
    same_bits(memory, files)
    assert not (tmp_path / "files" / "features").exists()


def test_later_runs_find_the_features(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(tmp_path / "first", cache_features="disk")
    computed: list[int] = []
    own = pyft.PrefixCache._fill_one
    monkeypatch.setattr(
        pyft.PrefixCache,
        "_fill_one",
        lambda self, numbers, inputs: computed.append(len(numbers)) or own(self, numbers, inputs),
    )
    # Another seed is another split and another order of the same samples, as in a trial or a fold.
    tune(tmp_path / "trial", cache_features="disk", seed=7, lr=3e-3, val=0.5)
    assert computed == []
    X, y = blobs()
    X[5, 2] += 1e-3
    tune(tmp_path / "changed", cache_features="disk", data=(X, y))
    assert sum(computed) == 240
    computed.clear()
    model = Net(0.2)
    with torch.no_grad():
        model.one[0].weight[0, 0] += 1e-4
    tune(tmp_path / "weight", model, cache_features="disk")
    assert sum(computed) == 240


def test_a_stage_that_trains_more_is_cut_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    own = pyft.PrefixCache.fill
    monkeypatch.setattr(
        pyft.PrefixCache, "fill", lambda self, *a, **k: filled.append(self._store.count) or own(self, *a, **k)
    )
    stages = [
        pyft.Stage("head", ["one", "two"], 2, kind="head"),
        pyft.Stage("head again", ["one", "two"], 1, lr_scale=0.1, kind="head"),
        pyft.Stage("two", "one", 2),
        pyft.Stage("all", None, 1),
    ]
    result = tune(tmp_path / "a", strategy=stages)
    # The second stage has the same cut, and all of its features are there.
    assert filled == [0, 240, 0]
    whole = tune(tmp_path / "b", strategy=stages, cache_features=False)
    for name, value in weights(result).items():
        torch.testing.assert_close(value, weights(whole)[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("where", ["ram", "disk"])
@pytest.mark.parametrize("freeze", ["one", ["one", "two"]])
def test_an_interrupted_run_ends_with_the_same_bits(
    where: str, freeze: Any, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(tmp_path / "whole", freeze=freeze, cache_features="ram")
    calls = []
    own = cached_features.StageFeatures.call

    def stopping(self: Any, model: nn.Module, inputs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return own(self, model, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(cached_features.StageFeatures, "call", stopping)
        with pytest.raises(KeyboardInterrupt):
            tune(tmp_path / "cut", freeze=freeze, cache_features=where)
    # The same model, as another process would build it: the run puts its first weights back.
    rest = tune(tmp_path / "cut", freeze=freeze, cache_features=where)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(rest)[name]), name


def test_an_interrupted_fill_goes_on(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tune(tmp_path / "whole", cache_features="ram")
    own = pyft.PrefixCache._fill_one
    done: list[int] = []

    def stopping(self: Any, numbers: np.ndarray, inputs: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(numbers))
        own(self, numbers, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(pyft.PrefixCache, "_fill_one", stopping)
        with pytest.raises(KeyboardInterrupt):
            tune(tmp_path / "cut", cache_features="disk")
    rest: list[int] = []
    monkeypatch.setattr(
        pyft.PrefixCache,
        "_fill_one",
        lambda self, numbers, inputs: rest.append(len(numbers)) or own(self, numbers, inputs),
    )
    same_bits(whole, tune(tmp_path / "cut", cache_features="disk"))
    assert sum(done) + sum(rest) == 240


def test_augmented_copies_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shake(x: torch.Tensor) -> torch.Tensor:
        return x + 0.3 * torch.randn_like(x)

    refused = tune(tmp_path / "refused", augment=shake, progress=True)
    assert "features" not in refused.seconds
    assert "augment_views=K keeps K copies" in capsys.readouterr().err
    runs = [tune(tmp_path / f"{n}", augment=shake, augment_views=2, cache_features="ram") for n in range(2)]
    same_bits(*runs)
    assert "features" in runs[0].seconds
    plain = tune(tmp_path / "plain", cache_features="ram")
    one = tune(tmp_path / "one", augment=shake, augment_views=1, cache_features="ram")
    assert not torch.equal(runs[0].model.head.weight, one.model.head.weight)
    assert not torch.equal(plain.model.head.weight, one.model.head.weight)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"cache_features": "tape"}, "cache_features='tape'"),
        ({"cache_features": True}, "cache_features=True"),
        ({"augment_views": 0}, "augment_views=0"),
    ],
)
def test_wrong_arguments(keywords: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tune(tmp_path / "run", **keywords)
    assert not (tmp_path / "run").exists()


def test_the_reason_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    tune(tmp_path / "run", model, freeze="1", progress=True)
    assert "every epoch runs the whole model, because dropout '0' is on" in capsys.readouterr().err


# ---------------------------------------------------------------- plan


def test_plan_says_what_a_run_costs_and_changes_nothing(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Net(0.2)
    before = copy.deepcopy(model.state_dict())
    keywords = {"strategy": "gradual", "freeze": "one", "epochs": 6, "lr": 1e-2, "batch_size": 16, "precision": "fp32"}
    random_state = torch.get_rng_state()
    cost = pyft.plan(model, blobs(), **keywords)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [stage.kept for stage in cost.stages] == [True, True]
    # 240 samples of 32 float32.
    assert [stage.nbytes for stage in cost.stages] == [240 * 32 * 4] * 2
    assert 0 < cost.seconds < 60
    assert max(len(line) for line in str(cost).splitlines()) <= 80
    assert cost.stages[1].saved <= cost.stages[1].saved_without
    result = tune(tmp_path / "run", model, **keywords, progress=True)
    assert result.seconds["predicted"] == pytest.approx(cost.seconds)
    assert "pyft.plan said" in capsys.readouterr().err
    assert any("pyft.plan said" in note for note in result.notes)
    other = tune(tmp_path / "other", Net(0.2), **{**keywords, "epochs": 2})
    assert "predicted" not in other.seconds


def test_plan_refuses_what_finetune_refuses(cache_dir: Path) -> None:
    with pytest.raises(ConfigError, match="epoch"):
        pyft.plan(Net(), blobs(), epochs=0)
    with pytest.raises(ConfigError, match="no such argument"):
        pyft.plan(Net(), blobs(), epoch=3)


def test_a_damaged_prediction_is_none(cache_dir: Path) -> None:
    config = {"arguments": {}, "model": {"fingerprint": "a"}, "data": {"fingerprint": "b"}}
    assert recalled(config) is None
