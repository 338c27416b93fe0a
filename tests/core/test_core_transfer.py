"""Copies to a GPU go through pinned memory; others are plain."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyft.core.memory import free_device_memory
from pyft.core.transfer import to_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


class Recorded:
    """Stands for a tensor and writes down what it is asked for."""

    def __init__(self, device: torch.device, pinned: bool = False, size: int = 3) -> None:
        self.device, self.pinned, self.size = device, pinned, size
        self.asked: list[Any] = []

    def numel(self) -> int:
        return self.size

    def is_pinned(self) -> bool:
        return self.pinned

    def pin_memory(self) -> Recorded:
        self.asked.append("pin")
        self.pinned = True
        return self

    def to(self, device: torch.device, dtype: Any = None, non_blocking: bool = False) -> Recorded:
        if device != self.device:
            self.asked.append((str(device), "pinned" if self.pinned else "pageable", non_blocking))
        self.device = device
        if dtype is not None:
            self.asked.append((dtype, str(self.device)))
        return self


@pytest.mark.parametrize(
    ("start", "pinned", "target", "dtype", "asked"),
    [
        (CPU, False, CUDA, None, ["pin", ("cuda:0", "pinned", True)]),
        (CPU, True, CUDA, None, [("cuda:0", "pinned", True)]),
        (CPU, False, CUDA, torch.float32, ["pin", ("cuda:0", "pinned", True), (torch.float32, "cuda:0")]),
        (CPU, False, CPU, None, []),
        (CUDA, False, CUDA, torch.float32, [(torch.float32, "cuda:0")]),
        (CUDA, False, CPU, None, [("cpu", "pageable", False)]),
    ],
)
def test_what_is_asked_of_torch(
    start: torch.device, pinned: bool, target: torch.device, dtype: torch.dtype | None, asked: list[Any]
) -> None:
    tensor = Recorded(start, pinned)
    to_device(tensor, target, dtype)  # type: ignore[arg-type]
    assert tensor.asked == asked


def test_nothing_is_pinned_for_an_empty_tensor() -> None:
    tensor = Recorded(CPU, size=0)
    to_device(tensor, CUDA)  # type: ignore[arg-type]
    assert tensor.asked == [("cuda:0", "pageable", False)]


def test_on_the_cpu_it_is_the_same_tensor() -> None:
    x = torch.arange(3)
    assert to_device(x, CPU) is x
    assert to_device(x, CPU, torch.float64).dtype == torch.float64
    assert free_device_memory(CPU) == 0


@pytest.mark.cuda
def test_values_arrive() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    x = torch.randn(1000, 1000)
    moved = [to_device(x + step, torch.device("cuda")) for step in range(20)]
    assert all(torch.equal(one.cpu(), x + step) for step, one in enumerate(moved))
    assert 0 < free_device_memory(torch.device("cuda")) <= torch.cuda.get_device_properties(0).total_memory
