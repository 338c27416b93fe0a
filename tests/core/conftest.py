"""A small stand-in for torch and for csrc, so that building and loading is tested in a second instead of fifteen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

STAND_IN = """\
#include <Python.h>
#include "answer.h"
static PyObject* build_info(PyObject*, PyObject*) { return Py_BuildValue("{s:[s]}", "cpu_targets", "baseline"); }
static PyObject* cpu_target(PyObject*, PyObject*) { return PyUnicode_FromString("baseline"); }
static PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, nullptr}, {"cpu_target", cpu_target, METH_NOARGS, nullptr}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_core", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__core() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", kAnswer);
  return module;
}
"""
TORCH = """\
import ctypes, os, pathlib, types
from torch import version
__version__ = version.__version__
for library in sorted((pathlib.Path(__file__).parent / "lib").iterdir()):
    ctypes.CDLL(str(library))
def get_num_threads(): return 1
gpus = [tuple(map(int, gpu.split("."))) for gpu in os.environ.get("GPUS", "").split()]
cuda = types.SimpleNamespace(
    is_available=lambda: bool(gpus), device_count=lambda: len(gpus), get_device_capability=gpus.__getitem__,
    get_device_properties=lambda i: types.SimpleNamespace(
        name="fake", total_memory=2**34, major=gpus[i][0], minor=gpus[i][1]))
"""
# Loads the core twice and tells as JSON what happened, warnings among it.
LOAD = """\
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from pyft.core.loader import load_core
    first, second = load_core(), load_core()
print(json.dumps({
    "loaded": first is not None, "same": first is second, "path": getattr(first, "__file__", None),
    "answer": getattr(first, "answer", None),
    "warnings": [str(w.message) for w in caught], "kinds": [w.category.__name__ for w in caught]}))
"""


def write_stand_in(folder: Path, answer: int = 42) -> Path:
    """A csrc folder with one source and one header."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bindings.cpp").write_text(STAND_IN)
    (folder / "answer.h").write_text(f"#pragma once\nconstexpr long kAnswer = {answer};\n")
    return folder


def write_version(site: Path, version: str, cuda: str | None = None) -> None:
    text = f"__version__ = '{version}'\ndebug = False\ncuda: Optional[str] = {cuda!r}\ngit_version = 'abc{version}'\n"
    (site / "torch" / "version.py").write_text("from typing import Optional\n" + text)


@pytest.fixture(scope="session")
def stand_in_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with a package torch: version.py, empty libraries, no code."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    site = tmp_path_factory.mktemp("site")
    (site / "torch" / "lib").mkdir(parents=True)
    (site / "torch" / "include").mkdir()
    (site / "torch" / "__init__.py").write_text(TORCH)
    write_version(site, "2.13.0")
    for name in ("torch", "torch_cpu", "c10"):
        library = site / "torch" / "lib" / f"lib{name}.so"
        command = ["g++", "-shared", "-nostdlib", f"-Wl,-soname,{library.name}", "-x", "c++", "/dev/null"]
        subprocess.run([*command, "-o", str(library)], check=True)
    return site


@dataclass
class Box:
    """Fresh processes with their own cache, home, sources and (counted) compiler."""

    folder: Path
    site: Path
    package: Path = REPOSITORY
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def calls_file(self) -> Path:
        return self.folder / "calls"

    def environment(self, **changes: str | None) -> dict[str, str]:
        kept = ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "VIRTUAL_ENV")
        values: dict[str, str | None] = {name: os.environ[name] for name in kept if name in os.environ}
        values |= {
            "HOME": str(self.folder / "home"),
            "PYTHONPATH": f"{self.site}{os.pathsep}{self.package}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYFT_CACHE_DIR": str(self.cache),
            "PYFT_CSRC": str(self.folder / "csrc"),
            **self.variables,
            **changes,
        }
        return {name: value for name, value in values.items() if value is not None}

    def start(self, code: str, **changes: str | None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env=self.environment(**changes),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        process = self.start(code, **changes)
        try:
            out, err = process.communicate(timeout=100)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def load(self, **changes: str | None) -> Any:
        """What LOAD tells in a fresh process, with its stderr under "said"."""
        done = self.run(LOAD, **changes)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) | {"said": done.stderr}

    def compiler(self, before: str = "") -> str:
        """A compiler for CXX that writes down each call, then does `before`, then is g++."""
        path = self.folder / "counted-g++"
        path.write_text(f'#!/bin/sh\necho "$@" >> {self.calls_file}\n{before}\nexec {shutil.which("g++")} "$@"\n')
        path.chmod(0o755)
        return str(path)

    def calls(self, containing: str = "") -> int:
        """How often the counted compiler ran with `containing` among its arguments."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return sum(containing in line for line in lines)

    def entry(self) -> Path:
        """The only entry in the cache."""
        (entry,) = (path for path in (self.cache / "core").iterdir() if path.is_dir())
        return entry


@pytest.fixture
def box(tmp_path: Path, stand_in_torch: Path) -> Box:
    (tmp_path / "home").mkdir(exist_ok=True)
    write_stand_in(tmp_path / "csrc")
    return Box(tmp_path, stand_in_torch)


@pytest.fixture(scope="session")
def write_torch_version() -> Any:
    return write_version


@pytest.fixture(scope="session")
def write_sources() -> Any:
    return write_stand_in
