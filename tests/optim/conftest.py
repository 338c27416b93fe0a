"""The optimizer on the compiled core, then the same where it could not be built."""

from __future__ import annotations

import shutil

import pytest

from pyft.core import loader
from pyft.optim import step_plan


@pytest.fixture(params=["core", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr(step_plan, "load_core", lambda: None)
        monkeypatch.setattr(loader, "load_core", lambda: None)
    elif loader.load_core() is None:
        compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        assert compiler is None, "there is a compiler, but the core was not built: see pyft doctor"
        pytest.skip("no compiler here, so no compiled core: see pyft doctor")
    return request.param
