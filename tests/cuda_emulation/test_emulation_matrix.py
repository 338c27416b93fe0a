"""The ordinary tests of ops, run on CUDA kernels in a process of their own, and under sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# Tests that reach the kernels of an op: a file is added when its op has a CUDA kernel.
MATRIX = (
    "tests/cuda_emulation/test_emulated_launches.py",
    "tests/ops/test_ops_bit_masks.py",
    "tests/ops/test_ops_clip.py",
    "tests/ops/test_ops_grad_norm.py",
    "tests/ops/test_ops_max_pool.py",
    "tests/ops/test_ops_update.py",
    "tests/optim/test_optim_device.py",
    "tests/freezing/test_freezing_lean_layers.py",
)
# Under sanitizers a test takes many times as long: the update's own tests, of all rules and formats, are left out.
SANITIZED = [path for path in MATRIX if not re.search(r"ops_update|optim_", path)]
pytestmark = pytest.mark.build


def run_matrix(order: str, paths: Sequence[str], *options: str, **variables: str) -> str:
    """What pytest says at the end."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--cuda-emulation={order}", *options]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*words, *paths],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


def launches_in(output: str) -> tuple[int, int]:
    """Kernels and launches that the run ended with."""
    found = re.search(r"CUDA emulation, \S+: (\d+) kernels, (\d+) launches", output)
    assert found, output[-2000:]
    return int(found[1]), int(found[2])


def test_ops_pass_on_their_cuda_kernels(core) -> None:
    """In one order of threads; .ci/run tries three more."""
    kernels, launches = launches_in(run_matrix("random:2", MATRIX))
    # Each kernel for each dtype that it takes. Without this a run that never left the CPU's kernels would pass.
    assert kernels >= 25
    assert launches > 500


def test_ops_pass_under_address_and_undefined_behaviour_sanitizers(core) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ brings the sanitizers' libraries")
    names = ("libasan.so", "libubsan.so")
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in names
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("the compiler has no sanitizers: apt-get install libasan8 libubsan1")
    variables = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    launches_in(run_matrix("random:3", SANITIZED, "--cuda-emulation-sanitize", **variables))
