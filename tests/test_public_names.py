"""What `import pyft` gives, and what it does not do."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

import pyft

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", pyft.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(pyft, name) is not None
    assert name in dir(pyft)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="finetun'"):
        _ = pyft.finetun  # type: ignore[attr-defined]


def test_functions_stay_functions_when_their_modules_are_imported() -> None:
    for name in ("finetune", "evaluate"):
        module = importlib.import_module(f"pyft.{name}")
        assert isinstance(module, types.ModuleType)
        assert isinstance(getattr(pyft, name), types.FunctionType)
        assert getattr(pyft, name) is getattr(module, name)


def test_importing_loads_nothing_heavy_and_writes_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, pyft\n"
        "heavy = {'torch', 'numpy', 'transformers', 'onnxruntime', 'rich', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import pyft.finetune\n"
        "heavy = {'transformers', 'onnx', 'onnxruntime', 'rich', 'PIL', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert callable(pyft.finetune)"
    )
    environment = {"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
