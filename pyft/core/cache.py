"""Where built cores and fetched weights are kept, who may be trusted with them, and what a cache entry says.

An entry is the folder `<cache>/core/<key>/`: the library (`_core.so` or `_core_cuda.so`), `build.log`, and one marker:
`complete.json`, written last, with the library's hash; or `failed.json`, with the first error and the tools that were
found when it happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyft.core.files import sha256_file, write_json
from pyft.errors import ConfigError

CORE = "core"
LIBRARY = "_core.so"
LOG = "build.log"
COMPLETE = "complete.json"
FAILED = "failed.json"
LOCK = "build.lock"
BUILD_PREFIX = "build-"
DAY = 86400.0
UNUSED_DAYS = 30.0
# A failure with the same tools is tried again after this time: a header or a library may have come meanwhile.
FAILURE_DAYS = 1.0

_told: set[str] = set()


@dataclass(frozen=True)
class Failure:
    """A build that failed: the first error, what mends it, and the full log."""

    error: str
    mend: str
    log: Path | None = None


def say(text: str) -> None:
    """One line on stderr, where there is one."""
    with contextlib.suppress(OSError, ValueError):
        print(f"pyft: {text}", file=sys.stderr, flush=True)


def cache_root() -> Path:
    """The folder for everything that pyft keeps between processes, made (mode 0700) if it is not there.

    `PYFT_CACHE_DIR`, else `$XDG_CACHE_HOME/pyft`, else `~/.cache/pyft`. Where that cannot be written, or belongs to
    somebody else, a private folder of this user among the temporary files; a line on stderr says so, once.

    Raises:
        ConfigError: there is no folder at all that this user alone can write.
    """
    wanted = preferred_root()
    reason = "there is no home folder" if wanted is None else _why_not(wanted)
    if wanted is not None and reason is None:
        return wanted
    fallback = temporary_root()
    blocked = "no folder for temporary files" if fallback is None else _why_not(fallback, private=True)
    if fallback is None or blocked is not None:
        raise ConfigError(
            f"no folder for the cache: {wanted or 'home'}: {reason}; {fallback or 'temporary files'}: {blocked}. "
            "Set PYFT_CACHE_DIR to a folder that you can write"
        )
    line = f"{wanted or '~/.cache/pyft'} cannot hold the cache ({reason}): using {fallback}; PYFT_CACHE_DIR chooses"
    if line not in _told:
        _told.add(line)
        say(line)
    return fallback


def preferred_root() -> Path | None:
    """Where the cache belongs, whether or not it is there. None without a home folder."""
    chosen = os.environ.get("PYFT_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    if os.path.isabs(xdg):
        return Path(xdg, "pyft")
    try:
        home = Path.home()
    except RuntimeError:
        return None
    # A home that is not there is not made either: the account is meant to have none.
    return home / ".cache" / "pyft" if home.is_absolute() and home.is_dir() else None


def temporary_root() -> Path | None:
    """The private folder of this user among the temporary files, whether or not it is there."""
    try:
        return Path(tempfile.gettempdir(), f"pyft-{os.geteuid()}")
    except FileNotFoundError:
        return None


def _why_not(root: Path, private: bool = False) -> str | None:
    """Make `root` and its folder of cores, and say why they cannot be used, if so. `private`: of this user alone."""
    for folder in (root, root / CORE):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            reason = _distrust(folder, private)
        except OSError as error:
            return error.strerror or str(error)
        if reason is not None:
            return reason
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            return "it cannot be written"
    return None


def _distrust(folder: Path, private: bool = False) -> str | None:
    """Why a library in `folder` may be somebody else's work, or None. Raises OSError when it is not there."""
    status = os.lstat(folder) if private else os.stat(folder)
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a folder"
    if status.st_uid != os.geteuid() and (private or status.st_uid != 0):
        return f"it belongs to user {status.st_uid}"
    if private and status.st_mode & 0o077:
        return f"others may open it (mode {stat.S_IMODE(status.st_mode):o})"
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        return f"anybody may write it (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def readable_core_folders() -> Iterator[Path]:
    """Folders of cores that are there and can be trusted, the preferred one first. Nothing is made or written.

    A cache that is read-only, such as one built into a container image by root, is read as well.
    """
    for root, private in ((preferred_root(), False), (temporary_root(), True)):
        with contextlib.suppress(OSError):
            if root is not None and _distrust(root, private) is None and _distrust(root / CORE, private) is None:
                yield root / CORE


def core_folder() -> Path:
    """The folder of cores that can be written.

    Raises:
        ConfigError: see `cache_root`.
    """
    return cache_root() / CORE


def read_marker(path: Path) -> dict[str, Any] | None:
    """The marker's JSON object, or None when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def find_ready(key: str, library: str = LIBRARY) -> Path | None:
    """The library built for `key`, its bytes checked, or None."""
    for folder in readable_core_folders():
        if _why_not_ready(folder / key, library) is None:
            _touch(folder / key / COMPLETE)
            return folder / key / library
    return None


def find_built_for(base: str, library: str) -> Path | None:
    """The latest library whose build had this `base` (see `BuildConfig`), by whichever nvcc, or None."""
    for folder in readable_core_folders():
        markers = [(read_marker(entry / COMPLETE) or {}, entry) for entry in entries(folder)]
        fitting = [(float(marker["time"]), entry.name) for marker, entry in markers if marker.get("base") == base]
        for _, key in sorted(fitting, reverse=True):
            if (ready := find_ready(key, library)) is not None:
                return ready
    return None


def _why_not_ready(entry: Path, library: str) -> str | None:
    """Why the entry's library must not be loaded, or None when it may."""
    marker = read_marker(entry / COMPLETE)
    if marker is None:
        return "its marker complete.json is missing or damaged"
    try:
        # A truncated library would end the process with SIGBUS, so the bytes are checked before it is opened.
        if sha256_file(entry / library) != marker.get("sha256"):
            return "its bytes are not those that were built"
    except OSError as error:
        return f"{library}: {error.strerror}"
    return None


def _touch(marker: Path) -> None:
    """Note that the entry is in use, at most once a day. A read-only cache keeps its old time."""
    with contextlib.suppress(OSError):
        if time.time() - marker.stat().st_mtime > DAY:
            os.utime(marker)


def damage(entry: Path, library: str = LIBRARY) -> str | None:
    """Why an entry that holds a library must be built again, in words for the user, or None."""
    return _why_not_ready(entry, library) if (entry / library).exists() else None


def find_failed(key: str, tools: dict[str, str]) -> Failure | None:
    """The remembered failure for `key`, if it happened with the same `tools` and not long ago."""
    for folder in readable_core_folders():
        marker = read_marker(folder / key / FAILED)
        if marker is None or marker.get("tools") != tools:
            continue
        age = time.time() - float(marker.get("time", 0.0))
        if 0 <= age < FAILURE_DAYS * DAY:
            log = folder / key / LOG
            return Failure(str(marker.get("error")), str(marker.get("mend")), log if log.exists() else None)
    return None


def mark_complete(entry: Path, facts: dict[str, Any], library: str = LIBRARY) -> None:
    """Make the entry valid: the library is in place, its hash is written down last."""
    (entry / FAILED).unlink(missing_ok=True)
    write_json(entry / COMPLETE, {"sha256": sha256_file(entry / library), "time": time.time(), **facts})


def mark_failed(entry: Path, failure: Failure, tools: dict[str, str]) -> None:
    """Remember a failure, so that the next process does not spend the time again."""
    marker = {"error": failure.error, "mend": failure.mend, "time": time.time(), "tools": tools}
    write_json(entry / FAILED, marker)


def entries(folder: Path) -> list[Path]:
    """The entries in a folder of cores: real folders named by a key."""
    if not folder.is_dir():
        return []
    named = (path for path in folder.iterdir() if re.fullmatch(r"[0-9a-f]{16}", path.name))
    return sorted(path for path in named if path.is_dir() and not path.is_symlink())


def remove_leftovers(folder: Path) -> None:
    """Remove what killed builds left. Only for the holder of the lock: nobody else is building then."""
    for entry in entries(folder):
        for path in entry.glob(f"{BUILD_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: str) -> None:
    """Remove entries other than `keep` that nobody has used for 30 days. Only for the holder of the lock."""
    for entry in entries(folder):
        times = [path.stat().st_mtime for path in (entry, entry / COMPLETE, entry / FAILED) if path.exists()]
        if entry.name != keep and time.time() - max(times) > UNUSED_DAYS * DAY:
            shutil.rmtree(entry, ignore_errors=True)
