"""A store in a folder: written once, taken up again where it was interrupted, and never read when it is damaged.

`<root>/<key>/` holds one file per value, `samples.npy` and, written last, `manifest.json` with sizes and checksums.
While it is being written it is `<root>/<key>.part/`, with `progress.json` in place of the manifest; the process that
has the lock writes there, any other one in a folder of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from pyft.core.files import sync_directory, write_atomic, write_json
from pyft.freezing.prefix_cache_play import Key
from pyft.freezing.prefix_cache_store import Column, FeatureStore, FileArena, MappedArena

MANIFEST, PROGRESS, SAMPLES = "manifest.json", "progress.json", "samples.npy"
SECONDS_BETWEEN_NOTES = 5.0
UNUSED_DAYS = 30.0


def open_finished(
    root: Path, key: str, columns: Mapping[Key, Column], say: Callable[[str], None]
) -> FeatureStore | None:
    """The finished store of a key; None where there is none. A damaged one is removed, with a line that says so."""
    folder = root / key
    if not folder.is_dir():
        return None
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        _check(folder, facts, columns)
        samples = _read_samples(folder, facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        say(f"stored features in {folder} are damaged ({error}): computed again")
        shutil.rmtree(folder, ignore_errors=True)
        return None
    arenas = {
        name: MappedArena(_file(folder, place), column.dtype, one["nbytes"] // column.dtype.itemsize)
        for place, ((name, column), one) in enumerate(zip(columns.items(), facts["columns"], strict=True))
    }
    store = FeatureStore(columns, arenas)
    store.know(samples)
    with contextlib.suppress(OSError):
        os.utime(folder / MANIFEST)
    return store


class DiskWriter:
    """Writes the store of a key.

    Args:
        root: folder of all stores; made with mode 0700 if it is not there.
        key: what the values depend on; part of a file name.
        columns: by key of the value.
        say: gets a line when something that was begun is damaged.

    Attributes:
        store: what is there so far.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, root: Path, key: str, columns: Mapping[Key, Column], say: Callable[[str], None]) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root, self.key, self.say = root, key, say
        self._lock = filelock.FileLock(root / f"{key}.lock", mode=0o600)
        self._own = False
        try:
            self._lock.acquire(timeout=0)
            self.folder = root / f"{key}.part"
        except filelock.Timeout:
            # The other process may be stopped, or slow: nobody waits for it.
            self._own = True
            self.folder = Path(tempfile.mkdtemp(prefix=f"{key}.", suffix=".part", dir=root))
        prune(root, key)
        self._noted = time.monotonic()
        self.store = self._continue(columns) or self._begin(columns)

    def note_progress(self, always: bool = False) -> None:
        """Make durable what is there, a few seconds after the last time at the earliest."""
        if not always and time.monotonic() - self._noted < SECONDS_BETWEEN_NOTES:
            return
        self._write_facts(PROGRESS)
        self._noted = time.monotonic()

    def finish(self) -> None:
        """Give the folder its name: from now on others may read it."""
        self._write_facts(MANIFEST)
        with contextlib.suppress(FileNotFoundError):
            (self.folder / PROGRESS).unlink()
        final = self.root / self.key
        for arena in self._arenas:
            arena.view()
            arena.close()
        try:
            os.rename(self.folder, final)
            sync_directory(self.root)
        except OSError:
            # Another process was first. What is mapped stays readable.
            shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def abandon(self) -> None:
        """A write has failed, and the files may hold parts of a batch: what was noted before can be taken up later."""
        if not (self.folder / PROGRESS).is_file():
            self._own = True
        self.release()

    def release(self) -> None:
        """Let others write. What a process without the lock has not finished is removed."""
        for arena in self._arenas:
            arena.close()
        if self._own:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def _begin(self, columns: Mapping[Key, Column]) -> FeatureStore:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700)
        self._arenas = [FileArena(_file(self.folder, place), c.dtype) for place, c in enumerate(columns.values())]
        return FeatureStore(columns, dict(zip(columns, self._arenas, strict=True)))

    def _continue(self, columns: Mapping[Key, Column]) -> FeatureStore | None:
        try:
            facts = json.loads((self.folder / PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        try:
            _check(self.folder, facts, columns)
            samples = _read_samples(self.folder, facts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.say(f"features begun in {self.folder} are damaged ({error}): computed again")
            return None
        self._arenas = [
            FileArena(_file(self.folder, place), column.dtype, one["nbytes"] // column.dtype.itemsize, one["crc32"])
            for place, (column, one) in enumerate(zip(columns.values(), facts["columns"], strict=True))
        ]
        store = FeatureStore(columns, dict(zip(columns, self._arenas, strict=True)))
        store.know(samples)
        return store

    def _write_facts(self, name: str) -> None:
        for arena in self._arenas:
            arena.sync()
        samples = np.ascontiguousarray(self.store.samples)
        write_atomic(self.folder / SAMPLES, lambda file: np.save(file, samples))
        columns = [{"nbytes": arena.nbytes, "crc32": arena.crc} for arena in self._arenas]
        facts = {"columns": columns, "count": self.store.count, "samples_crc32": zlib.crc32(samples.tobytes())}
        write_json(self.folder / name, facts)


def prune(root: Path, keep: str) -> None:
    """Remove finished stores that nobody has used for 30 days."""
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            if folder.is_dir() and folder.name.split(".")[0] != keep:
                newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
                if time.time() - newest > UNUSED_DAYS * 86400:
                    shutil.rmtree(folder, ignore_errors=True)


def _file(folder: Path, place: int) -> Path:
    return folder / f"value{place}.bin"


def _check(folder: Path, facts: dict[str, Any], columns: Mapping[Key, Column]) -> None:
    """Raise ValueError where the files are not what was written."""
    if len(facts["columns"]) != len(columns):
        raise ValueError("another number of values")
    for place, one in enumerate(facts["columns"]):
        crc, left = 0, int(one["nbytes"])
        with open(_file(folder, place), "rb") as file:
            while left:
                block = file.read(min(left, 1 << 22))
                if not block:
                    raise ValueError(f"{_file(folder, place).name} is too short")
                crc, left = zlib.crc32(block, crc), left - len(block)
        if crc != one["crc32"]:
            raise ValueError(f"{_file(folder, place).name} has other bytes than were written")


def _read_samples(folder: Path, facts: dict[str, Any]) -> np.ndarray:
    # A process that was killed may have written more samples than it noted.
    samples = np.ascontiguousarray(np.load(folder / SAMPLES, allow_pickle=False)[: facts["count"]])
    if samples.shape != (facts["count"], 2) or zlib.crc32(samples.tobytes()) != facts["samples_crc32"]:
        raise ValueError(f"{SAMPLES} has other bytes than were written")
    return samples
