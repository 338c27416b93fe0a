"""Chosen columns with their sums, and parts written back: against PyTorch in float64, in all layouts.

On the CPU PyTorch serves these ops; `--cuda-emulation` and a GPU run their kernels.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyft.core import loader
from pyft.ops import gather_columns, write_part_

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPCHECK = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
SENTINEL = 77.0


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return request.param


def matrix(rows: int, columns: int, dtype: torch.dtype, device: str, layout: str = "plain") -> Tensor:
    """Random numbers with sentinels around them, at an odd place, transposed, or in rows with a gap."""
    generator = torch.Generator().manual_seed(rows * 1009 + columns)
    values = torch.randn(rows, columns, generator=generator).to(dtype)
    if layout == "transposed":
        return values.t().contiguous().to(device).t()
    width, offset = {"plain": (columns, 0), "odd": (columns, 1), "gap": (columns + 3, 0), "wide": (columns + 16, 8)}[
        layout
    ]
    memory = torch.full((rows * width + offset + 16,), SENTINEL, dtype=dtype, device=device)
    view = memory[offset : offset + rows * width].view(rows, width)[:, :columns]
    view.copy_(values)
    return view


def chosen(total: int, count: int, kind: str) -> Tensor:
    """`count` of `total` places: spread, side by side from a multiple of 8 or another place, or in no order."""
    if kind == "run":
        return torch.arange(count) + 8 * ((total - count) // 8)
    if kind == "odd run":
        return torch.arange(count) + (total - count)
    places = torch.randperm(total, generator=torch.Generator().manual_seed(total + count))[:count]
    return places if kind == "shuffled" else places.sort().values


def same_bits(one: Tensor, other: Tensor) -> bool:
    kind = {4: torch.int32, 2: torch.int16}[one.element_size()]
    return one.shape == other.shape and torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "odd", "gap", "wide", "transposed"])
@pytest.mark.parametrize(
    ("rows", "total", "count", "kind"),
    [
        (5, 40, 1, "spread"),
        (67, 40, 7, "spread"),
        (300, 96, 8, "run"),
        (300, 96, 8, "odd run"),
        (130, 384, 40, "spread"),
        (130, 384, 264, "run"),
        (33, 384, 257, "shuffled"),
    ],
)
def test_columns_and_sums(
    device: str, dtype: torch.dtype, layout: str, rows: int, total: int, count: int, kind: str
) -> None:
    x, columns = matrix(rows, total, dtype, device, layout), chosen(total, count, kind).to(device)
    found, sums = torch.ops.pyft.gather_columns(x, columns, True)
    assert found.is_contiguous()
    assert same_bits(found, x[:, columns])
    exact = x[:, columns].double().sum(0)
    room = 2e-6 * x[:, columns].double().abs().sum(0) + torch.finfo(dtype).eps * exact.abs()
    assert sums.dtype == dtype
    assert ((sums.double() - exact).abs() <= room).all()
    alone, none = torch.ops.pyft.gather_columns(x, columns, False)
    assert same_bits(alone, found)
    assert none.shape == (0,)


def test_bits_of_sums_are_the_same_whatever_the_layout(device: str) -> None:
    columns = chosen(96, 12, "spread").to(device)
    sums = [
        torch.ops.pyft.gather_columns(matrix(1000, 96, torch.float32, device, layout), columns, True)[1]
        for layout in ("plain", "odd", "gap", "wide", "transposed", "plain")
    ]
    assert all(same_bits(sums[0], other) for other in sums[1:])


def test_sums_of_nothing_and_of_what_is_not_finite(device: str) -> None:
    columns = torch.tensor([0, 2, 3], device=device)
    found, sums = gather_columns(torch.empty(0, 5, device=device), columns, True)
    assert found.shape == (0, 3)
    assert sums.tolist() == [0.0, 0.0, 0.0]
    found, sums = gather_columns(torch.ones(4, 5, device=device), columns[:0], True)
    assert found.shape == (4, 0)
    assert sums.shape == (0,)
    x = torch.ones(200, 5, device=device)
    x[7, 0], x[9, 2] = torch.nan, torch.inf
    found, sums = torch.ops.pyft.gather_columns(x, columns, True)
    assert torch.equal(found.isnan(), x[:, columns].isnan())
    assert sums[0].isnan()
    assert sums[1:].tolist() == [torch.inf, 200.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "odd", "gap", "wide", "transposed"])
@pytest.mark.parametrize("part_layout", ["plain", "odd", "expanded"])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [("spread", None), (None, "spread"), (None, "run"), ("shuffled", "odd run"), ("run", "run"), (None, None)],
)
def test_part_is_written_and_nothing_else(
    device: str, dtype: torch.dtype, layout: str, part_layout: str, rows: str | None, columns: str | None
) -> None:
    height, width = 70, 88
    full = matrix(height, width, dtype, device, layout)
    memory = full._base if full._base is not None else full
    at = [None if kind is None else chosen(n, 24, kind).to(device) for n, kind in ((height, rows), (width, columns))]
    shape = (height if at[0] is None else 24, width if at[1] is None else 24)
    if part_layout == "expanded":
        part = torch.zeros((), dtype=dtype, device=device).expand(shape)
    else:
        part = matrix(shape[0], shape[1], dtype, device, part_layout) + 3
    before = memory.clone()
    expected = full.clone()
    every = [
        torch.arange(n, device=device) if index is None else index for n, index in zip((height, width), at, strict=True)
    ]
    expected[every[0][:, None], every[1]] = part
    torch.ops.pyft.write_part_(full, part, *at)
    assert same_bits(full, expected)
    # What is around the matrix is as it was.
    full.zero_()
    after = memory.clone()
    full.copy_(expected)
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.as_strided(full.shape, full.stride(), full.storage_offset() - memory.storage_offset()).zero_()
    assert same_bits(after[outside], before[outside])


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("which", ["rows", "columns"])
def test_part_of_a_convolution(device: str, format: torch.memory_format, which: str) -> None:
    full = torch.randn(6, 5, 3, 3, device=device).contiguous(memory_format=format)
    index = torch.tensor([1, 4], device=device)
    shape = (2, 5, 3, 3) if which == "rows" else (6, 2, 3, 3)
    for part_format in (torch.contiguous_format, torch.channels_last):
        part = torch.randn(shape, device=device).contiguous(memory_format=part_format)
        expected = full.index_copy(0 if which == "rows" else 1, index, part)
        version = full._version
        write_part_(full, part, **{which: index})
        assert torch.equal(full, expected)
        assert full._version > version


def test_part_of_a_bias_and_of_a_conv1x1(device: str) -> None:
    bias = torch.zeros(5, device=device)
    write_part_(bias, torch.tensor([1.0, 2.0], device=device), torch.tensor([4, 1], device=device))
    assert bias.tolist() == [0.0, 2.0, 0.0, 0.0, 1.0]
    weight = torch.zeros(2, 3, 1, 1, device=device)
    write_part_(weight, torch.ones(2, 1, 1, 1, device=device), columns=torch.tensor([2], device=device))
    assert weight.flatten(1).tolist() == [[0.0, 0.0, 1.0]] * 2


@pytest.mark.parametrize("with_sums", [True, False])
def test_gather_by_opcheck(device: str, with_sums: bool) -> None:
    arguments = (torch.randn(5, 6, device=device), torch.tensor([1, 3], device=device), with_sums)
    torch.library.opcheck(torch.ops.pyft.gather_columns.default, arguments, test_utils=OPCHECK[:2])


@pytest.mark.parametrize("rows", [None, torch.tensor([2, 0])])
@pytest.mark.parametrize("columns", [None, torch.tensor([1])])
def test_write_by_opcheck(device: str, rows: Tensor | None, columns: Tensor | None) -> None:
    shape = (4 if rows is None else 2, 3 if columns is None else 1)
    indices = [None if index is None else index.to(device) for index in (rows, columns)]
    arguments = (torch.randn(4, 3, device=device), torch.randn(shape, device=device), *indices)
    torch.library.opcheck(torch.ops.pyft.write_part_.default, arguments, test_utils=OPCHECK)


def test_wrong_arguments_are_named(emulation: object) -> None:
    if emulation is None and not torch.cuda.is_available():
        pytest.skip("PyTorch serves the CPU and names them itself")
    device = "cpu" if emulation is not None else "cuda"
    assert loader.load_core_for(device) is not None
    x, columns = torch.ones(3, 4, device=device), torch.tensor([0, 1], device=device)
    with pytest.raises(RuntimeError, match="x must be a float32, bfloat16 or float16 matrix on"):
        torch.ops.pyft.gather_columns(x.double(), columns, False)
    with pytest.raises(RuntimeError, match="columns must be 2 contiguous int64"):
        torch.ops.pyft.gather_columns(x, columns.int(), False)
    with pytest.raises(RuntimeError, match=r"part is \(3, 2\) and full \(3, 4\); where rows or columns are not named"):
        torch.ops.pyft.write_part_(x, x[:, :2], None, None)
    with pytest.raises(RuntimeError, match="part must have the dtype and device of full"):
        torch.ops.pyft.write_part_(x, x.half(), None, None)
