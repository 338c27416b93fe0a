"""The ordinary tests of ops, run on CUDA kernels in a process of their own, and under sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# Tests that reach the kernels of an op: a file is added when its op has a CUDA kernel.
MATRIX = (
    "tests/cuda_emulation/test_emulated_launches.py",
    "tests/ops/test_ops_bit_masks.py",
    "tests/ops/test_ops_clip.py",
    "tests/ops/test_ops_gather_channels.py",
    "tests/ops/test_ops_grad_norm.py",
    "tests/ops/test_ops_masked_rows.py",
    "tests/ops/test_ops_max_pool.py",
    "tests/ops/test_ops_partial_conv.py",
    "tests/ops/test_ops_update.py",
    "tests/optim/test_optim_device.py",
    "tests/optim/test_optim_graph.py",
    "tests/freezing/test_freezing_lean_calls.py",
    "tests/freezing/test_freezing_lean_dropout.py",
    "tests/freezing/test_freezing_lean_layers.py",
)
# Under sanitizers a test takes many times as long: the update's own tests, of all rules and formats, are left out.
SANITIZED = [path for path in MATRIX if not re.search(r"ops_update|optim_", path)]
pytestmark = pytest.mark.build


def start_matrix(
    log: Path, order: str, paths: Sequence[str], *options: str, **variables: str
) -> subprocess.Popen[bytes]:
    """A process of its own that writes to `log`. The threads of a block are fibers, so one core is all it needs."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--cuda-emulation={order}", *options]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    names = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    with log.open("w") as file:
        return subprocess.Popen([*words, *paths], cwd=REPOSITORY, env=names, stdout=file, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def matrix(core, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Both runs, side by side; called with the name of one it gives what that one said."""
    folder = tmp_path_factory.mktemp("matrix")
    running = {"plain": start_matrix(folder / "plain", "random:2", MATRIX)}
    if sanitizers := sanitizer_libraries():
        running["sanitized"] = start_matrix(
            folder / "sanitized", "random:3", SANITIZED, "--cuda-emulation-sanitize",
            LD_PRELOAD=" ".join(sanitizers), ASAN_OPTIONS="detect_leaks=0",
        )  # fmt: skip

    def said(name: str) -> str:
        if name not in running:
            pytest.skip("the compiler has no sanitizers: apt-get install g++ libasan8 libubsan1")
        failed = running[name].wait(timeout=1800)
        output = (folder / name).read_text(errors="replace")
        assert not failed, output[-8000:]
        return output

    yield said
    for process in running.values():
        process.kill()


def sanitizer_libraries() -> list[str]:
    """Those of g++, to be loaded before all others; empty where they are not installed."""
    compiler = shutil.which("g++")
    if compiler is None:
        return []
    names = ("libasan.so", "libubsan.so")
    found = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in names
    ]
    return found if all(map(os.path.isabs, found)) else []


def launches_in(output: str) -> tuple[int, int]:
    """Kernels and launches that the run ended with."""
    found = re.search(r"CUDA emulation, \S+: (\d+) kernels, (\d+) launches", output)
    assert found, output[-2000:]
    return int(found[1]), int(found[2])


def test_ops_pass_on_their_cuda_kernels(matrix: Callable[[str], str]) -> None:
    """In one order of threads; .ci/run tries two more."""
    kernels, launches = launches_in(matrix("plain"))
    # Each kernel for each dtype that it takes. Without this a run that never left the CPU's kernels would pass.
    assert kernels >= 25
    assert launches >= 300


def test_ops_pass_under_address_and_undefined_behaviour_sanitizers(matrix: Callable[[str], str]) -> None:
    launches_in(matrix("sanitized"))
