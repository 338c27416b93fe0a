"""The ops below layers that train in part: schema, fake, autograd, and against gradients in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pyft.ops import partial_embedding, partial_linear

OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
IDX = torch.tensor([1, 3])
BLOCKS = torch.tensor([[0, 1], [2, 0], [2, 1]])


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


# part shape, bias part, rows, row_start, columns, blocks, block size
LINEAR: dict[str, tuple[Any, ...]] = {
    "rows": ((2, 4), True, IDX, -1, None, None, [1, 1]),
    "run": ((3, 4), True, None, 2, None, None, [1, 1]),
    "columns": ((6, 2), False, None, -1, IDX, None, [1, 1]),
    "crossing": ((2, 2), True, IDX, -1, IDX, None, [1, 1]),
    "blocks": ((6, 2), False, None, -1, None, BLOCKS, [2, 2]),
}


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("batch", [(5,), (2, 3), ()])
def test_linear_by_opcheck(kind: str, batch: tuple[int, ...]) -> None:
    shape, with_bias, rows, start, columns, blocks, size = LINEAR[kind]
    bias_part = leaf(shape[0]) if with_bias else None
    arguments = (
        leaf(*batch, 4),
        torch.randn(6, 4),
        leaf(6),
        leaf(*shape),
        bias_part,
        rows,
        start,
        columns,
        blocks,
        size,
    )
    torch.library.opcheck(torch.ops.pyft.partial_linear.default, arguments, test_utils=OPCHECK)


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("wanted", [(True, True, True, True), (False, False, True, False), (True, False, False, False)])
def test_linear_backward_by_opcheck(kind: str, wanted: tuple[bool, ...]) -> None:
    shape, with_bias, rows, start, columns, blocks, size = LINEAR[kind]
    kept = torch.randn(5, 4 if columns is None else 2)
    flags = [*wanted[:3], wanted[3] and with_bias]
    arguments = (torch.randn(5, 6), kept, torch.randn(6, 4), rows, start, shape[0], blocks, size, flags)
    torch.library.opcheck(
        torch.ops.pyft.partial_linear_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("columns", [None, IDX])
def test_embedding_by_opcheck(columns: torch.Tensor | None) -> None:
    places = torch.tensor([2, 0, 2, 1, 2])
    part = leaf(2, 4 if columns is None else 2)
    arguments = (torch.randn(5, 4), torch.randint(5, (3, 2)), part, places, columns, False)
    torch.library.opcheck(torch.ops.pyft.partial_embedding.default, arguments, test_utils=OPCHECK)


def test_values_of_the_part_are_not_read() -> None:
    weight, x = torch.randn(6, 4), torch.randn(3, 4)
    part = torch.full((2, 4), torch.nan, requires_grad=True)
    assert torch.equal(partial_linear(x, weight, None, part, rows=IDX), F.linear(x, weight))
    table = torch.full((1, 4), torch.nan, requires_grad=True)
    ids = torch.tensor([0, 5])
    assert torch.equal(partial_embedding(weight, ids, table, torch.zeros(6, dtype=torch.int64)), weight[ids])


def test_nan_in_the_gradient_stays_in_its_row() -> None:
    part = torch.zeros(2, 4, requires_grad=True)
    x = torch.randn(3, 4)
    grad = torch.randn(3, 6)
    grad[:, 1] = torch.nan
    grad[:, 0] = torch.inf
    partial_linear(x, torch.randn(6, 4), None, part, rows=IDX).backward(grad)
    assert part.grad[0].isnan().all()
    torch.testing.assert_close(part.grad[1], grad[:, 3] @ x)
