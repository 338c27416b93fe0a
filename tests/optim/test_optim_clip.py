"""clip_grad_norm_: as torch's, except where torch destroys gradients."""

from __future__ import annotations

import math

import pytest
import torch

from pyft.optim import clip_grad_norm_
from pyft.optim.clip import clip_coefficient


def parameters(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in [(50, 3), (7,), (2, 3, 4, 4), (0,)]]
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(dtype)
    return params


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, float("inf")])
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 5.0, 1e9])
def test_equals_torch(backend: str, norm_type: float, max_norm: float) -> None:
    ours, theirs = parameters(), parameters()
    norm = clip_grad_norm_(ours, max_norm, norm_type)
    # torch's inf-norm raises on an empty tensor.
    want = torch.nn.utils.clip_grad_norm_([p for p in theirs if p.numel()], max_norm, norm_type)
    assert float(norm) == pytest.approx(float(want), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=3e-7, atol=0)


def test_coefficient_is_torch_s_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    norms = 10.0 ** (torch.rand(2000, generator=generator) * 12 - 6)
    limits = 10.0 ** (torch.rand(2000, generator=generator) * 6 - 3)
    for norm, limit in zip(norms.tolist(), limits.tolist(), strict=True):
        want = torch.clamp(limit / (torch.tensor(norm) + 1e-6), max=1.0)
        assert clip_coefficient(norm, limit) == float(want)


def test_single_tensor_no_gradient_and_generator(backend: str) -> None:
    param = parameters()[0]
    before = param.grad.norm()
    assert float(clip_grad_norm_(param, 1.0)) == pytest.approx(float(before))
    assert float(param.grad.norm()) == pytest.approx(1.0, rel=1e-5)
    assert float(clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0)) == 0.0
    assert float(clip_grad_norm_([], 1.0)) == 0.0
    clip_grad_norm_((p for p in parameters()), 1.0)


def test_fp16_gradients_whose_norm_exceeds_65504_survive(backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(9000, dtype=torch.float16))
    param.grad = torch.full((9000,), 1000.0, dtype=torch.float16)
    norm = clip_grad_norm_([param], 1.0)
    assert float(norm) == pytest.approx(1000 * math.sqrt(9000), rel=1e-6)
    assert float(param.grad.float().norm()) == pytest.approx(1.0, rel=1e-2)


def test_bf16_norm_is_not_rounded_to_bf16(backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(1001, dtype=torch.bfloat16))
    param.grad = torch.ones(1001, dtype=torch.bfloat16)
    assert float(clip_grad_norm_([param], 1e9)) == pytest.approx(math.sqrt(1001), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_one_bad_gradient_does_not_spoil_the_others(backend: str, bad: float, norm_type: float) -> None:
    params = parameters()
    params[1].grad[3] = bad
    before = [p.grad.clone() for p in params]
    norm = clip_grad_norm_(params, 1.0, norm_type)
    assert not math.isfinite(float(norm))
    for param, grad in zip(params, before, strict=True):
        assert torch.equal(param.grad.nan_to_num(7.0), grad.nan_to_num(7.0))
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)


def test_large_finite_gradients_are_clipped_not_zeroed(backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.full((4,), 2e38)
    clip_grad_norm_([param], 1.0)
    torch.testing.assert_close(param.grad, torch.full((4,), 0.5), rtol=1e-5, atol=0)


def test_non_contiguous_gradients(backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(30, 20))
    whole = torch.randn(20, 60)
    param.grad = whole[:, ::2].t()
    want = param.grad.clone()
    norm = clip_grad_norm_([param], 0.5)
    torch.testing.assert_close(param.grad, want * (0.5 / (float(norm) + 1e-6)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1.0,), "max_norm must be 0 or more"), ((float("nan"),), "max_norm"), ((1.0, 0.0), "norm_type must be above 0")],
)
def test_bad_arguments(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip_grad_norm_(parameters(), *arguments)


def test_sparse_gradient_is_refused_by_name() -> None:
    param = torch.nn.Parameter(torch.zeros(3, 2))
    param.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        clip_grad_norm_([param], 1.0)
