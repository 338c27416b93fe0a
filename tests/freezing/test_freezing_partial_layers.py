"""The gradient of a part against the same entries of the dense gradient, for all layers and all masks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyft.freezing.entries import make_entries
from pyft.freezing.partial import train_only
from pyft.freezing.parts import PARTS

Make = Callable[[], tuple[nn.Module, torch.Tensor]]
# A layer and an input; sizes are even, so that blocks of 2 x 2 fit.
LAYERS: dict[str, Make] = {
    "Linear": lambda: (nn.Linear(6, 8), torch.randn(3, 4, 6)),
    "Linear, one sample": lambda: (nn.Linear(6, 8), torch.randn(6)),
    "Linear, no bias": lambda: (nn.Linear(6, 8, bias=False), torch.randn(5, 6)),
    "Linear, strided input": lambda: (nn.Linear(6, 8), torch.randn(6, 5).t()),
    "Linear, empty batch": lambda: (nn.Linear(6, 8), torch.randn(0, 6)),
    "Conv1d": lambda: (nn.Conv1d(6, 8, 3, padding=1), torch.randn(2, 6, 7)),
    "Conv1d, circular": lambda: (nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"), torch.randn(2, 6, 7)),
    "Conv2d": lambda: (nn.Conv2d(6, 8, 3, stride=2), torch.randn(2, 6, 7, 9)),
    "Conv2d, lone": lambda: (nn.Conv2d(6, 8, 3, dilation=2), torch.randn(6, 7, 9)),
    "Conv2d, same": lambda: (nn.Conv2d(6, 8, (2, 3), padding="same"), torch.randn(2, 6, 5, 5)),
    "Conv2d, 1 x 1": lambda: (nn.Conv2d(6, 8, 1), torch.randn(2, 6, 3, 3)),
    "Conv2d, channels last": lambda: (
        nn.Conv2d(6, 8, 3, padding=1).to(memory_format=torch.channels_last),
        torch.randn(2, 6, 7, 7).to(memory_format=torch.channels_last),
    ),
    "Conv2d, empty batch": lambda: (nn.Conv2d(6, 8, 3), torch.randn(0, 6, 7, 7)),
    "Conv2d, groups": lambda: (nn.Conv2d(12, 8, 3, groups=2), torch.randn(2, 12, 5, 5)),
    "Conv2d, depthwise": lambda: (nn.Conv2d(8, 8, 3, groups=8), torch.randn(2, 8, 5, 5)),
    "Conv2d, depthwise x 2": lambda: (nn.Conv2d(4, 8, 3, groups=4), torch.randn(2, 4, 5, 5)),
    "Conv3d": lambda: (nn.Conv3d(2, 4, 2), torch.randn(2, 2, 3, 3, 3)),
    "Embedding": lambda: (nn.Embedding(8, 6), torch.randint(8, (3, 5))),
    "Embedding, padding": lambda: (nn.Embedding(8, 6, padding_idx=2), torch.randint(8, (4, 9))),
    "Embedding, by frequency": lambda: (nn.Embedding(8, 6, scale_grad_by_freq=True), torch.randint(8, (4, 9))),
    "LayerNorm": lambda: (nn.LayerNorm(8), torch.randn(3, 4, 8)),
    "LayerNorm of two": lambda: (nn.LayerNorm((4, 6)), torch.randn(3, 4, 6)),
    "RMSNorm": lambda: (nn.RMSNorm(8), torch.randn(3, 8)),
    "GroupNorm": lambda: (nn.GroupNorm(2, 8), torch.randn(3, 8, 5)),
    "BatchNorm1d": lambda: (nn.BatchNorm1d(8), torch.randn(5, 8)),
    "BatchNorm2d": lambda: (nn.BatchNorm2d(8), torch.randn(3, 8, 2, 2)),
    "BatchNorm2d, cumulative": lambda: (nn.BatchNorm2d(8, momentum=None), torch.randn(3, 8, 2, 2)),
    "BatchNorm3d": lambda: (nn.BatchNorm3d(4), torch.randn(3, 4, 2, 2, 2)),
}
BLOCKS = {"Linear", "Linear, one sample", "Conv1d", "Conv2d", "Conv2d, 1 x 1", "Conv2d, channels last", "Conv3d"}


@st.composite
def masks(draw: Any, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Any rows, columns, crossing or blocks that a weight of this shape may have."""

    def some(size: int) -> list[int]:
        return draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))

    kinds = ["rows", "run", "mask"]
    if len(shape) > 1:
        kinds += ["columns", "crossing"]
    if name in BLOCKS:
        kinds.append("blocks")
    kind = draw(st.sampled_from(kinds))
    if kind == "run":
        start = draw(st.integers(0, shape[0] - 1))
        return {"rows": slice(start, draw(st.integers(start + 1, shape[0])))}
    if kind == "mask":
        mask = torch.zeros(shape[0], dtype=torch.bool)
        mask[some(shape[0])] = True
        return {"rows": mask}
    if kind == "blocks":
        grid = torch.zeros(shape[0] // 2, shape[1] // 2, dtype=torch.bool)
        grid.view(-1)[some(grid.numel())] = True
        return {"blocks": grid, "block_size": (2, 2)}
    found: dict[str, Any] = {}
    if kind in ("rows", "crossing"):
        found["rows"] = some(shape[0])
    if kind in ("columns", "crossing"):
        found["columns"] = some(shape[1])
    return found


def gradients(layer: nn.Module, x: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output, and the gradient of the input, under a fixed random gradient of the output."""
    x = x.detach().clone(memory_format=torch.preserve_format)
    x.requires_grad_(x.is_floating_point())
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype))
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LAYERS)
@given(data=st.data(), seed=st.integers(0, 2**31))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_the_gradient_of_a_part_is_that_of_its_entries(
    name: str, dtype: torch.dtype, data: st.DataObject, seed: int
) -> None:
    torch.manual_seed(seed)
    layer, x = LAYERS[name]()
    layer.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    dense = copy.deepcopy(layer)
    places = data.draw(masks(name, tuple(layer.weight.shape)))
    train_only(layer, **places)
    ours, theirs = gradients(layer, x, seed), gradients(dense, x, seed)
    assert torch.equal(ours[0], theirs[0])
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    if theirs[1] is not None:
        torch.testing.assert_close(ours[1], theirs[1], **close)
    for key, part in layer.__dict__[PARTS].items():
        found = layer._parameters[f"{key}_part"].grad
        assert found.shape == part.entries.part_shape
        torch.testing.assert_close(found, part.entries.take(dense._parameters[key].grad), **close)
        assert layer._parameters[key].grad is None
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), dense.buffers(), strict=True))


@pytest.mark.parametrize(
    "places", [{"rows": [0, 3]}, {"rows": slice(2, 4)}, {"columns": [1]}, {"rows": 1, "columns": [0, 2]}]
)
def test_parts_are_put_where_they_were_taken(places: dict[str, Any]) -> None:
    full = torch.randn(4, 3, 2)
    entries = make_entries(full.shape, **places)
    part = torch.randn(entries.part_shape)
    mask = torch.zeros(4, 3, 2, dtype=torch.bool)
    rows = places.get("rows", slice(None))
    rows = [rows] if isinstance(rows, int) else rows
    inner = mask[rows].clone()
    inner[:, places.get("columns", slice(None))] = True
    mask[rows] = inner
    put = entries.put(full, part)
    written = full.clone()
    entries.write_(written, part)
    assert torch.equal(put, written)
    assert torch.equal(put[~mask], full[~mask])
    assert torch.equal(put[mask], part.reshape(-1))
    assert torch.equal(entries.take(put), part)
    assert torch.equal(entries.rest(full), full.masked_fill(mask, 0.0))


def test_blocks_are_put_where_they_were_taken() -> None:
    full = torch.randn(6, 4)
    entries = make_entries(full.shape, blocks=[(2, 0), (0, 1)], block_size=(2, 2))
    assert entries.part_shape == (4, 2)
    assert torch.equal(entries.take(full), torch.cat([full[:2, 2:], full[4:, :2]]))
    put = entries.put(full, torch.zeros(4, 2))
    assert torch.equal(put, entries.rest(full))
    assert int((put == 0).sum()) == 8


@pytest.mark.parametrize("rows", [[1, 4, 5], slice(2, 5)])
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "Conv2d, channels last", "Conv2d, groups"])
def test_under_autocast_as_the_dense_layer_under_autocast(name: str, rows: Any) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name]()
    dense = copy.deepcopy(layer)
    train_only(layer, rows=rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = layer(x), dense(x)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)
    for y in (ours, theirs):
        y.float().square().sum().backward()
    assert layer.weight_part.grad.dtype == torch.float32
    wanted = dense.weight.grad[rows]
    torch.testing.assert_close(layer.weight_part.grad, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))
    torch.testing.assert_close(layer.bias_part.grad, dense.bias.grad[rows], rtol=0.02, atol=0.1)


def test_only_the_chosen_columns_of_the_input_are_kept() -> None:
    def kept(layer: nn.Module, x: torch.Tensor) -> int:
        weights = {p.data_ptr() for p in layer.parameters()}
        sizes = []
        pack = lambda t: sizes.append(t.numel() if t.data_ptr() not in weights and t.is_floating_point() else 0)  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (pack(t), t)[1], lambda t: t):
            layer(x)
        return sum(sizes)

    x = torch.randn(32, 64)
    assert kept(nn.Linear(64, 64), x) == 32 * 64
    layer = nn.Linear(64, 64)
    train_only(layer, columns=[3, 8])
    assert kept(layer, x) == 32 * 2
    layer = nn.Linear(64, 64)
    train_only(layer, blocks=[(0, 1), (3, 1)], block_size=(8, 8))
    assert kept(layer, x) == 32 * 8
    layer = nn.Linear(64, 64)
    train_only(layer, "bias", rows=[1])
    layer.weight.requires_grad_(False)
    assert kept(layer, x.requires_grad_()) == 0
    conv = nn.Conv2d(8, 8, 3)
    train_only(conv, columns=[1])
    assert kept(conv, torch.randn(2, 8, 5, 5)) == 2 * 1 * 25


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "Embedding"])
def test_a_second_derivative_is_refused_by_name(name: str) -> None:
    layer, x = LAYERS[name]()
    train_only(layer, rows=[0, 2])
    model = nn.Sequential(layer, nn.Tanh())
    (grad,) = torch.autograd.grad(model(x).square().sum(), layer.weight_part, create_graph=True)
    with pytest.raises(RuntimeError, match="layer that trains in part has no second derivative"):
        grad.square().sum().backward()
