"""Where the cache is, who is trusted with it, and what happens where it cannot be."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyft.core import cache
from pyft.errors import ConfigError

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root to change owners")


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable of the user, and temporary files of our own."""
    for name in ("PYFT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(cache, "_told", set())
    return


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def fallback(tmp_path: Path) -> Path:
    return tmp_path / "tmp" / f"pyft-{os.geteuid()}"


def test_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.cache_root() == tmp_path / "home" / ".cache" / "pyft"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "pyft"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_root() == tmp_path / "home" / ".cache" / "pyft"
    monkeypatch.setenv("PYFT_CACHE_DIR", "~/mine")
    assert cache.cache_root() == tmp_path / "home" / "mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYFT_CACHE_DIR", "here")
    assert cache.cache_root() == tmp_path / "here"


def test_made_for_the_owner_alone_whatever_the_umask() -> None:
    old = os.umask(0)
    try:
        root = cache.cache_root()
    finally:
        os.umask(old)
    assert mode(root) == 0o700
    assert mode(root / "core") == 0o700


def test_looking_makes_nothing(tmp_path: Path) -> None:
    assert cache.find_ready("0" * 16) is None
    assert cache.find_failed("0" * 16, {}) is None
    assert list((tmp_path / "home").iterdir()) == []
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("home", ["below a file", "in /proc", "missing"])
def test_home_that_cannot_hold_it(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    places = {"below a file": str(tmp_path / "file"), "in /proc": "/proc", "missing": str(tmp_path / "gone")}
    monkeypatch.setenv("HOME", places[home])
    if home == "below a file":
        monkeypatch.setenv("XDG_CACHE_HOME", places[home])
    assert cache.cache_root() == fallback(tmp_path)
    assert cache.cache_root() == fallback(tmp_path)
    assert mode(fallback(tmp_path)) == 0o700
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert f"using {fallback(tmp_path)}; PYFT_CACHE_DIR chooses" in said
    assert not (tmp_path / "gone").exists()


def test_fallback_that_others_can_open_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc")
    fallback(tmp_path).mkdir()
    fallback(tmp_path).chmod(0o755)
    with pytest.raises(ConfigError, match=r"others may open it \(mode 755\).*Set PYFT_CACHE_DIR"):
        cache.cache_root()


def test_fallback_that_is_a_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc")
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    fallback(tmp_path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="it is not a folder"):
        cache.cache_root()


def test_folder_that_anybody_may_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    monkeypatch.setenv("PYFT_CACHE_DIR", str(open_folder))
    open_folder.chmod(0o777)
    assert cache.cache_root() == fallback(tmp_path)
    # The sticky bit keeps others from replacing what is ours.
    open_folder.chmod(0o1777)
    assert cache.cache_root() == open_folder


@ROOT
@pytest.mark.parametrize("whose", ["root", "core"])
def test_folder_of_another_user_is_refused(whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "theirs"
    (root / "core").mkdir(parents=True)
    monkeypatch.setenv("PYFT_CACHE_DIR", str(root))
    make_entry(root / "core", "a" * 16)
    assert cache.find_ready("a" * 16) is not None
    os.chown(root if whose == "root" else root / "core", 12345, 12345)
    assert cache.find_ready("a" * 16) is None
    assert cache.cache_root() == fallback(tmp_path)


@ROOT
def test_unprivileged_user_with_a_read_only_home(tmp_path: Path) -> None:
    """Permissions do not bind root, so the check runs as another user, in a process of its own."""
    home = Path(tempfile.mkdtemp(dir="/tmp", prefix="pyft-test-"))
    try:
        home.chmod(0o555)
        (home / "tmp").mkdir()
        (home / "tmp").chmod(0o1777)
        code = (
            "import os, sys, tempfile\n"
            "from pyft.core import cache\n"
            "os.setegid(12345)\nos.seteuid(12345)\n"
            "root = cache.cache_root()\n"
            "print(root, oct(root.stat().st_mode & 0o777), root.stat().st_uid)"
        )
        names = {"HOME": str(home), "TMPDIR": str(home / "tmp"), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=names, capture_output=True, text=True)
        assert done.stdout.split() == [str(home / "tmp" / "pyft-12345"), "0o700", "12345"], done.stderr
        assert f"{home}/.cache/pyft cannot hold the cache (Permission denied): using" in done.stderr
    finally:
        shutil.rmtree(home)


@ROOT
def test_read_only_file_system(box: Any, tmp_path: Path) -> None:
    """A cache on a read-only mount is read; what it lacks is built among the temporary files."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("cannot make a mount namespace here")
    assert box.load()["loaded"]
    code = "from pyft.core.loader import load_core\nprint(load_core().__file__)"
    mount = f"mount --bind {box.cache} {box.cache} && mount -o remount,ro,bind {box.cache}"
    script = f"{mount} && exec {sys.executable} -c '{code}'"

    def run_read_only() -> subprocess.CompletedProcess[str]:
        names = box.environment(TMPDIR=str(tmp_path / "tmp"))
        return subprocess.run(["unshare", "-m", "sh", "-c", script], env=names, capture_output=True, text=True)

    read = run_read_only()
    assert read.stdout.strip().startswith(str(box.cache)), read.stderr
    assert read.stderr == ""
    (box.entry() / "complete.json").unlink()
    built = run_read_only()
    assert built.stdout.strip().startswith(str(fallback(tmp_path))), built.stderr
    assert f"{box.cache} cannot hold the cache (it cannot be written): using {fallback(tmp_path)}" in built.stderr
    again = run_read_only()
    assert again.stdout == built.stdout
    assert again.stderr == ""


def test_first_use_with_a_read_only_home_builds_in_the_fallback(box: Any, tmp_path: Path) -> None:
    changes = {"PYFT_CACHE_DIR": None, "HOME": "/proc", "TMPDIR": str(tmp_path / "tmp")}
    told = box.load(**changes)
    assert told["loaded"]
    assert Path(told["path"]).is_relative_to(fallback(tmp_path))
    assert len(told["said"].splitlines()) == 3
    assert box.load(**changes)["said"] == ""


def test_no_place_at_all_is_a_named_failure(box: Any, tmp_path: Path) -> None:
    fallback(tmp_path).write_text("a file")
    told = box.load(PYFT_CACHE_DIR=None, HOME="/proc", TMPDIR=str(tmp_path / "tmp"))
    assert not told["loaded"]
    assert "no folder for the cache" in told["warnings"][0]
    assert "Mend: set PYFT_CACHE_DIR" in told["warnings"][0]


def make_entry(folder: Path, key: str, age_days: float = 0.0) -> Path:
    entry = folder / key
    entry.mkdir(parents=True)
    (entry / "_core.so").write_bytes(b"library")
    cache.mark_complete(entry, {})
    when = time.time() - age_days * 86400
    for path in (*entry.iterdir(), entry):
        os.utime(path, (when, when))
    return entry


def test_old_unused_entries_are_pruned_and_nothing_else(tmp_path: Path) -> None:
    folder = cache.core_folder()
    old = make_entry(folder, "a" * 16, age_days=31)
    kept = make_entry(folder, "b" * 16, age_days=31)
    young = make_entry(folder, "c" * 16, age_days=29)
    used = make_entry(folder, "d" * 16, age_days=31)
    assert cache.find_ready("d" * 16) is not None
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("")
    (folder / ("e" * 16)).symlink_to(target)
    (folder / "notes").mkdir()
    os.utime(folder / "notes", (0, 0))
    os.utime(target, (0, 0))
    cache.prune(folder, keep="b" * 16)
    assert not old.exists()
    assert kept.exists()
    assert young.exists()
    assert used.exists()
    assert (target / "precious").exists()
    assert (folder / "notes").exists()


def test_use_is_noted_at_most_once_a_day() -> None:
    entry = make_entry(cache.core_folder(), "a" * 16, age_days=2)
    before = (entry / "complete.json").stat().st_mtime
    cache.find_ready("a" * 16)
    noted = (entry / "complete.json").stat().st_mtime
    assert noted > before + 86400
    cache.find_ready("a" * 16)
    assert (entry / "complete.json").stat().st_mtime == noted


def test_remembered_failure_ends_with_a_success() -> None:
    entry = cache.core_folder() / ("a" * 16)
    entry.mkdir()
    cache.mark_failed(entry, cache.Failure("error", "mend"), {"compiler": "one"})
    assert cache.find_failed("a" * 16, {"compiler": "one"}) == cache.Failure("error", "mend")
    assert cache.find_failed("a" * 16, {"compiler": "two"}) is None
    (entry / "_core.so").write_bytes(b"library")
    cache.mark_complete(entry, {})
    assert cache.find_failed("a" * 16, {"compiler": "one"}) is None
    assert json.loads((entry / "complete.json").read_text())["sha256"]
