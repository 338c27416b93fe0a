"""GELU and its gradient against the error function in float64, on every CPU target."""

from __future__ import annotations

import math

import pytest
import torch

from pyft.ops.gelu import gelu, gelu_backward

INVERSE_ROOT = 1.0 / math.sqrt(2.0 * math.pi)


def exact(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and slope in float64."""
    x = x.double()
    phi = 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
    return x * phi, phi + x * torch.exp(-x * x / 2.0) * INVERSE_ROOT


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16383, 16384, 16385, 100_003])
def test_sizes(cpu_target: str, size: int) -> None:
    x = 3.0 * torch.randn(size + 3, generator=torch.Generator().manual_seed(size))[3:]
    grad = torch.randn(size, generator=torch.Generator().manual_seed(1))
    value, slope = exact(x)
    assert ((gelu(x) - value).abs() <= 5e-7 * x.abs().double()).all()
    assert ((gelu_backward(grad, x) - grad.double() * slope).abs() <= 5e-7 * grad.abs().double()).all()


def test_every_number_from_small_to_large(cpu_target: str) -> None:
    """Both signs of all powers of two and what lies between: nothing jumps where the polynomials end."""
    steps = torch.linspace(1.0, 2.0, 129)[:-1]
    x = torch.cat([steps * 2.0**power for power in range(-60, 40)])
    x = torch.cat([x, -x])
    value, slope = exact(x)
    assert ((gelu(x) - value).abs() <= 5e-7 * x.abs().double()).all()
    assert ((gelu_backward(torch.ones_like(x), x) - slope).abs() <= 5e-7).all()


def test_what_is_not_finite_is_as_in_torch(cpu_target: str) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 3e38, -3e38] * 3)
    want = torch.nn.functional.gelu(x)
    found = gelu(x)
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found.nan_to_num(), want.nan_to_num())
    slopes = gelu_backward(torch.ones_like(x), x)
    assert torch.equal(slopes[3:7], torch.tensor([0.5, 0.5, 1.0, 0.0]))
    assert slopes[0].isnan()


def test_every_target_gives_the_same_bits(core) -> None:
    x = 3.0 * torch.randn(70_000)
    found = []
    for target in ("baseline", "auto"):
        core.set_cpu_target(target)
        found += [gelu(x), gelu_backward(x, x)]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_other_layouts_and_errors(core) -> None:
    x = torch.randn(40, 30)
    assert torch.equal(gelu(x.t()), gelu(x).t())
    with pytest.raises(RuntimeError, match="input must be contiguous float32"):
        torch.ops.pyft.gelu(x.double())
    with pytest.raises(RuntimeError, match=r"grad has sizes \(40,\) but input has \(40, 30\)"):
        torch.ops.pyft.gelu_backward(x[:, 0].contiguous(), x)


def test_opcheck(core) -> None:
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.pyft.gelu.default, (torch.randn(5, 3),), test_utils=tests)
    torch.library.opcheck(torch.ops.pyft.gelu_backward.default, (torch.randn(5), torch.randn(5)), test_utils=tests)
