"""The core on each CPU target that this machine runs, and with several threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pyft.ops import masked_rows


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def cpu_target(request: pytest.FixtureRequest, core, emulation) -> Iterator[str]:
    """Each instruction set in turn, forced; once for CUDA kernels on the emulation, which know none."""
    if emulation is not None and request.param != "baseline":
        pytest.skip("CUDA kernels have no instruction sets of the CPU")
    if request.param not in core.build_info()["cpu_targets"]:
        pytest.skip(f"this CPU has no {request.param}")
    core.set_cpu_target(request.param)
    yield request.param
    core.set_cpu_target("auto")


@pytest.fixture
def as_on_a_gpu(emulation: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the emulation functions choose the kernels of chosen rows and channels, as they do for tensors on a GPU."""
    if emulation is not None:
        monkeypatch.setattr(masked_rows, "_core", lambda x: x.dtype in masked_rows._FORMATS)


@pytest.fixture
def one_thread_then_two() -> Iterator[list[int]]:
    """Thread counts to try; the old count is restored."""
    before = torch.get_num_threads()
    yield [1, 2, 3]
    torch.set_num_threads(before)
