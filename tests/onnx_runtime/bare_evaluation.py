"""Run by a Python that has NumPy and onnxruntime alone: python bare_evaluation.py FOLDER."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

import pyft
from pyft.errors import MissingExtraError


def missing_extra(call) -> str:
    try:
        call()
    except MissingExtraError as error:
        return str(error)
    raise AssertionError("expected MissingExtraError")


def main(folder: Path) -> None:
    for name in ("torch", "PIL", "tokenizers", "onnx", "pandas", "scipy"):
        assert importlib.util.find_spec(name) is None, f"this environment is to be bare, and has {name}"
    generator = np.random.default_rng(3)
    X = generator.standard_normal((40, 4)).astype(np.float32)
    names = [["ant", "bee", "cat"][number] for number in generator.integers(0, 3, 40)]
    metrics = pyft.evaluate(str(folder / "array.onnx"), (X, names))
    from pyft import onnx_runtime

    table = onnx_runtime.evaluate(folder / "array.onnx", folder / "table.tsv")
    pixels = np.zeros((3, 5, 6, 3), np.uint8)
    found = {
        "accuracy": metrics["accuracy"],
        "table_accuracy": table["accuracy"],
        "printed": str(metrics),
        "rows": [row["label"] for row in pyft.predict(folder / "array.onnx", X[:5])],
        "pictures": [row["label"] for row in pyft.predict(folder / "image.onnx", list(pixels))],
        "compared": pyft.compare(folder / "array.onnx", folder / "array.onnx", (X, names)).to_dict(),
        "image": missing_extra(lambda: pyft.predict(folder / "image.onnx", [folder / "x.png"])),
        "text": missing_extra(lambda: pyft.predict(folder / "text.onnx", ["a text"])),
        "torch": missing_extra(lambda: pyft.predict(folder, X)),
        "modules": sorted(name for name in sys.modules if name.partition(".")[0] == "torch"),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
