"""An environment of its own with NumPy and onnxruntime alone: no torch, no Pillow, no tokenizers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score

pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")

from linear_files import CLASSES, array_file, image_file, text_file

REPOSITORY = Path(__file__).resolve().parents[2]
WEIGHT = np.random.default_rng(7).standard_normal((4, 3)).astype(np.float32)
pytestmark = pytest.mark.build


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
    made = subprocess.run([*pip, "numpy", "onnxruntime"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"pip cannot install onnxruntime here: {made.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def found(bare_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What bare_evaluation.py printed."""
    folder = tmp_path_factory.mktemp("files")
    array_file(folder / "array.onnx", WEIGHT, classes=CLASSES)
    image_file(folder / "image.onnx")
    text_file(folder / "text.onnx", "{}")
    (folder / "x.png").write_bytes(b"a picture")
    X, names = samples()
    lines = ["a\tb\tc\td\tlabel", *("\t".join([*map(str, row), name]) for row, name in zip(X, names, strict=True))]
    (folder / "table.tsv").write_text("\n".join(lines))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYFT"))}
    done = subprocess.run(
        [str(bare_python), str(Path(__file__).with_name("bare_evaluation.py")), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**environment, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def samples() -> tuple[np.ndarray, list[str]]:
    """Those of bare_evaluation.py."""
    generator = np.random.default_rng(3)
    X = generator.standard_normal((40, 4)).astype(np.float32)
    return X, [CLASSES[number] for number in generator.integers(0, 3, 40)]


def test_metrics_are_those_of_scikit_learn(found: dict[str, Any]) -> None:
    X, names = samples()
    expected = accuracy_score(names, np.array(CLASSES)[(X @ WEIGHT).argmax(1)])
    assert found["accuracy"] == pytest.approx(expected, abs=1e-12)
    assert found["table_accuracy"] == pytest.approx(expected, abs=1e-12)
    assert found["rows"] == [CLASSES[number] for number in (X[:5] @ WEIGHT).argmax(1)]
    assert "samples per second" in found["printed"]
    assert found["compared"]["mcnemar"]["p_value"] == 1.0


def test_pictures_as_arrays_need_no_pillow(found: dict[str, Any]) -> None:
    assert found["pictures"] == ["red"] * 3


def test_what_is_missing_is_named(found: dict[str, Any]) -> None:
    assert "pip install 'pyft[image]'" in found["image"]
    assert "pip install 'pyft[text]'" in found["text"]
    assert "pip install torch, or give a .onnx file" in found["torch"]


def test_torch_was_never_imported(found: dict[str, Any]) -> None:
    assert found["modules"] == []
