"""The wheels: a pure one that carries the sources, a platform one with the core inside, sdist, and editable."""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("setuptools", minversion="77")

REPOSITORY = Path(__file__).resolve().parents[2]
PACKED = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
# Modules that a build without PYFT_BUILD_CORE must not need.
POISONED = ("torch", "numpy", "pybind11", "filelock", "ninja")


def copy_checkout(target: Path, sources: Path = REPOSITORY / "csrc") -> Path:
    """What a build reads, in a folder where it may leave its own folders."""
    skip = shutil.ignore_patterns("__pycache__", "*.so", "_core*.json", "_csrc")
    shutil.copytree(REPOSITORY / "pyft", target / "pyft", ignore=skip)
    shutil.copytree(sources, target / "csrc")
    for name in PACKED:
        shutil.copy(REPOSITORY / name, target / name)
    return target


def names(path: Path | None = None, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYFT_")}
    return kept | ({"PYTHONPATH": str(path)} if path else {}) | changes


def run_hook(hook: str, checkout: Path, out: Path, environment: dict[str, str]) -> Path:
    """Call a build hook as pip does; returns the file that it made."""
    code = f"from setuptools import build_meta\nprint('made', build_meta.{hook}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split("made ")[-1].strip()


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def install(wheel: Path, target: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-compile", "--target", str(target), str(wheel)], check=True, env=names())
    return target


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by pip where nothing but setuptools is installed, in a folder with an old build in it."""
    folder = tmp_path_factory.mktemp("pure")
    checkout = copy_checkout(folder / "checkout")
    old = checkout / "build" / "lib" / "pyft" / "_csrc"
    old.mkdir(parents=True)
    (old / "removed.cpp").write_text("#error removed\n")
    for name in POISONED:
        (folder / "poison" / name).mkdir(parents=True)
        (folder / "poison" / name / "__init__.py").write_text(f"raise ImportError('{name} is not there')\n")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [*pip, "--disable-pip-version-check", "-w", str(folder / "out"), str(checkout)]
    done = subprocess.run(command, env=names(folder / "poison"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "out").iterdir()
    return wheel


@pytest.fixture
def stand_in_checkout(box: Any) -> Path:
    """A checkout whose csrc is the stand-in."""
    return copy_checkout(box.folder / "checkout", box.folder / "csrc")


def test_pure_wheel_carries_the_sources(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    expected = {
        f"pyft/_csrc/{path.name}" for path in (REPOSITORY / "csrc").iterdir() if path.suffix in (".cpp", ".cu", ".h")
    }
    found = members(pure_wheel)
    assert expected
    assert {name for name in found if name.startswith("pyft/_csrc/")} == expected
    assert "pyft/_csrc/bindings.cpp" in expected
    tops = {name.split("/")[0] for name in found}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pyft"}
    assert not [name for name in found if name.endswith(".so") or "_core" in name]
    with zipfile.ZipFile(pure_wheel) as file:
        for name in expected:
            assert file.read(name) == (REPOSITORY / "csrc" / Path(name).name).read_bytes()


def test_pure_wheel_carries_every_module_and_data_file(pure_wheel: Path) -> None:
    wanted = (".py", ".tsv", ".txt", ".typed")
    files = (path for path in (REPOSITORY / "pyft").rglob("*") if path.suffix in wanted and "_csrc" not in path.parts)
    assert {str(path.relative_to(REPOSITORY)) for path in files} <= members(pure_wheel)


def test_sdist_makes_the_same_wheel(pure_wheel: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    sdist = run_hook("build_sdist", copy_checkout(tmp_path / "checkout"), out, names())
    with tarfile.open(sdist) as file:
        # Python 3.11.3 and older have no filters.
        options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        file.extractall(tmp_path / "unpacked", **options)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert members(run_hook("build_wheel", unpacked, out, names())) == members(pure_wheel)


def test_installed_wheel_builds_outside_the_checkout(box: Any, stand_in_checkout: Path, tmp_path: Path) -> None:
    wheel = run_hook("build_wheel", stand_in_checkout, tmp_path, names())
    box.package = install(wheel, tmp_path / "installed")
    shutil.rmtree(stand_in_checkout)
    # Somebody else's folder of that name beside the package is not ours.
    (box.package / "csrc").mkdir()
    (box.package / "csrc" / "bindings.cpp").write_text("#error not ours\n")
    told = box.load(PYFT_CSRC=None)
    assert told["answer"] == 42, told["warnings"]
    assert Path(told["path"]).is_relative_to(box.cache)
    assert str(box.package / "pyft" / "_csrc" / "bindings.cpp") in (box.entry() / "build.log").read_text()
    assert box.load(PYFT_CSRC=None)["said"] == ""


def test_core_built_ahead_of_time(box: Any, stand_in_checkout: Path, write_torch_version: Any, tmp_path: Path) -> None:
    wheel = run_hook("build_wheel", stand_in_checkout, tmp_path, names(box.site, PYFT_BUILD_CORE="1"))
    assert f"-cp{sys.version_info.major}{sys.version_info.minor}-" in wheel.name
    assert "none-any" not in wheel.name
    library = f"pyft/_core{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    assert {library, "pyft/_core.json", "pyft/_csrc/bindings.cpp"} <= members(wheel)
    box.package = install(wheel, tmp_path / "installed")

    told = box.load(PYFT_CSRC=None, PATH="/nowhere")
    assert told["answer"] == 42, told["warnings"]
    assert told["path"] == str(box.package / library)
    assert told["said"] == ""
    assert not box.cache.exists()
    status = "from pyft.core.loader import core_status as s\nprint(s().state, s().reason)"
    assert box.run(status, PYFT_CSRC=None).stdout.strip() == "ready built ahead of time"

    # Another torch, or other sources: one line says so, and the core is compiled.
    try:
        write_torch_version(box.site, "2.14.1")
        told = box.load(PYFT_CSRC=None)
    finally:
        write_torch_version(box.site, "2.13.0")
    assert Path(told["path"]).is_relative_to(box.cache)
    line = "pyft: the core built ahead of time is not used: "
    assert told["said"].startswith(f"{line}it was built with torch 2.13.0, this is torch 2.14.1\n")
    (box.package / "pyft" / "_csrc" / "answer.h").write_text("constexpr long kAnswer = 43;\n")
    told = box.load(PYFT_CSRC=None)
    assert told["answer"] == 43
    assert told["said"].startswith(f"{line}the sources in {box.package / 'pyft' / '_csrc'} are not those")


def test_core_built_ahead_of_time_that_does_not_load(box: Any, stand_in_checkout: Path, tmp_path: Path) -> None:
    wheel = run_hook("build_wheel", stand_in_checkout, tmp_path, names(box.site, PYFT_BUILD_CORE="1"))
    box.package = install(wheel, tmp_path / "installed")
    library = box.package / "pyft" / f"_core{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    library.write_bytes(b"not a library")
    told = box.load(PYFT_CSRC=None)
    assert told["answer"] == 42
    assert "file too short" in told["said"].splitlines()[0]
    library.unlink()
    assert "it is for Python cpython-" in box.load(PYFT_CSRC=None)["said"]


def test_ahead_of_time_build_that_cannot_be_says_why(stand_in_checkout: Path, box: Any, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta\nbuild_meta.build_wheel({str(tmp_path)!r})"

    def fail(path: Path | None = None, **changes: str) -> str:
        environment = names(path or box.site, **changes)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=stand_in_checkout, env=environment, capture_output=True, text=True
        )
        assert done.returncode != 0
        return done.stderr

    assert "PYFT_BUILD_CORE is 'yes': expected 1" in fail(PYFT_BUILD_CORE="yes")
    assert "no C++ compiler on PATH. Mend: apt-get install g++" in fail(PYFT_BUILD_CORE="1", PATH="/nowhere")
    (stand_in_checkout / "csrc" / "answer.h").write_text("constexpr long kAnswer = ;\n")
    text = fail(PYFT_BUILD_CORE="1")
    assert text.count("answer.h:1:26: error: ") >= 2


@pytest.mark.parametrize("ahead", [False, True])
def test_editable_install_uses_the_checkout(box: Any, stand_in_checkout: Path, tmp_path: Path, ahead: bool) -> None:
    changes = {"PYFT_BUILD_CORE": "1"} if ahead else {}
    wheel = run_hook("build_editable", stand_in_checkout, tmp_path, names(box.site, **changes))
    site = tmp_path / "editable"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    assert not [name for name in members(wheel) if "_csrc" in name]
    code = (
        "import site, sys\nbefore, finders = list(sys.path), list(sys.meta_path)\n"
        f"site.addsitedir({str(site)!r})\n"
        # Ahead of a pyft that is installed where the tests run.
        "sys.path[:] = [p for p in sys.path if p not in before] + before\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if f not in finders] + finders\n"
        "from pyft.core.loader import load_core\ncore = load_core()\n"
        "import json, pyft\nprint(json.dumps([core.answer, core.__file__, pyft.__file__]))"
    )
    box.package = box.site
    done = box.run(code, PYFT_CSRC=None)
    answer, library, package = json.loads(done.stdout)
    assert answer == 42
    assert Path(package).is_relative_to(stand_in_checkout)
    assert Path(library).is_relative_to(stand_in_checkout if ahead else box.cache)
    (stand_in_checkout / "csrc" / "answer.h").write_text("constexpr long kAnswer = 43;\n")
    done = box.run(code, PYFT_CSRC=None)
    assert json.loads(done.stdout)[0] == 43
    assert ("the core built ahead of time is not used: the sources" in done.stderr) == ahead
