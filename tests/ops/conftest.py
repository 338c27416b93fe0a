"""The core in its states: each CPU target that this machine runs, and the PyTorch reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pyft.core import loader


@pytest.fixture(scope="session")
def core():
    """The compiled core, or a skip that says why there is none."""
    module = loader.load_core()
    if module is None:
        pytest.skip("the compiled core is not available here: see pyft doctor")
    return module


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def cpu_target(request: pytest.FixtureRequest, core) -> Iterator[str]:
    """Each instruction set in turn, forced."""
    if request.param not in core.build_info()["cpu_targets"]:
        pytest.skip(f"this CPU has no {request.param}")
    core.set_cpu_target(request.param)
    yield request.param
    core.set_cpu_target("auto")


@pytest.fixture(params=["core", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled core, then the same calls where it could not be built."""
    if request.param == "reference":
        monkeypatch.setattr(loader, "load_core", lambda: None)
    else:
        request.getfixturevalue("core")
    return request.param


@pytest.fixture
def one_thread_then_two() -> Iterator[list[int]]:
    """Thread counts to try; the old count is restored."""
    before = torch.get_num_threads()
    yield [1, 2, 3]
    torch.set_num_threads(before)
