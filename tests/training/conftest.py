"""Fixtures of the training tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# pytest's importlib mode does not let test files import one another.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def killable_run() -> Iterator[Callable[..., int]]:
    """`killable_run(scenario=..., directory=..., ...)` trains in a process of its own and returns its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    script = Path(__file__).with_name("killable_run.py")
    server = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def run(**request: Any) -> int:
        server.stdin.write(json.dumps(request, default=str) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait(timeout=30)
