"""Bit masks of activations: the same bits as torch's own backward on every CPU target, at awkward sizes and layouts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyft.ops import bit_masks as ops

SIZES = [0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 2047, 2049, 16383, 16385]
LONG = 655_357  # a prime beyond kLongTensor
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1e-45, -1e-45, 6.0, -1.0, 1.0]


def awkward(size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers with special ones among them."""
    generator = torch.Generator().manual_seed(seed + size)
    x = torch.randn(size, generator=generator)
    places = torch.randint(0, max(size, 1), (min(size, 40),), generator=generator)
    x[places] = torch.tensor(SPECIAL * 4)[: len(places)]
    return x.to(dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal down to the sign of zero and the payload of NaN."""
    kind = {4: torch.int32, 2: torch.int16, 8: torch.int64}[one.element_size()]
    return one.shape == other.shape and torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


def packed(mask: torch.Tensor) -> torch.Tensor:
    """The bits of a contiguous bool tensor, by NumPy."""
    return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, LONG])
def test_relu_and_its_gradient_are_torchs(cpu_target: str, size: int, dtype: torch.dtype) -> None:
    x, grad = awkward(size, dtype), awkward(size, dtype, seed=1)
    y, bits = ops.relu_bits(x)
    assert same_bits(y, torch.relu(x))
    assert bits.numel() == (size + 7) // 8
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(torch.relu(leaf), leaf, grad)
    assert same_bits(ops.mask_by_bits(grad, bits), want)
    written = x.clone()
    assert torch.equal(ops.relu_bits_(written), bits)
    assert same_bits(written, y)


@pytest.mark.parametrize("size", [0, 5, 64, 20_001])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_reference_and_core_agree(core, size: int, dtype: torch.dtype) -> None:
    x, grad = awkward(size, dtype), awkward(size, dtype, seed=1)
    for test in (ops.RELU, ops.POSITIVE, ops.INSIDE, ops.NOT_OUTSIDE):
        bits = ops.pack_bits(x, test, -1.0, 1.0)
        assert torch.equal(bits, ops.pack_bits_reference(x, test, -1.0, 1.0))
        for off in (0.0, 0.1):
            assert equal(ops.mask_by_bits(grad, bits, off), ops.mask_by_bits_reference(grad, bits, off))
        assert equal(ops.scale_by_bits(grad, bits, 1.25), ops.scale_by_bits_reference(grad, bits, 1.25))
    assert same_bits(ops.relu_bits(x)[0], ops.relu_bits_reference(x)[0])
    assert torch.equal(ops.relu_bits(x)[1], ops.relu_bits_reference(x)[1])


@pytest.mark.parametrize("size", [*SIZES, 2048, 6144, LONG])
@pytest.mark.parametrize("offset", [0, 3])
def test_bools_are_packed_as_numpy_packs_them(cpu_target: str, size: int, offset: int) -> None:
    generator = torch.Generator().manual_seed(size)
    mask = torch.rand(size + offset, generator=generator)[offset:] < 0.3
    mask = torch.zeros(size + offset, dtype=torch.bool)[offset:].copy_(mask)
    assert torch.equal(ops.pack_bools(mask), packed(mask))
    assert torch.equal(ops.pack_bools_reference(mask), packed(mask))


def test_any_byte_but_0_is_true_and_the_order_is_that_of_memory(cpu_target: str) -> None:
    # torch's own kernels give bytes of 0 and 1; others may not.
    bytes_ = torch.arange(4096, dtype=torch.int64).remainder(256).to(torch.uint8)
    assert torch.equal(ops.pack_bools(bytes_.view(torch.bool)), packed(bytes_ != 0))
    image = (torch.rand(2, 5, 7, 9) < 0.5).contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.pack_bools(image), packed(image.permute(0, 2, 3, 1).contiguous()))


@pytest.mark.parametrize("shape", [(2, 3), (1, 1, 1, 1), (3, 5, 7, 3), (2, 64, 9, 9), (4, 130, 3), (2, 17, 40, 41)])
@pytest.mark.parametrize("last", [False, True])
def test_affine_relu_is_scale_shift_and_relu(cpu_target: str, shape: tuple[int, ...], last: bool) -> None:
    x = awkward(math.prod(shape), torch.float32).view(shape)
    if last:
        if x.ndim != 4:
            pytest.skip("channels last is for four dimensions")
        x = x.contiguous(memory_format=torch.channels_last)
    scale, shift = torch.randn(shape[1]), torch.randn(shape[1])
    y, bits = ops.affine_relu_bits(x, scale, shift)
    want, want_bits = ops.affine_relu_bits_reference(x, scale, shift)
    assert equal(y, want)
    assert y.stride() == x.stride()
    assert torch.equal(bits, want_bits)
    grad = torch.empty_like(x).copy_(awkward(x.numel(), torch.float32, seed=1).view(shape))
    assert equal(ops.mask_channels(grad, bits, scale), ops.mask_channels_reference(grad, bits, scale))


def test_views_at_odd_offsets_write_nothing_beside(cpu_target: str) -> None:
    whole = torch.full((1000,), 77.0)
    part = whole[3:990]
    part.copy_(awkward(987, torch.float32))
    want = torch.relu(part)
    ops.relu_bits_(part)
    assert same_bits(part, want)
    assert (whole[:3] == 77).all()
    assert (whole[990:] == 77).all()


def test_layouts_with_gaps_are_copied_or_refused() -> None:
    x = awkward(60, torch.float32).view(6, 10)[:, ::2]
    y, bits = ops.relu_bits(x)
    assert same_bits(y, torch.relu(x))
    assert torch.equal(ops.unpack_bits(bits, y), ~(y <= 0))
    with pytest.raises(ValueError, match="with gaps or overlaps"):
        ops.relu_bits_(x)
    turned = awkward(60, torch.float32).view(6, 10).t()
    y, bits = ops.relu_bits(turned)
    assert y.stride() == turned.stride()
    assert torch.equal(ops.unpack_bits(bits, y), ~(y <= 0))


def test_threads_change_nothing(core, one_thread_then_two: list[int]) -> None:
    x = awkward(LONG, torch.float32)
    found = []
    for threads in one_thread_then_two:
        torch.set_num_threads(threads)
        found.append(ops.relu_bits(x))
    assert all(same_bits(y, found[0][0]) and torch.equal(bits, found[0][1]) for y, bits in found)


def test_wrong_bits_are_refused(core) -> None:
    with pytest.raises(RuntimeError, match="bits must be 2 contiguous uint8"):
        torch.ops.pyft.mask_by_bits(torch.zeros(9), torch.zeros(1, dtype=torch.uint8), 0.0)
    for wrong in (torch.zeros(9), torch.zeros(4, 6, dtype=torch.bool)[:, ::2]):
        with pytest.raises(RuntimeError, match="x must be bool without gaps in memory"):
            torch.ops.pyft.pack_bools(wrong)
    with pytest.raises(RuntimeError, match="scale must be 3"):
        torch.ops.pyft.affine_relu_bits(torch.zeros(2, 3), torch.zeros(2), torch.zeros(3))


def test_opcheck(backend: str) -> None:
    x, bits = torch.randn(4, 3, 5, 5), torch.zeros(38, dtype=torch.uint8)
    scale = torch.rand(3)
    calls = {
        "relu_bits": (x,),
        "relu_bits_": (x.clone(),),
        "pack_bits": (x, 2, -1.0, 1.0),
        "pack_bools": (x > 0,),
        "mask_by_bits": (x, bits, 0.1),
        "scale_by_bits": (x, bits, 1.5),
        "affine_relu_bits": (x, scale, scale),
        "mask_channels": (x, bits, scale),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.pyft, name).default, arguments)


def test_inside_is_hardtanhs_gradient(cpu_target: str) -> None:
    x, grad = awkward(4992, torch.float32), torch.ones(4992)  # whole vectors: torch's scalar tail lets NaN through
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(F.hardtanh(leaf, -1.0, 1.0), leaf, grad)
    assert same_bits(ops.mask_by_bits(grad, ops.pack_bits(x, ops.INSIDE, -1.0, 1.0)), want)
    # As on CUDA, where NaN lets it through.
    want = torch.where(x.isnan(), grad, want)
    assert same_bits(ops.mask_by_bits(grad, ops.pack_bits(x, ops.NOT_OUTSIDE, -1.0, 1.0)), want)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 33, 1023, LONG])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_gpu_gives_the_bits_of_the_cpu(core, size: int, dtype: torch.dtype, offset: int) -> None:
    x = awkward(size + offset, dtype)[offset:]
    on_gpu = awkward(size + offset, dtype).cuda()[offset:]
    y, bits = ops.relu_bits(x)
    got, got_bits = ops.relu_bits(on_gpu)
    assert same_bits(got.cpu(), y)
    assert torch.equal(got_bits.cpu(), bits)
    leaf = on_gpu.clone().requires_grad_()
    (want,) = torch.autograd.grad(F.hardtanh(leaf, -1.0, 1.0), leaf, on_gpu)
    assert equal(ops.mask_by_bits(on_gpu, ops.pack_bits(on_gpu, ops.NOT_OUTSIDE, -1.0, 1.0)), want)
    for test in (ops.POSITIVE, ops.INSIDE, ops.NOT_OUTSIDE):
        assert torch.equal(ops.pack_bits(on_gpu, test, -1.0, 1.0).cpu(), ops.pack_bits(x, test, -1.0, 1.0))
    for off in (0.0, 0.1):
        assert equal(ops.mask_by_bits(on_gpu, got_bits, off).cpu(), ops.mask_by_bits(x, bits, off))
    assert equal(ops.scale_by_bits(on_gpu, got_bits, 1.25).cpu(), ops.scale_by_bits(x, bits, 1.25))
    assert torch.equal(ops.pack_bools(on_gpu > 0).cpu(), packed(x > 0))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_channels_on_a_gpu(core, format: torch.memory_format) -> None:
    x = awkward(2 * 17 * 40 * 41, torch.float32).view(2, 17, 40, 41).contiguous(memory_format=format)
    scale, shift = torch.randn(17), torch.randn(17)
    y, bits = ops.affine_relu_bits(x, scale, shift)
    got, got_bits = ops.affine_relu_bits(x.cuda(), scale.cuda(), shift.cuda())
    assert equal(got.cpu(), y)
    assert torch.equal(got_bits.cpu(), bits)
    assert equal(ops.mask_channels(x.cuda(), got_bits, scale.cuda()).cpu(), ops.mask_channels(x, bits, scale))
