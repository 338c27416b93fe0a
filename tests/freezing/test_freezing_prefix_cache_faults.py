"""Stored features when many write at once, when a process is killed, and when the disk is full."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filling_processes import BATCHES, INPUTS, body, fill, fill_and_die, fill_and_finish, open_cache, outputs
from torch import nn

import pyft
from pyft.errors import CheckpointError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes: the number of threads is a part of the key."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def expected() -> torch.Tensor:
    """What the model gives, batch for batch, without a cache."""
    model = body()
    with torch.no_grad():
        return torch.cat([model(INPUTS[torch.from_numpy(index)]) for index in BATCHES])


def spawned(target: Any, *arguments: Any, count: int = 1) -> list[int | None]:
    """Exit codes of processes. A fork of a process whose threads have worked may hang, so they are spawned."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, *arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    until = time.monotonic() + 180
    for process in processes:
        process.join(max(until - time.monotonic(), 0))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    assert not late, "a process did not end within 180 s"
    return [process.exitcode for process in processes]


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_eight_processes_fill_one_folder(tmp_path: Path) -> None:
    barrier = torch.multiprocessing.get_context("spawn").Barrier(8)
    assert spawned(fill_and_finish, str(tmp_path), barrier, count=8) == [0] * 8
    right = expected()
    for rank in range(8):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), right)
    cache, said = open_cache(tmp_path / "features")
    assert (len(cache), said) == (40, [])
    assert torch.equal(outputs(cache), right)
    assert folders(tmp_path / "features") == [f"{cache.key}-x"]


@pytest.mark.parametrize("noted", [True, False])
def test_a_killed_fill_does_no_harm(noted: bool, tmp_path: Path) -> None:
    assert spawned(fill_and_die, str(tmp_path), 6, noted) == [-9]
    cache, said = open_cache(tmp_path)
    # What was noted is taken up again; half a batch in the files is cut off.
    assert (len(cache), said) == (24 if noted else 0, [])
    fill(cache)
    cache.finish()
    assert torch.equal(outputs(cache), expected())
    again, said = open_cache(tmp_path)
    assert (len(again), said) == (40, [])
    assert folders(tmp_path) == [f"{cache.key}-x"]


# ---------------------------------------------------------------- a full disk


@contextlib.contextmanager
def no_file_over(nbytes: int) -> Iterator[None]:
    """The system writes what fits and then refuses, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def whole_again(folder: Path, known: int) -> None:
    """The next cache has what was noted, and ends with right values in one folder."""
    cache, said = open_cache(folder)
    assert (len(cache), said) == (known, [])
    fill(cache)
    cache.finish()
    assert torch.equal(outputs(cache), expected())
    assert folders(folder) == [f"{cache.key}-x"]


# 4 samples are 256 bytes in the first file and 128 in the second; an index takes 128 and 16 a sample.
def test_fill_on_a_full_disk_gives_one_error(tmp_path: Path) -> None:
    cache, said = open_cache(tmp_path)
    with no_file_over(1400), pytest.raises(OSError, match=r"cannot be written to .*too large\): make room, or keep"):
        fill(cache)
    assert said == []
    assert cache.reason is not None
    assert folders(tmp_path) == []
    assert torch.equal(outputs(cache), expected())
    whole_again(tmp_path, 0)


def test_what_was_noted_before_the_disk_was_full_is_kept(tmp_path: Path) -> None:
    cache, _ = open_cache(tmp_path)
    fill(cache, BATCHES[:3])  # notes its progress at the end
    with no_file_over(1400), pytest.raises(OSError, match="cannot be written"):
        fill(cache)
    assert folders(tmp_path) == [f"{cache.key}-x.part"]
    whole_again(tmp_path, 12)


@pytest.mark.parametrize("place", [0, 1])
def test_training_goes_on_when_the_disk_is_full(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, said = open_cache(tmp_path)
    right = expected()
    assert torch.equal(outputs_of(cache, 5), right[:20])
    arena = list(cache._store.arenas.values())[place]

    def full(values: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arena, "append", full)
    for _ in range(2):
        assert torch.equal(outputs(cache), right)
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert "the whole model runs from now on" in said[0]
    assert cache.nbytes == 0
    whole_again(tmp_path, 0)


def outputs_of(cache: pyft.PrefixCache, batches: int) -> torch.Tensor:
    with torch.no_grad():
        found = []
        for index in BATCHES[:batches]:
            with cache.batch(index):
                found.append(cache.model(INPUTS[torch.from_numpy(index)]))
    return torch.cat(found)


def test_a_disk_that_is_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _ = open_cache(tmp_path)
    fill(cache)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pyft.freezing.prefix_cache_disk.write_json", full)
        with pytest.raises(OSError, match="No space left on device"):
            cache.finish()
    assert torch.equal(outputs(cache), expected())
    whole_again(tmp_path, 40)


@pytest.mark.parametrize("where", ["disk", "auto"])
def test_finetune_on_a_full_disk(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pyft.freezing.prefix_cache.free_memory", lambda: 1000)
    monkeypatch.setattr("pyft.cached_features.cache_root", lambda: tmp_path)

    def full(self: Any, values: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyft.freezing.prefix_cache_store.FileArena.append", full)
    targets = torch.arange(40) % 2

    def tune() -> pyft.Result:
        return pyft.finetune(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)), (INPUTS, targets), freeze="0",
            strategy="full", epochs=1, lr=1e-2, out=tmp_path / "run", export=None, cache_features=where,
            device="cpu",
        )  # fmt: skip

    if where == "disk":
        with pytest.raises(CheckpointError, match=r"cannot be written to .*No space left.*cache_features=False"):
            tune()
        assert folders(tmp_path / "features") == []
    else:
        tune()
        assert "every epoch runs the whole model, because features cannot be written" in capsys.readouterr().err
        assert not (tmp_path / "run" / "features").exists()


def test_a_store_in_memory_takes_no_error_of_the_model_for_a_full_disk() -> None:
    cache, said = open_cache(Path("unused"), storage="ram")
    cache.model.head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(OSError(2, "the model's own")))
    with pytest.raises(OSError, match="the model's own"), cache.batch(np.arange(4)):
        cache.model(INPUTS[:4])
    assert (cache.reason, said) == (None, [])
