"""Linear layers with packed weights against products in float64, on every CPU target."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyft.ops.packed_linear import (
    pack_linear,
    pack_linear_reference,
    packed_linear,
    packed_linear_reference,
)


def layer(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + inputs + outputs)
    return tuple(torch.randn(shape, generator=generator) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))


def check(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Errors of each number against float64, in units of the terms that were added for it."""
    bias = torch.zeros(len(weight)) if bias is None else bias
    terms = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    assert found.shape == terms.shape
    assert ((found - F.linear(x.double(), weight.double(), bias.double())).abs() <= 1e-6 * terms + 1e-30).all()


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 12, 13, 47, 48, 49, 200])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (64, 17), (383, 15), (384, 130), (385, 33), (800, 64)])
def test_sizes(cpu_target: str, rows: int, shape: tuple[int, int]) -> None:
    x, weight, bias = layer(rows, *shape)
    packed = pack_linear(weight)
    check(packed_linear(x, packed, bias, len(weight)), x, weight, bias)
    check(packed_linear(x, packed, None, len(weight)), x, weight, None)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 130), st.integers(1, 420), st.integers(1, 90), st.integers(0, 3))
def test_any_matrices_inside_others(core, rows: int, inputs: int, outputs: int, skip: int) -> None:
    x, weight, bias = layer(rows, inputs + skip, outputs)
    x, weight = x[:, skip:], weight[:, skip:]
    check(packed_linear(x, pack_linear(weight), bias, outputs), x, weight, bias)


def test_packed_weight_is_that_of_pytorch(cpu_target: str) -> None:
    for outputs, inputs in ((1, 1), (16, 5), (17, 64), (40, 3)):
        weight = torch.randn(outputs, inputs)
        assert torch.equal(pack_linear(weight), pack_linear_reference(weight))
        assert torch.equal(pack_linear(weight.t().contiguous().t()), pack_linear_reference(weight))


def test_more_dimensions_and_transposed_input(core) -> None:
    x, weight, bias = torch.randn(2, 3, 5, 70), torch.randn(65, 70), torch.randn(65)
    packed = pack_linear(weight)
    check(packed_linear(x, packed, bias, 65), x, weight, bias)
    turned = torch.randn(70, 9).t()
    check(packed_linear(turned, packed, bias, 65), turned, weight, bias)
    assert packed_linear(x[0, 0, 0], packed, bias, 65).shape == (65,)


def test_nothing_gives_nothing_or_the_bias(core) -> None:
    bias = torch.randn(5)
    assert packed_linear(torch.empty(0, 4), pack_linear(torch.randn(5, 4)), bias, 5).shape == (0, 5)
    assert packed_linear(torch.empty(3, 4), pack_linear(torch.empty(0, 4)), None, 0).shape == (3, 0)
    assert torch.equal(packed_linear(torch.empty(3, 0), pack_linear(torch.empty(5, 0)), bias, 5), bias.expand(3, 5))


def test_nan_and_inf_stay_in_their_rows_and_columns(cpu_target: str) -> None:
    x, weight, bias = layer(50, 400, 35)
    x[7, 390], weight[34, 3] = torch.nan, torch.inf
    found = packed_linear(x, pack_linear(weight), bias, 35)
    bad = torch.zeros(50, 35, dtype=torch.bool)
    bad[7], bad[:, 34] = True, True
    assert torch.equal(~found.isfinite(), bad)


def test_a_row_has_the_same_bits_in_every_batch(core, one_thread_then_two: list[int]) -> None:
    x, weight, bias = layer(1000, 500, 300)
    packed, found = pack_linear(weight), []
    for threads in one_thread_then_two:
        torch.set_num_threads(threads)
        cuts = [x.tensor_split(parts) for parts in (1, 3, 500)]
        found += [torch.cat([packed_linear(part, packed, bias, 300) for part in cut]) for cut in cuts]
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.randn(4, 9)}, "input has 9 columns but the weight has 8"),
        ({"input": torch.randn(4, 8).double()}, "input must be a float32 matrix"),
        ({"input": torch.randn(8)}, "input must be a float32 matrix"),
        ({"input": torch.randn(8, 4).t()}, r"input has strides \(1, 4\)"),
        ({"bias": torch.randn(4)}, "bias must be 20 contiguous float32"),
        ({"packed": torch.randn(20, 8)}, r"weight of 20 rows, got sizes \(20, 8\)"),
        ({"outputs": 40}, r"weight of 40 rows, got sizes \(2, 8, 16\)"),
    ],
)
def test_errors_name_the_argument(core, change: dict[str, object], message: str) -> None:
    given = {"input": torch.randn(4, 8), "packed": torch.randn(2, 8, 16), "bias": torch.randn(20), "outputs": 20}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pyft.packed_linear(**{**given, **change})


def test_a_gradient_is_refused(core) -> None:
    x, packed = torch.randn(2, 8, requires_grad=True), pack_linear(torch.randn(4, 8))
    with pytest.raises(RuntimeError, match="has no gradient"):
        packed_linear(x, packed, None, 4)
    with torch.no_grad():
        assert packed_linear(x, packed, None, 4).shape == (2, 4)


def test_opcheck_and_reference(core) -> None:
    x, weight, bias = layer(9, 20, 18)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.pyft.pack_linear.default, (weight,), test_utils=tests)
    torch.library.opcheck(torch.ops.pyft.packed_linear.default, (x, pack_linear(weight), bias, 18), test_utils=tests)
    check(packed_linear_reference(x, pack_linear_reference(weight), bias, 18), x, weight, bias)
