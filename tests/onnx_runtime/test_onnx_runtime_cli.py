"""`pyft eval`, `pyft predict` and `pyft compare` of files: what they print, and that torch is not imported for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyft.cli import main

pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")

from linear_files import CLASSES, array_file

generator = np.random.default_rng(0)
WEIGHT = generator.standard_normal((4, 3)).astype(np.float32)
X = generator.standard_normal((60, 4)).astype(np.float32)
Y = np.array(CLASSES)[(X @ WEIGHT + generator.standard_normal((60, 3))).argmax(1)]
FOUND = np.array(CLASSES)[(X @ WEIGHT).argmax(1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.onnx, b.onnx, table.tsv, x.npy."""
    path = tmp_path_factory.mktemp("cli")
    array_file(path / "a.onnx", WEIGHT, classes=CLASSES)
    array_file(path / "b.onnx", -WEIGHT, classes=CLASSES)
    rows = ["\t".join([*map(str, row), label]) for row, label in zip(X.tolist(), Y, strict=True)]
    (path / "table.tsv").write_text("\n".join(["a\tb\tc\td\tlabel", *rows]))
    np.save(path / "x.npy", X)
    return path


def test_nothing_imports_torch(folder: Path, environment: dict[str, str]) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'PIL', 'tokenizers'): sys.modules[name] = None\n"
        "from pyft.cli import main\n"
        "for words in (['eval', 'a.onnx', 'table.tsv'], ['predict', 'a.onnx', 'table.tsv', 'x.npy'],\n"
        "              ['compare', 'a.onnx', 'b.onnx', 'table.tsv']):\n"
        "    assert main(words) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "samples per second" in done.stdout
    assert "McNemar" in done.stdout


def test_eval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(folder / "a.onnx"), str(folder / "table.tsv"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["values"]["accuracy"] == pytest.approx((FOUND == Y).mean())
    assert found["speed"]["provider"] == "CPUExecutionProvider"


def test_predict_of_tables_and_arrays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(folder / "a.onnx"), str(folder / "x.npy"), str(folder / "table.tsv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [*FOUND, *FOUND]
    assert lines[0].endswith("x.npy:0")


def test_compare(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(folder / "a.onnx"), str(folder / "b.onnx"), str(folder / "table.tsv")]
    assert main([*words, "--json", "--metric", "accuracy,balanced_accuracy", "--resamples", "50"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["metric"] for one in found["differences"]] == ["accuracy", "balanced_accuracy"]
    other = np.array(CLASSES)[(-X @ WEIGHT).argmax(1)]
    assert found["differences"][0]["difference"] == pytest.approx((other == Y).mean() - (FOUND == Y).mean())
    assert found["mcnemar"]["only_a"] == int(((FOUND == Y) & (other != Y)).sum())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["eval", "a.onnx", "table.tsv", "--provider", "NoExecutionProvider"], "has no NoExecutionProvider here"),
        (["compare", "a.onnx", "none.onnx", "table.tsv"], "no ONNX file at none.onnx"),
        (["compare", "a.onnx", "b.onnx", "table.tsv", "--metric", "auc"], "expected 'auto' or one of accuracy"),
        (["predict", ".", "x.npy", "--provider", "CPUExecutionProvider"], "torch runs"),
    ],
)
def test_errors_take_one_line(
    folder: Path, words: list[str], part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert main(words) == 2
    text = capsys.readouterr().err
    assert part in text
    assert text.count("\n") == 1


def test_help_of_compare(shell: Callable[..., Any]) -> None:
    done = shell("compare", "--help")
    assert done.returncode == 0
    assert "McNemar" in done.stdout
