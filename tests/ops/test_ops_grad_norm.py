"""grad_norm: against exact sums in float64, on every CPU target, at awkward sizes and layouts."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyft.ops.grad_norm import core_takes, grad_norm, grad_norm_reference, runs_on_core

_spec = importlib.util.spec_from_file_location(
    "clip_float64", Path(__file__).resolve().parents[1] / "reference" / "clip_float64.py"
)
assert _spec is not None
assert _spec.loader is not None
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

SIZES = [0, 1, 7, 8, 9, 15, 31, 32, 33, 63, 64, 65, 255, 256, 257, 8191, 16383, 16384, 16385, 65537]
LONG = 655_357  # a prime beyond kLongTensor: the last of its chunks has an odd length
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ORDERS = [1.0, 2.0, 3.0, 0.5, 7.25, math.inf]
# The sum of a chunk is right to a few roundings of float64, the result is rounded once to fp32.
HALF_ULP = 2.0**-24 * 1.0001


def wide(tensor: torch.Tensor) -> np.ndarray:
    bits = {torch.bfloat16: (8, 7), torch.float16: (5, 10)}.get(tensor.dtype)
    if bits is None:
        return tensor.detach().double().numpy()
    return oracle.from_bits(tensor.detach().contiguous().view(torch.int16).numpy().view(np.uint16), *bits)


def norm_float64(tensors: list[torch.Tensor], p: float = 2.0) -> float:
    return oracle.total_norm([wide(t) for t in tensors], p)


def bits(norm: torch.Tensor) -> int:
    return norm.view(torch.int32).item()


def random_tensor(size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(size)) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", ORDERS)
def test_equals_float64_at_every_tail(cpu_target: str, p: float, dtype: torch.dtype) -> None:
    for size in SIZES:
        x = random_tensor(size, dtype)
        assert float(grad_norm([x], p)) == pytest.approx(norm_float64([x], p), rel=HALF_ULP, abs=0), size


@pytest.mark.parametrize("p", ORDERS)
def test_reference_equals_float64_at_every_tail(backend: str, p: float) -> None:
    for size, dtype in itertools.product(SIZES[::3], [*DTYPES, torch.float64]):
        x = random_tensor(size, dtype)
        rel = 1e-14 if dtype == torch.float64 else HALF_ULP
        assert float(grad_norm([x], p)) == pytest.approx(norm_float64([x], p), rel=rel, abs=0), (size, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_long_chunks(cpu_target: str, p: float, dtype: torch.dtype) -> None:
    x = random_tensor(LONG, dtype)
    assert float(grad_norm([x], p)) == pytest.approx(norm_float64([x], p), rel=HALF_ULP, abs=0)
    # Where a chunk begins or ends, one element must count once.
    for place in (0, 131_071, 131_072, LONG - 1):
        y = torch.zeros(LONG, dtype=dtype)
        y[place] = -3.0
        assert float(grad_norm([y], p)) == 3.0


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, math.inf])
def test_view_at_odd_offset_reads_nothing_around_it(cpu_target: str, p: float) -> None:
    for offset, dtype in itertools.product((1, 3, 7), DTYPES):
        whole = torch.full((200,), float("nan"), dtype=dtype)
        view = whole[offset : offset + 101]
        view.copy_(torch.arange(101.0))
        assert float(grad_norm([view], p)) == pytest.approx(norm_float64([view], p), rel=HALF_ULP)


def test_every_fp16_number_is_read_right(cpu_target: str) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = wide(numbers)
    finite = numbers[torch.from_numpy(np.isfinite(values))]
    assert len(finite) == 2 * 31 * 1024
    for p in (1.0, 2.0, math.inf):
        assert float(grad_norm([finite], p)) == pytest.approx(norm_float64([finite], p), rel=HALF_ULP)
    # One at a time: each in a place of its own row of zeros.
    for k in range(0, 2**16, 97):
        got = float(grad_norm([numbers[k : k + 1]]))
        want = float(np.float32(abs(values[k])))
        assert (math.isnan(got) and math.isnan(want)) or got == want, hex(k)


@pytest.mark.parametrize("p", ORDERS)
def test_same_bits_for_any_thread_count_target_and_order(core, one_thread_then_two: list[int], p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 1000, 40_000, 7, 0, 64, 16_385, LONG if p in (1.0, 2.0, math.inf) else 90_001]
    tensors = [
        (torch.randn(n, generator=generator) * 10.0 ** (i - 3)).to(DTYPES[i % 3] if i < 5 else torch.float32)
        for i, n in enumerate(sizes)
    ]
    found = set()
    for target in core.build_info()["cpu_targets"]:
        core.set_cpu_target(target)
        for threads in one_thread_then_two:
            torch.set_num_threads(threads)
            shuffled = random.Random(threads).sample(tensors, len(tensors))
            found |= {bits(grad_norm(tensors, p)), bits(grad_norm(shuffled, p))}
    core.set_cpu_target("auto")
    assert len(found) == 1


def test_other_tensors_do_not_change_the_sum_of_one(core) -> None:
    """The cut into chunks depends on a tensor alone: zeros beside it change no bit."""
    x = random_tensor(40_001)
    want = bits(grad_norm([x]))
    for others in ([torch.zeros(LONG)], [torch.zeros(3)] * 50):
        assert bits(grad_norm([x, *others])) == want
        assert bits(grad_norm([*others, x])) == want


def test_reference_has_same_bits_for_any_thread_count_and_order(one_thread_then_two: list[int]) -> None:
    tensors = [random_tensor(n, torch.float64) for n in (3, 300_001, 77, 2_000_003)]
    tensors.append(random_tensor(50_000).double())
    found = set()
    for threads, p in itertools.product(one_thread_then_two, (1.0, 2.0)):
        torch.set_num_threads(threads)
        shuffled = random.Random(threads).sample(tensors, len(tensors))
        found |= {float(grad_norm_reference(tensors, p)), float(grad_norm_reference(shuffled, p))}
    assert len(found) == 2


@pytest.mark.parametrize("p", ORDERS)
def test_no_overflow_or_underflow_on_the_way(backend: str, p: float) -> None:
    for size, value in ((1000, 1e30), (3, 3e38), (4, 1e-30), (2, 1e-45)):
        x = torch.full((size,), value)
        want = norm_float64([x], p)
        if want < torch.finfo(torch.float32).max:
            assert float(grad_norm([x], p)) == pytest.approx(want, rel=HALF_ULP, abs=1e-45)
        else:
            assert float(grad_norm([x], p)) == math.inf
    y = torch.full((100,), 1e200, dtype=torch.float64)
    assert float(grad_norm([y], p)) == pytest.approx(norm_float64([y], p), rel=1e-13)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("p", ORDERS)
def test_nonfinite_is_seen_wherever_it_is(backend: str, p: float, dtype: torch.dtype) -> None:
    for bad, place, size in itertools.product((math.nan, math.inf, -math.inf), (0, 500, -1), (501, 1000)):
        x = torch.ones(size, dtype=dtype)
        x[place] = bad
        norm = float(grad_norm([torch.ones(5, dtype=dtype), x], p))
        assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    both = torch.ones(100, dtype=dtype)
    both[3], both[97] = math.inf, math.nan
    assert math.isnan(float(grad_norm([both], p)))
    assert math.isnan(float(grad_norm([both[:50], both[50:]], p)))


@pytest.mark.parametrize("p", ORDERS)
def test_nothing_and_empty_have_norm_zero(backend: str, p: float) -> None:
    assert float(grad_norm([], p)) == 0.0
    assert float(grad_norm([torch.empty(0), torch.empty(3, 0), torch.empty(0, dtype=torch.float16)], p)) == 0.0
    assert float(grad_norm([torch.zeros(70)], p)) == 0.0
    assert float(grad_norm([torch.empty(0), torch.full((1,), -2.0)], p)) == 2.0


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.t(),
        lambda x: x[::2, ::3],
        lambda x: x[:, :1].expand(-1, 7),
        lambda x: x.reshape(2, 4, 5, 5).to(memory_format=torch.channels_last),
        lambda x: x[3, 4],
        lambda x: x[None, :, None],
    ],
    ids=["transposed", "strided", "expanded", "channels_last", "scalar", "ones"],
)
def test_any_layout(backend: str, make, dtype: torch.dtype) -> None:
    x = make(torch.randn(20, 10, generator=torch.Generator().manual_seed(3)).to(dtype))
    for p in (2.0, 1.0, 3.0, math.inf):
        assert float(grad_norm([x], p)) == pytest.approx(norm_float64([x], p), rel=HALF_ULP)


def test_what_the_core_takes() -> None:
    x = torch.zeros(4, 6)
    assert all(core_takes(t) for t in (x, x.t(), x.half(), x.bfloat16(), torch.zeros(()), torch.zeros(0, 3)))
    others = [x[:, ::2], x.double(), x.to_sparse(), x.to("meta"), x.int(), x[:1].expand(4, 6), x.to_mkldnn()]
    assert not any(core_takes(t) for t in others)
    assert runs_on_core(x)
    assert not runs_on_core(x.half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_result_is_not_rounded_to_a_narrow_dtype(backend: str, dtype: torch.dtype) -> None:
    x = torch.full((9000,), 1000.0, dtype=dtype)
    for p in (1.0, 2.0, 3.0):
        norm = grad_norm([x], p)
        assert float(norm) == pytest.approx(norm_float64([x], p), rel=HALF_ULP)
        assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_mixed_dtypes(backend: str) -> None:
    tensors = [torch.randn(50), torch.randn(50).bfloat16(), torch.randn(50).half()]
    for p, more in itertools.product(ORDERS, ([], [torch.randn(9, dtype=torch.float64)])):
        assert float(grad_norm(tensors + more, p)) == pytest.approx(norm_float64(tensors + more, p), rel=HALF_ULP)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=70), max_size=5),
    p=st.sampled_from(ORDERS),
)
def test_any_numbers(backend: str, numbers: list[list[float]], p: float) -> None:
    tensors = [torch.tensor(row, dtype=torch.float32) for row in numbers]
    want = norm_float64(tensors, p)
    if want < torch.finfo(torch.float32).max:
        assert float(grad_norm(tensors, p)) == pytest.approx(want, rel=HALF_ULP, abs=1e-45)


def test_bad_input_is_refused_by_name(backend: str) -> None:
    with pytest.raises(TypeError, match=r"grads\[1\].*sparse.*to_dense"):
        grad_norm([torch.ones(2), torch.ones(2, 2).to_sparse()])
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match=rf"grads\[0\].*{dtype}"):
            grad_norm([torch.ones(2, dtype=dtype)])
    for p in (0.0, -1.0, math.nan, -math.inf):
        with pytest.raises(ValueError, match="norm_type must be above 0"):
            grad_norm([torch.ones(2)], p)


def test_raw_op_refuses_what_the_core_cannot_take(core) -> None:
    with pytest.raises(RuntimeError, match=r"grads\[0\] must be float32, bfloat16 or float16"):
        torch.ops.pyft.grad_norm([torch.ones(3, dtype=torch.float64)])
    with pytest.raises(RuntimeError, match=r"grads\[1\].*gaps or overlaps"):
        torch.ops.pyft.grad_norm([torch.ones(8), torch.ones(8)[::2]])
    with pytest.raises(RuntimeError, match="norm_type"):
        torch.ops.pyft.grad_norm([torch.ones(8)], -1.0)


def test_gradients_that_require_a_gradient(backend: str) -> None:
    x = torch.ones(4, requires_grad=True)
    norm = grad_norm([x * 2.0])
    assert float(norm) == 4.0
    assert not norm.requires_grad


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_mixed_devices(backend: str) -> None:
    tensors = [torch.randn(50), torch.randn(50, device="cuda"), torch.randn(70).half()]
    for p in ORDERS:
        for order in (tensors, tensors[1:] + tensors[:1]):
            norm = grad_norm(order, p)
            assert norm.device == order[0].device
            assert float(norm) == pytest.approx(norm_float64([t.cpu() for t in tensors], p), rel=HALF_ULP)


OPCHECK = (
    "import math, torch, pyft.ops.grad_norm\n"
    "for tensors in ([torch.randn(5), torch.randn(3, 2)], [torch.randn(5).half(), torch.randn(9).bfloat16()]):\n"
    "    for arguments in ((tensors,), (tensors, 1.0), (tensors, 3.0), (tensors, math.inf)):\n"
    "        torch.library.opcheck(torch.ops.pyft.grad_norm.default, arguments)\n"
)


def test_opcheck_with_core(core) -> None:
    exec(OPCHECK, {})


def test_opcheck_without_core() -> None:
    """In a process of its own, since a loaded core stays loaded."""
    environment = {**os.environ, "PYFT_CORE": "off"}
    done = subprocess.run([sys.executable, "-c", OPCHECK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("p", [2.0, 3.0])
def test_compile_sees_no_graph_break(backend: str, compiler: str, p: float) -> None:
    tensors = [torch.randn(10), torch.randn(3, 4), torch.randn(6).half(), torch.randn(4, 4)[:, ::2]]
    compiled = torch.compile(lambda ts: grad_norm(ts, p) * 2, fullgraph=True, backend=compiler)
    assert float(compiled(tensors)) == pytest.approx(2 * norm_float64(tensors, p), rel=1e-6)
