"""CUDA kernels on the emulation: what they move, that grids and alignment change no bit, what a failed launch becomes.

Skipped where ops run on the CPU's own kernels: `test_emulation_matrix.py` runs this file with `--cuda-emulation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from emulated_core import KernelTraffic
from torch import Tensor

from pyft.ops import bit_masks as ops
from pyft.ops import gather_channels, masked_rows
from pyft.ops.max_pool import max_pool_backward, max_pool_offsets

LENGTH = 16_384  # whole tiles of warps of every dtype
WINDOW = (3, 3, 2, 2, 1, 1, 1, 1)


@pytest.fixture(autouse=True)
def device(emulation) -> Iterator[None]:
    if emulation is None:
        pytest.skip("needs --cuda-emulation=ORDER")
    yield
    emulation.set()


def aligned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers in memory that begins with a sector."""
    return torch.randn(shape).to(dtype)


def moved(emulation, call: Callable[[], object]) -> tuple[float, float]:
    """Bytes loaded and stored by `call`, which is one launch."""
    emulation.set(traffic=True)
    emulation.reset()
    call()
    (kernel,) = emulation.traffic().values()
    assert emulation.counters()["launches"] == kernel.launches == 1
    return kernel.loads.bytes, kernel.stores.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_of_bit_masks(emulation, dtype: torch.dtype) -> None:
    x, size = aligned(LENGTH, dtype=dtype), dtype.itemsize
    bits = torch.zeros(LENGTH // 8, dtype=torch.uint8)
    assert moved(emulation, lambda: ops.relu_bits(x)) == (size * LENGTH, size * LENGTH + LENGTH // 8)
    assert moved(emulation, lambda: ops.pack_bits(x, ops.RELU)) == (size * LENGTH, LENGTH // 8)
    assert moved(emulation, lambda: ops.mask_by_bits(x, bits)) == (size * LENGTH + LENGTH // 8, size * LENGTH)
    assert moved(emulation, lambda: ops.scale_by_bits(x, bits, 2.0)) == (size * LENGTH + LENGTH // 8, size * LENGTH)


def test_bytes_of_a_packed_mask(emulation) -> None:
    mask = torch.rand(LENGTH) < 0.5
    assert moved(emulation, lambda: ops.pack_bools(mask)) == (LENGTH, LENGTH // 8)
    (kernel,) = emulation.traffic().values()
    assert kernel.loads.wide == kernel.loads.accesses == LENGTH // 16
    # Two bytes a lane, 64 a warp.
    assert kernel.stores.warp_accesses == LENGTH // 512
    assert kernel.loads.sector_efficiency == kernel.stores.sector_efficiency == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_move_in_vectors_and_sectors_are_whole(emulation, dtype: torch.dtype) -> None:
    x = aligned(LENGTH, dtype=dtype)
    emulation.set(traffic=True)
    emulation.reset()
    _, bits = ops.relu_bits(x)
    ops.mask_by_bits(x, bits)
    vectors = LENGTH * dtype.itemsize // 16
    for kernel in emulation.traffic().values():
        assert kernel.loads.wide == kernel.stores.wide == vectors
        # torch aligns to 64 bytes, so that sectors are whole: the bits' too.
        assert kernel.loads.sector_efficiency == kernel.stores.sector_efficiency == 1.0


def test_bytes_of_max_pool(emulation) -> None:
    x = aligned(2, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    emulation.set(traffic=True)
    emulation.reset()
    y, at = max_pool_offsets(x, WINDOW)
    (kernel,) = emulation.traffic().values()
    # Each output: a float and a byte, four channels at once.
    assert kernel.stores.bytes == 5 * y.numel()
    assert kernel.loads.wide == kernel.loads.accesses
    emulation.reset()
    max_pool_backward(torch.ones_like(y), at, x.shape, WINDOW, True)
    (kernel,) = emulation.traffic().values()
    assert kernel.stores.bytes == 4 * x.numel()
    assert kernel.stores.wide == x.numel() // 4
    assert kernel.stores.sector_efficiency == 1.0


def gathered(emulation, x: Tensor, channels: Tensor, with_sums: bool) -> KernelTraffic:
    """What the gather of `channels` of x moves, sums of slabs included, and that nothing else is launched but sums."""
    emulation.set(traffic=True)
    emulation.reset()
    gather_channels(x, channels, with_sums)
    kernels = emulation.traffic()
    (gather,) = [kernel for name, kernel in kernels.items() if "gather" in name]
    assert len(kernels) == (2 if with_sums else 1)
    counters = emulation.counters()
    assert counters["launches"] == len(kernels)
    assert not any(counters[name] for name in ("synchronisations", "copies", "fills", "allocations"))
    return gather


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_of_chosen_channels(emulation, monkeypatch, dtype: torch.dtype, last: bool) -> None:
    """Each chosen element is read once and written once, 16 bytes at a time; beside it an index for each access."""
    monkeypatch.setattr(masked_rows, "_core", lambda x: True)
    x, channels = aligned(3, 32, 32, 16, dtype=dtype), torch.arange(16, 32)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    size, places = dtype.itemsize, 3 * 32 * 16
    data, vectors, length = size * 16 * places, size * 16 * places // 16, 16 // size
    # A slab: 8 rows of channels for each thread of a block, or in planes the 512 bytes of a warp.
    slab = 8 * 256 * length // 16 if last else 32 * length
    slabs = -(-places // slab)
    kernel = gathered(emulation, x, channels, with_sums=False)
    assert kernel.stores.bytes == data
    assert kernel.stores.wide == kernel.loads.wide == vectors
    assert kernel.stores.sector_efficiency == 1.0
    indices = kernel.loads.bytes - data
    # In channels last memory a thread looks up its columns once for 8 rows; else each access looks up its channel.
    assert indices == 8 * (slabs * 256 * length if last else vectors)
    index_sectors = kernel.loads.sectors - data // 32
    assert index_sectors <= kernel.loads.sectors * 0.2
    summed = gathered(emulation, x, channels, with_sums=True)
    assert summed.loads == kernel.loads
    # One number for each slab and channel.
    assert summed.stores.bytes - data == 4 * 16 * slabs


@pytest.mark.parametrize("offset", [0, 1])
def test_planes_at_odd_places_move_element_by_element_in_whole_warps(emulation, offset: int) -> None:
    memory = torch.zeros(2 * 4 * 65 + 1)
    x = memory[offset : offset + 2 * 4 * 65].view(2, 4, 65)
    emulation.set(traffic=True)
    emulation.reset()
    torch.ops.pyft.gather_planes(x, torch.tensor([0, 3]), False)
    (kernel,) = emulation.traffic().values()
    assert kernel.stores.bytes == 4 * 2 * 2 * 65
    assert kernel.stores.wide == kernel.loads.wide == 0
    # 65 elements are 3 steps of a warp, the last for one element.
    assert kernel.stores.warp_accesses == 2 * 2 * 3


def results() -> list[Tensor]:
    """What every op gives for one input of awkward size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 67, 19, generator=generator)
    scale, shift = torch.randn(5, generator=generator), torch.randn(5, generator=generator)
    y, bits = ops.affine_relu_bits(x, scale, shift)
    found = [
        y,
        bits,
        ops.pack_bools(x > 0),
        *ops.relu_bits(x.bfloat16()),
        ops.mask_channels(x, bits, scale),
        ops.scale_by_bits(x, bits, 0.5),
    ]
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        pooled, at = max_pool_offsets(image, WINDOW)
        last = not image.is_contiguous()
        found += [pooled, at, max_pool_backward(pooled, at, x.shape, WINDOW, last)]
    channels = torch.tensor([4, 0])
    found += torch.ops.pyft.gather_planes(x.flatten(2), channels, True)
    found += torch.ops.pyft.gather_planes(torch.cat([x, x], 2).flatten(2)[:, :, :1272].bfloat16(), channels, True)
    return [*found, *torch.ops.pyft.gather_columns(x.flatten(0, 2), channels, True)]


def test_the_size_of_the_grid_changes_no_bit(emulation) -> None:
    emulation.set(processors=1, each=1)
    one_block = results()
    for processors in (2, 7, 1000):
        emulation.set(processors=processors, each=1)
        for got, want in zip(results(), one_block, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_odd_places_give_the_same_bits(emulation, offset: int) -> None:
    x = aligned(5000)
    place = torch.full((5010,), math.nan)[offset : offset + 5000].copy_(x)
    (y, bits), (want, want_bits) = ops.relu_bits(place), ops.relu_bits(x)
    assert torch.equal(y, want)
    assert torch.equal(bits, want_bits)
    odd_bits = torch.zeros(bits.numel() + 8, dtype=torch.uint8)[offset : offset + bits.numel()].copy_(bits)
    assert torch.equal(ops.mask_by_bits(place, odd_bits), ops.mask_by_bits(x, bits))


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("relu_bits", lambda x, bits: ops.relu_bits(x)),
        ("relu_bits_", lambda x, bits: ops.relu_bits_(x)),
        ("pack_bits", lambda x, bits: ops.pack_bits(x, ops.RELU)),
        ("pack_bools", lambda x, bits: ops.pack_bools(x > 0)),
        ("mask_by_bits", lambda x, bits: ops.mask_by_bits(x, bits)),
        ("scale_by_bits", lambda x, bits: ops.scale_by_bits(x, bits, 2.0)),
        ("affine_relu_bits", lambda x, bits: ops.affine_relu_bits(x, torch.ones(2), torch.ones(2))),
        ("mask_channels", lambda x, bits: ops.mask_channels(x, bits, torch.ones(2))),
        ("gather_planes", lambda x, bits: torch.ops.pyft.gather_planes(x.flatten(2), torch.tensor([1]), False)),
        ("gather_columns", lambda x, bits: torch.ops.pyft.gather_columns(x[0, 0], torch.tensor([1]), False)),
        ("max_pool_offsets", lambda x, bits: max_pool_offsets(x, WINDOW)),
        ("max_pool_backward_", lambda x, bits: max_pool_backward(x, bits.new_zeros(32), (1, 2, 8, 8), WINDOW, False)),
    ],
)
def test_a_failed_launch_is_an_exception_that_names_the_op(emulation, op: str, call: Callable[..., object]) -> None:
    x, bits = torch.randn(1, 2, 4, 4), torch.zeros(4, dtype=torch.uint8)
    emulation.fail_next_launch(9)
    with pytest.raises(RuntimeError, match=f"pyft::{op}: cudaErrorInvalidConfiguration: invalid configuration"):
        call(x, bits)
    call(x, bits)


def test_nothing_waits_or_copies(emulation) -> None:
    emulation.reset()
    results()
    counters = emulation.counters()
    # Sums of chosen channels and columns take a launch, and two where there are many slabs.
    assert counters["launches"] == 9 + 2 + 2 + 2
    assert not any(counters[name] for name in ("synchronisations", "copies", "fills", "allocations"))
