"""The real sources with the real torch and compiler, from an installed wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")
pytestmark = pytest.mark.build

REPOSITORY = Path(__file__).resolve().parents[2]
PACKED = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
CODE = (
    "import json\nfrom pyft.core.loader import load_core\ncore = load_core()\n"
    "print(json.dumps([core.__file__, core.build_info(), core.cpu_target()]))"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pure wheel, installed in a folder of its own."""
    folder = tmp_path_factory.mktemp("real")
    shutil.copytree(REPOSITORY / "pyft", folder / "checkout" / "pyft", ignore=shutil.ignore_patterns("_core*"))
    shutil.copytree(REPOSITORY / "csrc", folder / "checkout" / "csrc")
    for name in PACKED:
        shutil.copy(REPOSITORY / name, folder / "checkout" / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(folder / "checkout")], check=True)
    return folder / "site"


def run(installed: Path, cache: Path, code: str = CODE, **changes: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYFT_")}
    environment = kept | {"PYTHONPATH": str(installed), "PYFT_CACHE_DIR": str(cache), "PYFT_CORE": "require", **changes}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=cache.parent, capture_output=True, text=True
    )


def test_wheel_builds_loads_and_is_cached(installed: Path, tmp_path: Path) -> None:
    first = run(installed, tmp_path / "cache")
    assert first.returncode == 0, first.stderr
    path, info, target = json.loads(first.stdout)
    assert Path(path).is_relative_to(tmp_path / "cache")
    assert target == info["cpu_targets"][-1]
    assert "baseline" in info["cpu_targets"]
    assert "core ready in" in first.stderr
    log = Path(path).with_name("build.log").read_text()
    assert "warning:" not in log
    second = run(installed, tmp_path / "cache", PATH="/nowhere", PYFT_CPU_TARGET="baseline")
    assert json.loads(second.stdout) == [path, info, "baseline"], second.stderr
    assert second.stderr == ""
    doctor = run(installed, tmp_path / "cache", "import sys, pyft\nsys.exit(pyft.doctor())")
    assert doctor.returncode == 0
    assert f"ready, in the cache: {path}" in " ".join(doctor.stdout.split())
