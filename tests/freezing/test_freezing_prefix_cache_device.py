"""Where stored features are kept for a model on a GPU: in its memory while they fit, said where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pyft
from pyft.freezing import prefix_cache, prefix_cache_store
from pyft.freezing.prefix_cache import PrefixCache
from pyft.freezing.prefix_cache_store import MemoryArena

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))


def body() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("device_bytes", "samples", "storage", "on_device"),
    [
        (1 << 20, 12, "auto", True),
        (100, 12, "auto", False),
        (1 << 20, None, "auto", False),
        (1 << 20, 12, "ram", False),
    ],
)
def test_memory_of_the_device_is_taken_while_it_fits(
    monkeypatch: pytest.MonkeyPatch, device_bytes: int, samples: int | None, storage: Any, on_device: bool
) -> None:
    model, asked = body(), []
    real = prefix_cache.memory_store

    def recorded(columns: Any, count: int = 0, device: torch.device | None = None) -> Any:
        asked.append((count, device))
        return real(columns, count, device) if device is not None else real(columns, count)

    monkeypatch.setattr(prefix_cache, "memory_store", recorded)
    monkeypatch.setattr(prefix_cache, "free_device_memory", lambda device: device_bytes)
    cache = PrefixCache(model, X[:3], storage=storage, num_samples=samples)
    assert asked == [(samples or 0, model[0].weight.device if on_device else None)]
    for start in (0, 4, 8, 0):
        with cache.batch(range(start, start + 4)):
            out = model(X[start : start + 4])
    assert torch.equal(out, body()(X[:4]))
    assert cache.place == "in memory"


def test_a_device_that_has_no_more_gives_its_values_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = torch.empty, []

    def empty(size: int, **options: Any) -> torch.Tensor:
        asked.append((size, "device" in options))
        if "device" in options and size > 40:
            raise torch.OutOfMemoryError("no more")
        return real(size, **options)

    arena = MemoryArena(torch.float32, 10)
    monkeypatch.setattr(prefix_cache_store.torch, "empty", empty)
    values = [torch.arange(12.0) + 100 * step for step in range(5)]
    for one in values:
        arena.append(one)
    assert (80, True) in asked
    assert (80, False) in asked
    assert torch.equal(arena.view(), torch.cat(values))
    assert MemoryArena(torch.float32, 50).device.type == "cpu"


def test_it_is_said_where_values_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PrefixCache(body(), X[:3], num_samples=12)
    places = iter(["cuda:0", "cuda:0", "cpu"])
    monkeypatch.setattr(MemoryArena, "device", property(lambda arena: torch.device(next(places))))
    assert cache.place == "in memory of cuda:0"
    cache._store.arenas["more"] = next(iter(cache._store.arenas.values()))  # type: ignore[index]
    assert cache.place == "in memory of cuda:0 and of the host, as it had no more"


@pytest.mark.cuda
def test_a_run_on_a_gpu_keeps_features_there(tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(2))
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    result = pyft.finetune(model, (x, y), strategy="head", epochs=3, out=tmp_path / "run", device="cuda", export=None)
    assert all(parameter.is_cuda for parameter in result.model.parameters())
    assert result.metrics["val_accuracy"] > 0.6
    assert "kept in memory of cuda:0" in capfd.readouterr().err
    cache = PrefixCache(body().cuda(), X[:3].cuda(), num_samples=12)
    assert cache.place == "in memory of cuda:0"
