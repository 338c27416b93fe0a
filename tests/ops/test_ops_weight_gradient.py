"""Chosen rows of a weight's gradient against products in float64, on every CPU target."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyft.ops.weight_gradient import weight_gradient, weight_gradient_reference

op = torch.ops.pyft.partial_weight_gradient


def matrices(tokens: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + height + width)
    return torch.randn(tokens, height, generator=generator), torch.randn(tokens, width, generator=generator)


def check(found: tuple[torch.Tensor, torch.Tensor], grad: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
    """Errors of each entry against float64, in units of the terms that were added for it."""
    grad, x = grad.double()[:, rows], x.double()
    terms = grad.abs().t() @ x.abs()
    assert ((found[0] - grad.t() @ x).abs() <= 1e-6 * terms + 1e-30).all()
    assert ((found[1] - grad.sum(0)).abs() <= 1e-7 * grad.abs().sum(0) + 1e-30).all()


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 255, 256, 257, 600])
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 64, 4), (40, 65, 7), (30, 130, 13), (200, 31, 49), (8, 0, 3)])
def test_sizes(cpu_target: str, tokens: int, shape: tuple[int, int, int]) -> None:
    height, width, count = shape
    grad, x = matrices(tokens, height, width)
    rows = torch.randperm(height, generator=torch.Generator().manual_seed(1))[:count]
    check(op(grad, x, rows, -1, count, True), grad, x, rows)
    run = torch.arange(height - count, height)
    check(op(grad, x, None, height - count, count, True), grad, x, run)
    assert op(grad, x, rows, -1, count, False)[1].numel() == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 140), st.integers(1, 90), st.integers(0, 3))
def test_any_matrices_inside_others(core, tokens: int, height: int, width: int, count: int, skip: int) -> None:
    """Rows may repeat, and both matrices may be parts of larger ones at any offset."""
    grad, x = matrices(tokens, height + skip, width + 2 * skip)
    grad, x = grad[:, skip:], x[:, skip : skip + width]
    rows = torch.randint(height, (count,), generator=torch.Generator().manual_seed(count))
    check(op(grad, x, rows, -1, count, True), grad, x, rows)


def test_no_tokens_give_zeros(core) -> None:
    found = op(torch.empty(0, 8), torch.empty(0, 70), torch.tensor([1, 2]), -1, 2, True)
    assert torch.equal(found[0], torch.zeros(2, 70))
    assert torch.equal(found[1], torch.zeros(2))
    assert op(torch.randn(4, 8), torch.randn(4, 70), torch.empty(0, dtype=torch.int64), -1, 0, True)[0].shape == (0, 70)


def test_nan_and_inf_stay_in_their_rows_and_columns(cpu_target: str) -> None:
    grad, x = matrices(300, 20, 70)
    grad[270, 3], x[10, 69] = torch.nan, torch.inf
    found, sums = op(grad, x, torch.tensor([2, 3, 5, 7, 11, 13, 17]), -1, 7, True)
    bad = torch.zeros(7, 70, dtype=torch.bool)
    bad[1], bad[:, 69] = True, True
    assert torch.equal(~found.isfinite(), bad)
    assert torch.equal(sums.isnan(), torch.arange(7) == 1)


def test_same_bits_for_any_number_of_threads(core, one_thread_then_two: list[int]) -> None:
    grad, x = matrices(1000, 300, 500)
    rows = torch.arange(0, 300, 7)
    found = []
    for threads in one_thread_then_two:
        torch.set_num_threads(threads)
        found.append(op(grad, x, rows, -1, len(rows), True))
    assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(found[0], pair, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.tensor([0, 8])}, "rows has 8 but grad has 8 columns"),
        ({"rows": torch.tensor([-1, 0])}, "rows has -1"),
        ({"rows": torch.tensor([0])}, "rows must be 2 contiguous int64"),
        ({"rows": None}, "rows has -1"),
        ({"x": torch.randn(3, 70)}, "grad has 4 tokens but input has 3"),
        ({"x": torch.randn(4, 70).double()}, "input must be a float32 matrix"),
        ({"x": torch.randn(70, 4).t()}, "must lie side by side"),
    ],
)
def test_what_does_not_fit_is_named(core, change: dict[str, torch.Tensor], message: str) -> None:
    given = {"grad": torch.randn(4, 8), "x": torch.randn(4, 70), "rows": torch.tensor([0, 1]), **change}
    with pytest.raises(RuntimeError, match=message):
        op(given["grad"], given["x"], given["rows"], -1, 2, True)


@pytest.mark.parametrize("rows", [torch.tensor([1, 5, 6]), None])
def test_by_opcheck(rows: torch.Tensor | None) -> None:
    start = 2 if rows is None else -1
    torch.library.opcheck(
        op.default, (*matrices(5, 8, 70), rows, start, 3, True), test_utils=("test_schema", "test_faketensor")
    )


def test_other_dtypes_and_layouts_go_to_pytorch() -> None:
    grad, x = matrices(50, 16, 80)
    rows = torch.tensor([3, 9, 12, 1])[::2]
    for make in (torch.Tensor.double, torch.Tensor.bfloat16, lambda t: t.t().contiguous().t()):
        found = weight_gradient(make(grad), make(x), rows, row_count=2, with_sums=True)
        want = weight_gradient_reference(make(grad), make(x), rows, -1, 2, True)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    check(weight_gradient(grad, x, rows, row_count=2, with_sums=True), grad, x, rows)
    check(weight_gradient(grad, x, torch.arange(16), row_count=16, with_sums=True), grad, x, torch.arange(16))
