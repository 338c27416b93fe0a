"""The CUDA core on a real GPU in the place of the CPU's kernels, on memory that both reach: `pytest --cuda-gpu`.

torch allocates CPU tensors in pinned memory, which has one address on both sides, and each launch is waited for. So the
tests of every op, written for the CPU, run on the GPU's kernels as they stand.
"""

from __future__ import annotations

import ctypes
import shlex
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch

from pyft.core import loader
from pyft.core.build_config import CUDA_LINK_FLAGS, CUDA_MODULE, BuildConfig, find_torch
from pyft.core.cache import cache_root
from pyft.core.compile import Tools, find_compiler, find_tools, locked, ninja_text
from pyft.core.cuda_build import cuda_config

PINNED = Path(__file__).with_name("pinned_memory.cpp")


class Gpu:
    """In the place of the emulation's controls, which a GPU has not: tests that need them are skipped."""

    @property
    def order(self) -> NoReturn:
        """Processes that a test starts run on the emulation."""
        return self.counters()

    def set(self, *_: Any, **__: Any) -> None:
        """Threads run as the GPU has them run."""

    reset = set

    def counters(self) -> NoReturn:
        pytest.skip("counts calls of the emulated runtime")

    traffic = fail_next_launch = counters


def build() -> tuple[Path, Path]:
    """The core whose ops register for the CPU, and the library that pins CPU tensors; compiled where need be."""
    config = cuda_config()
    tools = find_tools(config.nvcc)
    folder = cache_root() / "cuda_on_cpu_tensors" / config.key
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "build.lock", 600.0):
        (folder / "build.ninja").write_text(_ninja_text(config, tools))
        command = [str(tools.ninja), "-C", str(folder), "--quiet"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the CUDA core for CPU tensors does not compile:\n{done.stdout}")
    return folder / f"{CUDA_MODULE}.so", folder / "pinned_memory.so"


def _ninja_text(config: BuildConfig, tools: Tools) -> str:
    compiler, arguments = find_compiler()
    root = find_torch().root
    includes = [root / "include", root / "include/torch/csrc/api/include", config.nvcc and config.nvcc.include]
    systems = [word for place in includes if place for word in ("-isystem", str(place))]
    link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-L{config.nvcc and config.nvcc.libraries}", *CUDA_LINK_FLAGS]
    words = [str(compiler), *arguments, "-std=c++20", "-O1", "-fPIC", "-shared", *systems]
    core = ninja_text(config, tools).replace(" -c $in", " -DPYFT_CUDA_SERVES_CPU -c $in")
    return "\n".join(
        [
            core,
            "rule pinned",
            f"  command = {shlex.join(words)} $in {shlex.join(link)} -o $out",
            f"build pinned_memory.so: pinned {PINNED}",
            "default pinned_memory.so",
            "",
        ]
    )


def load() -> tuple[ModuleType, Gpu]:
    """Let the GPU's kernels serve CPU tensors for the rest of this process."""
    core, pinned = build()
    torch.cuda.init()
    # Tensors of before are not pinned: this comes first.
    ctypes.CDLL(str(pinned)).pyft_pin_cpu_tensors()
    if loader.load_core() is None:
        raise RuntimeError("the CUDA core for CPU tensors needs the compiled one beside it: see pyft doctor")
    module = loader.import_library(core, CUDA_MODULE)
    outcomes: dict[str, Any] = loader._outcomes
    outcomes[CUDA_MODULE] = loader._Outcome(module, None)
    return module, Gpu()
