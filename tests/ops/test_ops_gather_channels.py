"""Chosen channels of images with their sums: against PyTorch's indexing and sums in float64, in all layouts.

On the CPU PyTorch serves the op; `--cuda-emulation` and a GPU run its kernels.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyft.core import loader
from pyft.ops import gather_channels

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SENTINEL = 77.0
op = torch.ops.pyft.gather_planes


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return request.param


def planes(images: int, channels: int, size: int, dtype: torch.dtype, device: str, layout: str) -> Tensor:
    """Random numbers among sentinels: plain, at an odd place, of wider images, or with gaps between channels."""
    generator = torch.Generator().manual_seed(images * 1009 + channels * 31 + size)
    values = torch.randn(images, channels, size, generator=generator).to(dtype)
    if layout == "expanded":
        return values[:1].to(device).expand(images, channels, size)
    offset, more, gap = {"plain": (0, 0, 0), "odd": (1, 0, 0), "wider": (0, 3, 0), "gap": (0, 0, 3), "wide": (8, 2, 8)}[
        layout
    ]
    shape = (images, channels + more, size + gap)
    memory = torch.full((offset + shape[0] * shape[1] * shape[2] + 16,), SENTINEL, dtype=dtype, device=device)
    view = memory[offset : offset + shape[0] * shape[1] * shape[2]].view(shape)[:, :channels, :size]
    view.copy_(values)
    return view


def chosen(total: int, count: int, device: str = "cpu") -> Tensor:
    """`count` of `total` places in no order."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(total + count))[:count].to(device)


def same_bits(one: Tensor, other: Tensor) -> bool:
    kind = {4: torch.int32, 2: torch.int16}[one.element_size()]
    return one.shape == other.shape and torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


def check_sums(sums: Tensor, x: Tensor) -> None:
    """Sums of the channels of x against those in float64."""
    over = [0, *range(2, x.ndim)]
    exact, size = x.double().sum(over), x.double().abs().sum(over)
    assert sums.dtype == x.dtype
    assert ((sums.double() - exact).abs() <= 1e-6 * size + torch.finfo(x.dtype).eps * exact.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "odd", "wider", "gap", "wide", "expanded"])
@pytest.mark.parametrize(
    ("images", "total", "size", "count"),
    [
        (1, 1, 1, 1),
        (3, 8, 1, 5),
        (2, 6, 2, 3),
        (5, 7, 16, 4),
        (3, 40, 49, 7),
        (2, 5, 196, 3),
        (2, 3, 784, 2),
        (1, 2, 1000, 2),
        (70, 3, 264, 2),
    ],
)
def test_planes_and_sums(
    device: str, dtype: torch.dtype, layout: str, images: int, total: int, size: int, count: int
) -> None:
    x, channels = planes(images, total, size, dtype, device, layout), chosen(total, count, device)
    found, sums = op(x, channels, True)
    assert found.is_contiguous()
    assert same_bits(found, x[:, channels])
    check_sums(sums, x[:, channels])
    alone, none = op(x, channels, False)
    assert same_bits(alone, found)
    assert none.shape == (0,)


def test_many_slabs_are_summed_in_two_rounds(device: str) -> None:
    """More than 256 slabs, and more than 256 of these."""
    for images, size in ((300, 3), (2, 140 * 32 + 1), (1, 9_000_001)):
        x = torch.randn(images, 2, size, device=device) + 0.5
        if size < 10_000 or device == "cuda":
            check_sums(op(x, torch.tensor([1], device=device), True)[1], x[:, [1]])
    x = torch.randn(300 * 64, 3, device=device) + 0.5
    check_sums(torch.ops.pyft.gather_columns(x, torch.tensor([2, 0], device=device), True)[1], x[:, [2, 0]])


def test_channels_may_come_twice_or_not_at_all(device: str) -> None:
    x = torch.randn(2, 4, 6, device=device)
    twice = torch.tensor([3, 1, 3], device=device)
    assert torch.equal(op(x, twice, False)[0], x[:, twice])
    for empty, channels in ((x[:0], twice), (x[:, :, :0], twice), (x, twice[:0])):
        found, sums = op(empty, channels, True)
        assert found.shape == (empty.shape[0], len(channels), empty.shape[2])
        assert sums.tolist() == [0.0] * len(channels)


def test_what_is_not_finite_stays_in_its_channel(device: str) -> None:
    x = torch.ones(3, 4, 50, device=device)
    x[1, 0, 7], x[2, 2, 49], x[0, 1] = torch.nan, torch.inf, torch.nan
    found, sums = op(x, torch.tensor([0, 2, 3], device=device), True)
    assert torch.equal(found.isnan(), x[:, [0, 2, 3]].isnan())
    assert sums[0].isnan()
    assert sums[1:].tolist() == [torch.inf, 150.0]


IMAGES = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "of wider channels last": lambda x: (
        torch.cat([x, x], 1).movedim(1, -1).contiguous().movedim(-1, 1)[:, : x.shape[1]]
    ),
    "of wider images": lambda x: torch.cat([x, x], 1)[:, 1 : 1 + x.shape[1]],
    "transposed": lambda x: x.transpose(2, -1).contiguous().transpose(2, -1),
    "cropped": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "flipped order": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("make", IMAGES)
@pytest.mark.parametrize("shape", [(3, 10, 5, 4), (2, 9, 6), (2, 8, 3, 2, 4), (4, 6, 1, 1), (1, 5, 3, 3), (2, 1, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_images_of_any_layout(
    device: str, as_on_a_gpu: None, make: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = IMAGES[make](torch.randn(shape)).to(dtype).to(device)
    channels = chosen(shape[1], max(1, shape[1] // 2), device)
    found, sums = gather_channels(x, channels, with_sums=True)
    assert torch.equal(found, x[:, channels])
    check_sums(sums, x[:, channels])
    last = make in ("channels last", "of wider channels last") and shape[1] > 1
    assert (found.movedim(1, -1) if last else found).is_contiguous()
    alone, none = gather_channels(x, channels)
    assert torch.equal(alone, found)
    assert none.shape == (0,)


def test_a_gradient_of_one_number(device: str, as_on_a_gpu: None) -> None:
    """What `sum().backward()` hands over: all strides are 0."""
    x = torch.full((), 0.5, device=device).expand(2, 6, 3, 3)
    found, sums = gather_channels(x, torch.tensor([4, 1], device=device), with_sums=True)
    assert torch.equal(found, torch.full((2, 2, 3, 3), 0.5, device=device))
    assert sums.tolist() == [9.0, 9.0]


@pytest.mark.parametrize("with_sums", [True, False])
def test_by_opcheck(device: str, with_sums: bool) -> None:
    arguments = (torch.randn(2, 6, 5, device=device), torch.tensor([1, 3], device=device), with_sums)
    torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_wrong_arguments_are_named(emulation: object) -> None:
    if emulation is None and not torch.cuda.is_available():
        pytest.skip("PyTorch serves the CPU and names them itself")
    device = "cpu" if emulation is not None else "cuda"
    assert loader.load_core_for(device) is not None
    x, channels = torch.ones(3, 4, 2, device=device), torch.tensor([0, 1], device=device)
    for wrong in (x.double(), x[0]):
        with pytest.raises(
            RuntimeError, match=r"x must be float32, bfloat16 or float16 \(images, channels, places\) on"
        ):
            op(wrong, channels, False)
    with pytest.raises(RuntimeError, match=r"x has strides \(8, 1, 4\); the places of a channel must lie side by side"):
        op(x.transpose(1, 2).contiguous().transpose(1, 2), channels, False)
    many, big = torch.zeros(1, device=device).expand(2**16, 4, 1), torch.zeros(2**15, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match="65536 images of 32768 channels of 1 places; less than 2\\^31 planes"):
        op(many, big, False)
    with pytest.raises(RuntimeError, match="channels must be 2 contiguous int64"):
        op(x, channels.int(), False)
