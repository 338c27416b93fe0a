"""Convolutions of which a part trains: against the dense gradient in float64, in all layouts, and what is copied.

`--cuda-emulation` and a GPU gather on their kernels; the convolutions are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pyft.core import loader
from pyft.freezing.backward_index import conv_index, kept_blocks
from pyft.freezing.entries import make_entries
from pyft.ops import partial_conv
from pyft.ops.partial_conv import _conv_backward, channels_of_blocks

OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
IDX = torch.tensor([1, 3])
BLOCKS = [0, 1, 2, 0, 2, 1]
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    # cuDNN may otherwise round fp32 to 10 bits.
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield request.param


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


@pytest.mark.parametrize("kind", ["rows", "run", "columns", "blocks", "uneven groups", "run of groups"])
def test_by_opcheck(kind: str) -> None:
    geometry = ([1, 1], [1, 1], [1, 1])
    x, w, no_blocks = leaf(2, 4, 5, 5), torch.randn(6, 4, 3, 3), (None, None, [1, 1])
    blocks = (BLOCKS, channels_of_blocks(BLOCKS, 2), [2, 2])
    grouped = torch.randn(6, 2, 3, 3)
    cases: dict[str, tuple[Any, ...]] = {
        "rows": (x, w, leaf(6), leaf(2, 4, 3, 3), leaf(2), None, IDX, -1, None, 1, *no_blocks, *geometry, 1),
        "run": (x, w, None, leaf(3, 4, 3, 3), None, None, None, 2, None, 1, *no_blocks, *geometry, 1),
        "columns": (x, w, None, leaf(6, 2, 3, 3), None, IDX, None, -1, None, 1, *no_blocks, *geometry, 1),
        "blocks": (x, w, None, leaf(6, 2, 3, 3), None, None, None, -1, None, 1, *blocks, *geometry, 1),
        "uneven groups": (
            x, grouped, leaf(6), leaf(3, 2, 3, 3), leaf(3), None, torch.tensor([0, 2, 3, 3]), -1,
            torch.tensor([0, 1, 2]), 2, *no_blocks, *geometry, 2,
        ),
        "run of groups": (
            x, grouped, None, leaf(3, 2, 3, 3), None, torch.tensor([2, 3]), None, 3, None, 1, *no_blocks, *geometry, 2,
        ),
    }  # fmt: skip
    torch.library.opcheck(torch.ops.pyft.partial_conv.default, cases[kind], test_utils=OPCHECK)


# Channels out, channels in, groups, and what trains.
PLACES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "rows": (8, 6, 1, {"rows": [1, 4, 5]}),
    "one row": (8, 6, 1, {"rows": [7]}),
    "rows side by side": (8, 6, 1, {"rows": slice(2, 6)}),
    "columns": (8, 6, 1, {"columns": [0, 4, 5]}),
    "columns side by side": (8, 6, 1, {"columns": [2, 3]}),
    "crossing": (8, 6, 1, {"rows": [0, 7], "columns": [1, 5]}),
    "even groups": (8, 6, 2, {"rows": [1, 2, 5, 7]}),
    "uneven groups": (8, 6, 2, {"rows": [0, 1, 3, 6]}),
    "one of two groups": (8, 6, 2, {"rows": slice(4, 8)}),
    "crossing of groups": (8, 6, 2, {"rows": [0, 6], "columns": [2]}),
    "depthwise": (6, 6, 6, {"rows": [1, 4, 5]}),
    "depthwise side by side": (6, 6, 6, {"rows": slice(1, 4)}),
    "blocks": (8, 6, 1, {"blocks": [(0, 0), (0, 2), (1, 1), (3, 0), (3, 1), (3, 2)], "block_size": (2, 2)}),
}


def index_of(places: dict[str, Any], shape: tuple[int, ...], groups: int, device: str) -> dict[str, Any]:
    """The arguments of `partial_conv` for this part, as layers make them."""
    entries = make_entries(shape, **places)
    index, blocks = conv_index(entries, groups), kept_blocks(entries)
    found = {"rows": index.rows, "channels": index.channels, "real": index.real}
    found = {name: None if tensor is None else tensor.to(device) for name, tensor in found.items()}
    return found | {
        "row_start": index.row_start,
        "part_groups": index.groups,
        "blocks": None if blocks is None else blocks.flatten().tolist(),
        "block_size": entries.block_size,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("spatial", [(7,), (5, 6), (3, 2, 4)], ids=str)
@pytest.mark.parametrize("kind", PLACES)
def test_gradients_are_those_of_the_dense_layer(
    device: str, as_on_a_gpu: None, kind: str, spatial: tuple[int, ...], last: bool, dtype: torch.dtype
) -> None:
    outputs, inputs, groups, places = PLACES[kind]
    dims = len(spatial)
    generator = torch.Generator().manual_seed(dims)
    shape = (outputs, inputs // groups, *[2] * dims)
    x, weight, bias = (
        torch.randn(size, generator=generator).to(dtype) for size in ((3, inputs, *spatial), shape, (outputs,))
    )
    geometry = {"stride": [1] * dims, "padding": [1] * dims, "dilation": [1] * dims, "groups": groups}
    exact = [t.clone().double().requires_grad_() for t in (x, weight, bias)]
    y = CONV[dims](*exact, **geometry)
    grad = torch.randn(y.shape, generator=generator).to(dtype)
    y.backward(grad.double())
    entries = make_entries(shape, **places)
    part = torch.full(entries.part_shape, torch.nan, dtype=dtype, device=device, requires_grad=True)
    has_rows = entries.rows is not None
    bias_part = torch.full(entries.part_shape[:1], torch.nan, dtype=dtype, device=device, requires_grad=True)

    def laid(image: Tensor) -> Tensor:
        image = image.to(device)
        return image.movedim(1, -1).contiguous().movedim(-1, 1) if last else image

    image = laid(x).requires_grad_()
    found = partial_conv(
        image, weight.to(device), bias.to(device), part, bias_part if has_rows else None,
        **index_of(places, shape, groups, device), **geometry,
    )  # fmt: skip
    found.backward(laid(grad))

    def check(got: Tensor | None, want: Tensor | None) -> None:
        assert got is not None
        assert want is not None
        room = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float64: 1e-12}[dtype]
        assert got.dtype == dtype
        torch.testing.assert_close(got.cpu().double(), want, rtol=room, atol=room * 3)

    check(image.grad, exact[0].grad)
    check(part.grad, entries.take(exact[1].grad))
    if has_rows:
        check(bias_part.grad, exact[2].grad[entries.rows])


def backward_arguments(places: dict[str, Any], groups: int = 1, device: str = "cpu") -> tuple[list[Any], Tensor]:
    """What backward of a layer with 8 channels out and 6 in gets, and its gradient of the output."""
    shape = (8, 6 // groups, 3, 3)
    index, entries = index_of(places, shape, groups, device), make_entries(shape, **places)
    kept = torch.randn(2, 6 if index["channels"] is None else len(index["channels"]), 5, 5, device=device)
    grad = torch.randn(2, 8, 3, 3, device=device)
    channels = (
        None if index["blocks"] is None else channels_of_blocks(index["blocks"], index["block_size"][1]).to(device)
    )
    wanted = [True, False, True, entries.rows is not None]
    return [
        grad, kept, torch.randn(shape, device=device), [2, 6, 5, 5], [3, 3], entries.part_shape[0], index["rows"],
        index["row_start"], index["real"], index["part_groups"], index["blocks"], channels, index["block_size"],
        [1, 1], [0, 0], [1, 1], groups, wanted,
    ], grad  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "places"),
    [
        (1, {"rows": slice(2, 6)}),
        (2, {"rows": slice(4, 8)}),
        (1, {"blocks": [(0, 1), (0, 2), (3, 0), (3, 1), (3, 2)], "block_size": (2, 2)}),
    ],
)
def test_channels_side_by_side_are_views(monkeypatch: pytest.MonkeyPatch, groups: int, places: dict[str, Any]) -> None:
    module = __import__("sys").modules["pyft.ops.partial_conv"]
    arguments, grad = backward_arguments(places, groups)
    kept, seen = arguments[1], []
    convolve = module._kernel_gradient

    def spy(rows: Tensor, columns: Tensor, *rest: Any) -> Tensor:
        seen.append((rows, columns))
        return convolve(rows, columns, *rest)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("channels side by side were gathered")

    monkeypatch.setattr(module, "_kernel_gradient", spy)
    monkeypatch.setattr(module, "gather_channels", refuse)
    _conv_backward(*arguments)
    assert seen
    for rows, columns in seen:
        assert rows.untyped_storage().data_ptr() == grad.untyped_storage().data_ptr()
        assert columns.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", PLACES)
def test_backward_never_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """With tensors that have no values, whatever asks for one is an error."""
    outputs, _, groups, places = PLACES[kind]
    if outputs != 8:
        pytest.skip("the same as for groups")
    monkeypatch.setattr(loader, "load_core_for", lambda device: None)
    real, _ = backward_arguments(places, groups)
    with FakeTensorMode():
        arguments = [torch.empty(a.shape, dtype=a.dtype, device="cuda") if isinstance(a, Tensor) else a for a in real]
        _, _, part, bias_part = _conv_backward(*arguments)
    want = _conv_backward(*real)
    assert (part.device.type, part.shape, bias_part.shape) == ("cuda", want[2].shape, want[3].shape)


def test_only_the_input_gradient_gathers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, _ = backward_arguments({"rows": [1, 5]})
    monkeypatch.setattr("torch.Tensor.index_select", lambda *a: pytest.fail("gathered"))
    found = _conv_backward(*arguments[:-1], [True, False, False, False])
    assert found[0].shape == (2, 6, 5, 5)
    assert [t.numel() for t in found[1:]] == [0, 0, 0]


def test_channels_of_blocks_are_made_where_they_are_not_given() -> None:
    weight, x = torch.randn(4, 4, 1), torch.randn(2, 4, 5)
    part = torch.zeros(4, 2, 1, requires_grad=True)
    dense = weight.clone().requires_grad_()
    blocks = {"blocks": [0, 1, 1, 0], "block_size": (2, 2)}
    partial_conv(x, weight, None, part, **blocks, stride=[1], padding=[0], dilation=[1]).square().sum().backward()
    F.conv1d(x, dense).square().sum().backward()
    torch.testing.assert_close(part.grad, torch.cat([dense.grad[:2, 2:], dense.grad[2:, :2]]))
