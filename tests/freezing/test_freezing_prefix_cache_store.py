"""What is stored comes back bit for bit: from memory, from files, after an interruption; never when it is stale."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pyft
from pyft.freezing.prefix_cache import PrefixCache
from pyft.freezing.prefix_cache_play import Leaf
from pyft.freezing.prefix_cache_store import Column, FeatureStore, FileArena, MemoryArena

IMAGES = torch.randn(10, 6, generator=torch.Generator().manual_seed(3))
LENGTHS = [3, 7, 1, 5, 9, 2, 4, 8, 6, 5]


def tokens(numbers: list[int] | range, padding: int = 0) -> dict[str, torch.Tensor]:
    """Texts of different lengths, padded to the longest, with anything as padding."""
    length = max(LENGTHS[n] for n in numbers)
    ids = torch.full((len(numbers), length), padding)
    mask = torch.zeros(len(numbers), length, dtype=torch.int64)
    for row, number in enumerate(numbers):
        draw = torch.Generator().manual_seed(number)
        ids[row, : LENGTHS[number]] = torch.randint(1, 20, (LENGTHS[number],), generator=draw)
        mask[row, : LENGTHS[number]] = 1
    return {"input_ids": ids, "attention_mask": mask}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.norm, self.dense = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        found, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        return self.norm(x + self.dense(found))


class Encoder(nn.Module):
    """Attention over padded texts; the head takes the mean over what is real."""

    def __init__(self, first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        padding = attention_mask == 0
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, padding)
        weight = attention_mask.unsqueeze(-1).float()
        return self.head((x * weight).sum(1) / weight.sum(1))


def encoder() -> Encoder:
    model = Encoder()
    pyft.freeze(model, ["embedding", "layers.0", "layers.1"])
    return model.train()  # type: ignore[return-value]


def same_seed(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(5)
    return model(**inputs)


def test_texts_are_stored_without_padding() -> None:
    model = encoder()
    cache = PrefixCache(model, tokens(range(4)))
    for numbers in ([0, 1], [2, 3, 4], [5, 6, 7, 8, 9]):
        with cache.batch(numbers):
            filled = same_seed(model, tokens(numbers))
        assert torch.equal(filled, same_seed(model, tokens(numbers)))
    assert cache.nbytes == sum(LENGTHS) * 8 * 4
    for numbers in ([4, 2], [9, 0, 7], [2]):
        with cache.batch(numbers):
            played = same_seed(model, tokens(numbers, padding=7))
        torch.testing.assert_close(played, same_seed(model, tokens(numbers)), rtol=1e-5, atol=1e-6)
    assert cache.played == 3
    assert cache.reason is None


def test_a_text_of_another_length_is_computed_again() -> None:
    model = encoder()
    cache = PrefixCache(model, tokens(range(4)))
    with cache.batch([0]):
        model(**tokens([1]))
    with cache.batch([0]):
        out = same_seed(model, tokens([0]))
    assert torch.equal(out, same_seed(model, tokens([0])))
    assert cache.filled == 2


def test_padding_that_matters_is_refused() -> None:
    model = encoder()
    model.head.register_forward_pre_hook(lambda *_: None)
    own = model.forward

    def careless(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return own(input_ids, torch.ones_like(attention_mask))

    model.forward = careless  # type: ignore[method-assign]
    with pytest.raises(pyft.errors.ConfigError, match="on its padding"):
        PrefixCache(model, tokens(range(4)))


@pytest.mark.parametrize(
    "dims", [("B", 3), ("B",), ("B", "T", 4), ("B", 2, "T"), ("B", "T", "T"), (5, "B"), ("T", "B", 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_columns_give_back_what_they_got(dims: tuple[Any, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    lengths = np.array([3, 0, 5, 1])
    shape = [4 if dim == "B" else 5 if dim == "T" else dim for dim in dims]
    value = torch.randint(0, 2, shape).to(dtype) if dtype == torch.bool else (torch.randn(shape) * 9).to(dtype)
    batch = dims.index("B")
    for dim, name in enumerate(dims):
        if name == "T":
            for row in range(4):
                value.select(batch, row).narrow(dim - (dim > batch), lengths[row], 5 - lengths[row]).zero_()
    leaf = Leaf(dims, tuple(range(len(dims))), dtype, torch.device("cpu"))
    column = Column(leaf, dtype)
    for arena in (MemoryArena(dtype), FileArena(tmp_path / "values", dtype)):
        store = FeatureStore({("op", 0, 0): column}, {("op", 0, 0): arena})
        for rows in ([2, 0], [3], [1]):
            packed = column.pack(value, torch.tensor(rows), lengths[rows])
            store.add(np.array(rows) + 10, lengths[rows], {("op", 0, 0): packed})
        assert store.has(np.array([10, 13, 14, 99])).tolist() == [True, True, False, False]
        found = store.get(("op", 0, 0), np.array([10, 11, 12, 13]), 5)
        assert found.dtype == dtype
        assert torch.equal(found, value)
        assert store.nbytes == column.elements(lengths).sum() * dtype.itemsize


# ---------------------------------------------------------------- files


def body() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    pyft.freeze(model, ["0", "1", "2"])
    return model.train()


def on_disk(
    folder: Path, model: nn.Module | None = None, key: str | None = "x", **options: Any
) -> tuple[Any, list[str]]:
    said: list[str] = []
    model = body() if model is None else model
    cache = PrefixCache(model, IMAGES[:4], storage="disk", directory=folder, key=key, say=said.append, **options)
    return cache, said


BATCHES = [range(4), range(4, 8), range(8, 10)]


def fill(cache: PrefixCache, count: int = 3) -> None:
    cache.fill([(np.array(index), IMAGES[list(index)]) for index in BATCHES[:count]])


def stored(cache: PrefixCache) -> torch.Tensor:
    return cache.values(np.arange(10))


def test_memory_and_disk_give_the_same_bits(tmp_path: Path) -> None:
    memory = PrefixCache(body(), IMAGES[:4], storage="ram")
    disk, _ = on_disk(tmp_path)
    for cache in (memory, disk):
        fill(cache)
    assert not memory.on_disk
    assert disk.on_disk
    disk.finish()
    assert torch.equal(stored(memory), stored(disk))
    again, said = on_disk(tmp_path)
    assert len(again) == 10
    assert torch.equal(stored(memory), stored(again))
    assert said == []


def test_files_are_private_and_nothing_is_left_over(tmp_path: Path) -> None:
    cache, _ = on_disk(tmp_path / "new")
    fill(cache)
    cache.finish()
    folders = [path for path in (tmp_path / "new").iterdir() if path.is_dir()]
    assert [path.name for path in folders] == [f"{cache.key}-x"]
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert stat.S_IMODE(folders[0].stat().st_mode) == 0o700
    assert stat.S_IMODE((folders[0] / "value0.bin").stat().st_mode) == 0o600
    assert {path.name for path in folders[0].iterdir()} == {"value0.bin", "samples.npy", "manifest.json"}


def test_an_interrupted_fill_goes_on(tmp_path: Path) -> None:
    whole, _ = on_disk(tmp_path / "whole")
    fill(whole)
    cache, _ = on_disk(tmp_path / "cut")
    fill(cache, 2)
    cache.close()
    again, said = on_disk(tmp_path / "cut")
    assert len(again) == 8
    fill(again)
    assert torch.equal(stored(again), stored(whole))
    assert said == []


def filling(folder: Path, count: int) -> None:
    cache, _ = on_disk(folder)
    fill(cache, count)
    # More is written than is noted, and then the process is gone.
    cache._store.add(np.array([8]), np.array([0]), {k: torch.full((16,), 7.0) for k in cache._columns})
    for arena in cache._store.arenas.values():
        arena.sync()
    os._exit(9)


def test_a_killed_fill_goes_on(tmp_path: Path) -> None:
    code = f"import runpy, pathlib; runpy.run_path({__file__!r})['filling'](pathlib.Path({str(tmp_path)!r}), 2)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 9
    cache, _ = on_disk(tmp_path)
    assert len(cache) == 8
    fill(cache)
    other = PrefixCache(body(), IMAGES[:4], storage="ram")
    fill(other)
    assert torch.equal(stored(cache), stored(other))


def change_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight[3, 2] += 1e-3


def change_buffer(model: nn.Module) -> None:
    model[1].running_var[0] += 1e-3


def change_eps(model: nn.Module) -> None:
    model[1].eps = 1e-3


def change_layer(model: nn.Module) -> None:
    model[2] = nn.GELU()
    pyft.freeze(model, ["0", "1", "2"])


def change_layout(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data.t().contiguous().t()


@pytest.mark.parametrize("change", [change_weight, change_buffer, change_eps, change_layer, change_layout])
def test_a_change_is_never_missed(change: Any, tmp_path: Path) -> None:
    cache, _ = on_disk(tmp_path)
    fill(cache)
    cache.finish()
    model = body()
    change(model)
    other, _ = on_disk(tmp_path, model)
    assert len(other) == 0
    fill(other)
    assert (len(other), len(on_disk(tmp_path, body())[0])) == (10, 10)


def test_other_keys_threads_and_types_are_other_stores(tmp_path: Path) -> None:
    cache, _ = on_disk(tmp_path)
    fill(cache)
    cache.finish()
    assert len(on_disk(tmp_path, key="y")[0]) == 0
    assert len(on_disk(tmp_path, dtype=torch.bfloat16)[0]) == 0
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert len(on_disk(tmp_path)[0]) == 0
    finally:
        torch.set_num_threads(threads)
    # What trains is no part of the key.
    model = body()
    with torch.no_grad():
        model[3].weight.zero_()
    assert len(on_disk(tmp_path, model)[0]) == 10


@pytest.mark.parametrize("damage", ["flip", "short", "manifest", "samples", "gone"])
@pytest.mark.parametrize("finished", [True, False])
def test_damaged_files_are_told_and_computed_again(damage: str, finished: bool, tmp_path: Path) -> None:
    cache, _ = on_disk(tmp_path)
    fill(cache, 3 if finished else 2)
    right = None
    if finished:
        right = stored(cache)
        cache.finish()
    cache.close()
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    facts = folder / ("manifest.json" if finished else "progress.json")
    if damage == "flip":
        data = bytearray((folder / "value0.bin").read_bytes())
        data[17] ^= 1
        (folder / "value0.bin").write_bytes(data)
    elif damage == "short":
        (folder / "value0.bin").write_bytes((folder / "value0.bin").read_bytes()[:-4])
    elif damage == "manifest":
        facts.write_text(json.dumps({"columns": []}))
    elif damage == "samples":
        (folder / "samples.npy").write_bytes(b"nothing")
    else:
        (folder / "value0.bin").unlink()
    again, said = on_disk(tmp_path)
    assert len(again) == 0
    assert len(said) == 1
    assert "damaged" in said[0]
    fill(again)
    if right is not None:
        assert torch.equal(stored(again), right)


def test_two_at_once(tmp_path: Path) -> None:
    one, _ = on_disk(tmp_path)
    two, _ = on_disk(tmp_path)
    for count in (1, 2, 3):
        fill(one, count)
        fill(two, count)
    two.finish()
    one.finish()
    assert torch.equal(stored(one), stored(two))
    assert len(on_disk(tmp_path)[0]) == 10
    one.close()
    two.close()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [f"{one.key}-x"]


def test_without_a_key_files_are_private(tmp_path: Path) -> None:
    cache, _ = on_disk(tmp_path, key=None)
    fill(cache)
    other, _ = on_disk(tmp_path, key=None)
    assert len(other) == 0


def test_take_over(tmp_path: Path) -> None:
    one = PrefixCache(body(), IMAGES[:4], storage="ram")
    fill(one)
    values = stored(one)
    two = PrefixCache(body(), IMAGES[:4], storage="ram")
    assert two.take_over(one)
    assert torch.equal(stored(two), values)
    model = body()
    change_weight(model)
    three = PrefixCache(model, IMAGES[:4], storage="ram")
    assert not three.take_over(two)
    assert len(three) == 0
