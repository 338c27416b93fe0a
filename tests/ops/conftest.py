"""The core in its states: each CPU target that this machine runs, and the PyTorch reference."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

from pyft.core import loader


def find_compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


@pytest.fixture(scope="session")
def core():
    """The compiled core; a skip where there is no compiler, a failure where there is one."""
    module = loader.load_core()
    if module is None:
        assert find_compiler() is None, "there is a compiler, but the core was not built: see pyft doctor"
        pytest.skip("no compiler here, so no compiled core: see pyft doctor")
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
