"""Max pooling with one byte for each output: torch's bits, forward and backward, for any window."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyft.ops import max_pool
from pyft.ops.max_pool import max_pool_backward, max_pool_offsets


def check(x: torch.Tensor, window: tuple[int, ...], ceil: bool) -> None:
    """Output and gradient as torch's, bit for bit."""
    kernel, stride, padding, dilation = window[:2], window[2:4], window[4:6], window[6:]
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    want = F.max_pool2d(leaf, kernel, stride, padding, dilation, ceil)
    grad = torch.empty_like(want).copy_(torch.randn(want.shape))
    (want_dx,) = torch.autograd.grad(want, leaf, grad)
    y, at = max_pool_offsets(x, window, ceil)
    last = not y.is_contiguous()
    assert y.shape == want.shape
    assert y.stride() == want.stride()
    assert torch.allclose(y, want, rtol=0, atol=0, equal_nan=True)
    dx = max_pool_backward(grad, at, x.shape, window, last)
    assert torch.equal(dx, want_dx)


@st.composite
def pools(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    numbers = {"kernel": [], "stride": [], "padding": [], "dilation": []}
    sizes = []
    for _ in range(2):
        kernel = draw(st.integers(1, 5))
        dilation = draw(st.integers(1, 3))
        padding = draw(st.integers(0, kernel // 2))
        numbers["kernel"].append(kernel)
        numbers["stride"].append(draw(st.integers(1, 4)))
        numbers["padding"].append(padding)
        numbers["dilation"].append(dilation)
        # A window with all its places in the padding makes torch write out of bounds.
        sizes.append(draw(st.integers(dilation * kernel, 16)))
    window = tuple(n for pair in numbers.values() for n in pair)
    return (draw(st.integers(1, 3)), draw(st.integers(1, 4)), *sizes), window, draw(st.booleans())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=pools(), last=st.booleans(), seed=st.integers(0, 1000), levels=st.sampled_from([3, 1000]))
def test_any_window_is_torchs(backend: str, case, last: bool, seed: int, levels: int) -> None:
    shape, window, ceil = case
    # Few levels: many equal values in one window.
    x = torch.randint(-levels, levels, shape, generator=torch.Generator().manual_seed(seed)).float()
    check(x.contiguous(memory_format=torch.channels_last) if last else x, window, ceil)


@pytest.mark.parametrize("last", [False, True])
def test_nan_and_infinities(backend: str, last: bool) -> None:
    x = torch.randn(2, 3, 9, 9)
    flat = x.view(-1)
    flat[::5] = math.nan
    flat[1::7] = -math.inf
    flat[2::11] = math.inf
    x[0, 0] = -math.inf
    x[1, 1] = math.nan
    check(x.contiguous(memory_format=torch.channels_last) if last else x, (3, 3, 2, 2, 1, 1, 1, 1), False)
    check(x.contiguous(memory_format=torch.channels_last) if last else x, (3, 3, 1, 1, 1, 1, 2, 2), True)


@pytest.mark.parametrize("last", [False, True])
def test_every_cpu_target_and_a_size_for_threads(cpu_target: str, last: bool) -> None:
    x = torch.randn(4, 19, 65, 63)
    check(x.contiguous(memory_format=torch.channels_last) if last else x, (3, 3, 2, 2, 1, 1, 1, 1), False)


def test_bad_calls_are_refused_and_foreign_offsets_write_nowhere_else(core) -> None:
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(RuntimeError, match="window must be 8 numbers"):
        torch.ops.pyft.max_pool_offsets(x, torch.empty(1, 1, 2, 2), [2, 2])
    with pytest.raises(RuntimeError, match="window 2 has no place inside the input"):
        torch.ops.pyft.max_pool_offsets(x, torch.empty(1, 1, 9, 9), [2, 2, 2, 2, 0, 0, 1, 1])
    with pytest.raises(RuntimeError, match="at most 256"):
        torch.ops.pyft.max_pool_offsets(x, torch.empty(1, 1, 1, 1), [20, 20, 2, 2, 0, 0, 1, 1])
    with pytest.raises(RuntimeError, match="window 0 has no place inside the input of size 2"):
        max_pool_offsets(torch.randn(1, 1, 2, 3), (2, 2, 1, 1, 1, 1, 3, 1))
    at = torch.full((4,), 255, dtype=torch.uint8)
    whole = torch.full((36,), 77.0)
    torch.ops.pyft.max_pool_backward_(
        torch.ones(1, 1, 2, 2), at, whole[10:26].view(1, 1, 4, 4), [2, 2, 2, 2, 0, 0, 1, 1]
    )
    assert (whole[:10] == 77).all()
    assert (whole[26:] == 77).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [(3, 3, 2, 2, 1, 1, 1, 1), (2, 2, 2, 2, 0, 0, 1, 1), (3, 5, 1, 2, 1, 2, 2, 1)])
@pytest.mark.parametrize("channels", [1, 3, 8, 16])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_16_bits_on_cuda_kernels(
    emulation, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: tuple[int, ...], channels: int,
    format: torch.memory_format,
) -> None:  # fmt: skip
    """torch's on CUDA adds up in fp32 and rounds once, so torch's of fp32 is what to compare with."""
    if emulation is None:
        pytest.skip("needs --cuda-emulation=ORDER: the CPU's kernels take fp32 alone")
    monkeypatch.setattr(max_pool, "fits_core", lambda x: True)
    x = (torch.randint(-40, 40, (2, channels, 15, 14)) / 8).contiguous(memory_format=format)
    x[0, 0, 3:6, 3:6] = math.nan
    x[1, 0, :5, :5] = -math.inf
    leaf = x.clone().requires_grad_()
    want = F.max_pool2d(leaf, window[:2], window[2:4], window[4:6], window[6:])
    grad = torch.empty_like(want).copy_(torch.randn(want.shape)).to(dtype)
    (want_dx,) = torch.autograd.grad(want, leaf, grad.float())
    before = emulation.counters()["launches"]
    y, at = max_pool_offsets(x.to(dtype), window)
    dx = max_pool_backward(grad, at, x.shape, window, not y.is_contiguous())
    assert emulation.counters()["launches"] == before + 2
    assert y.dtype == dx.dtype == dtype
    assert torch.allclose(y.float(), want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(dx, want_dx.to(dtype))


def test_16_bits_on_the_cpu_are_torchs(core, emulation) -> None:
    """There torch rounds each sum to 16 bits: the kernels refuse, and the reference serves."""
    x = torch.randint(-40, 40, (2, 3, 15, 14)).bfloat16()
    check(x, (3, 3, 2, 2, 1, 1, 1, 1), False)
    if emulation is None:
        with pytest.raises(RuntimeError, match=r"x must be .* float32 on the CPU"):
            torch.ops.pyft.max_pool_offsets(x, torch.empty(2, 3, 7, 7), [3, 3, 2, 2, 0, 0, 1, 1])
    with pytest.raises(RuntimeError, match=r"dx must be .* float32 on the CPU|of one dtype"):
        torch.ops.pyft.max_pool_backward_(
            torch.ones(1, 1, 2, 2), torch.zeros(4, dtype=torch.uint8), torch.ones(1, 1, 4, 4).bfloat16(),
            [2, 2, 2, 2, 0, 0, 1, 1],
        )  # fmt: skip


def test_opcheck(backend: str) -> None:
    x, y, window = torch.randn(2, 3, 6, 6), torch.empty(2, 3, 3, 3), [2, 2, 2, 2, 0, 0, 1, 1]
    torch.library.opcheck(torch.ops.pyft.max_pool_offsets.default, (x, y, window))
    at = torch.zeros(54, dtype=torch.uint8)
    torch.library.opcheck(
        torch.ops.pyft.max_pool_backward_.default, (torch.randn(2, 3, 3, 3), at, torch.empty_like(x), window)
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("window", [(3, 3, 2, 2, 1, 1, 1, 1), (2, 2, 2, 2, 0, 0, 1, 1), (3, 5, 1, 2, 1, 2, 2, 1)])
@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_a_gpu_gives_the_bits_of_the_cpu(
    core, window: tuple[int, ...], channels: int, format: torch.memory_format
) -> None:
    x = torch.randint(-9, 9, (2, channels, 31, 30)).float().contiguous(memory_format=format)
    last = format is torch.channels_last
    y, at = max_pool_offsets(x, window)
    got, got_at = max_pool_offsets(x.cuda(), window)
    assert torch.equal(got.cpu(), y)
    assert torch.equal(got_at.cpu(), at)
    grad = torch.empty_like(y).copy_(torch.randn(y.shape))
    dx = max_pool_backward(grad, at, x.shape, window, last)
    assert torch.equal(max_pool_backward(grad.cuda(), got_at, x.shape, window, last).cpu(), dx)
    for dtype in (torch.bfloat16, torch.float16):
        leaf = x.cuda().to(dtype).requires_grad_()
        want = F.max_pool2d(leaf, window[:2], window[2:4], window[4:6], window[6:])
        (want_dx,) = torch.autograd.grad(want, leaf, grad.cuda().to(dtype))
        got, got_at = max_pool_offsets(leaf.detach(), window)
        assert torch.equal(got, want)
        assert torch.equal(max_pool_backward(grad.cuda().to(dtype), got_at, x.shape, window, last), want_dx)
