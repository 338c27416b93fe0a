"""scale_grads_, clamp_grads_ and agc_grads_: against float64, on every CPU target, at awkward sizes and layouts."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyft.ops.clip import agc_grads_, clamp_grads_, scale_grads_

_spec = importlib.util.spec_from_file_location(
    "clip_float64", Path(__file__).resolve().parents[1] / "reference" / "clip_float64.py"
)
assert _spec is not None
assert _spec.loader is not None
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

SIZES = [0, 1, 7, 8, 9, 15, 31, 32, 33, 255, 256, 257, 16383, 16384, 16385]
LONG = 655_357  # a prime beyond kLongTensor
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place, relative, and the smallest step of subnormal numbers.
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
SUBNORMAL = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float64: 0.0}
SENTINEL = 77.0
CHANGES: dict[str, Callable[[list[torch.Tensor]], None]] = {
    "scale": lambda grads: scale_grads_(grads, torch.tensor(0.3)),
    "clamp": lambda grads: clamp_grads_(grads, 0.3),
    "agc": lambda grads: agc_grads_(grads, [torch.full_like(grad, 0.5) for grad in grads], 0.1),
}


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64, copy=True).numpy()


def assert_rounded_once(got: torch.Tensor, want: np.ndarray, roundings: float = 1.02) -> None:
    """Within half a unit of the exact value, and one rounding of fp32 on the way to a narrower dtype."""
    bound = roundings * HALF_ULP[got.dtype] * np.abs(want) + SUBNORMAL[got.dtype]
    error = np.abs(wide(got) - want)
    assert np.all(error <= bound), f"largest error {error.max()}"


def within_sentinels(tensor: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of `tensor` (n,) as a view into a larger one, and the larger one."""
    whole = torch.full((tensor.numel() + offset + 9,), SENTINEL, dtype=tensor.dtype)
    view = whole[offset : offset + tensor.numel()]
    view.copy_(tensor)
    return view, whole


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_at_every_tail_and_offset(cpu_target: str, dtype: torch.dtype) -> None:
    factor = torch.tensor(0.37)
    for size, offset in itertools.product([*SIZES, LONG], (0, 1, 3)):
        x = random_tensor(size, dtype=dtype)
        view, whole = within_sentinels(x, offset)
        scale_grads_([view], factor)
        # The product in fp32, rounded: the same bits, not only close.
        assert torch.equal(view, (x.float() * factor).to(dtype)), (size, offset)
        assert_rounded_once(view, wide(x) * float(factor))
        assert (whole[:offset] == SENTINEL).all()
        assert (whole[offset + size :] == SENTINEL).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamp_at_every_tail_and_offset(cpu_target: str, dtype: torch.dtype) -> None:
    for size, offset in itertools.product([*SIZES, LONG], (0, 1, 3)):
        x = random_tensor(size, dtype=dtype)
        view, whole = within_sentinels(x, offset)
        clamp_grads_([view], 0.37)
        assert_rounded_once(view, oracle.clamped(wide(x), 0.37))
        inside = x.abs() < 0.36
        assert torch.equal(view[inside], x[inside])
        assert (whole[:offset] == SENTINEL).all()
        assert (whole[offset + size :] == SENTINEL).all()


AGC_SHAPES = [
    (),
    (1,),
    (33,),
    (16_385,),
    (0,),
    (0, 3),
    (3, 0),
    (1, 9),
    (7, 1),
    (31, 33),
    (3, 257),
    (20_000, 1),
    (5, 16_384),
    (3, 16_385),
    (2, 3, 131_073),
    (9, 2, 3, 3),
    (LONG,),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", AGC_SHAPES, ids=str)
def test_agc_at_every_shape(cpu_target: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grad, param = random_tensor(*shape, dtype=dtype, seed=1), random_tensor(*shape, seed=2)
    # Some rows are above the limit, some below it, some weights below eps.
    if len(shape) > 1 and shape[0] > 2:
        grad[::2] *= 1e-6
        param[1] = 0.0
    view, whole = within_sentinels(grad.reshape(-1), 3)
    view = view.view(shape)
    agc_grads_([view], [param], clipping=0.1, eps=0.01)
    assert_rounded_once(view, oracle.agc(wide(grad), wide(param), 0.1, 0.01), roundings=2.02)
    assert (whole[:3] == SENTINEL).all()
    assert (whole[3 + grad.numel() :] == SENTINEL).all()
    if len(shape) > 1 and shape[0] > 2:
        assert torch.equal(view[::2], grad[::2]), "rows below the limit keep their bits"


@pytest.mark.parametrize("change", CHANGES)
def test_same_bits_for_any_thread_count_and_target(core, one_thread_then_two: list[int], change: str) -> None:
    made = [random_tensor(n, dtype=DTYPES[i % 3]) for i, n in enumerate((1, 40_000, 0, 64, 16_385, LONG))]
    made += [random_tensor(300, 70), random_tensor(4, 20_000, dtype=torch.float16)]
    results = []
    for target, threads in itertools.product(core.build_info()["cpu_targets"], one_thread_then_two):
        core.set_cpu_target(target)
        torch.set_num_threads(threads)
        tensors = [tensor.clone() for tensor in made]
        CHANGES[change](tensors)
        results.append(tensors)
    core.set_cpu_target("auto")
    for tensors in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(tensors, results[0], strict=True))


@pytest.mark.parametrize("change", CHANGES)
def test_core_and_reference_agree_to_the_bit(core, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    made = [random_tensor(*shape, dtype=dtype) for shape in [(500,), (30, 7), ()] for dtype in DTYPES]
    ours, theirs = [t.clone() for t in made], [t.clone() for t in made]
    CHANGES[change](ours)
    monkeypatch.setattr("pyft.core.loader.load_core", lambda: None)
    CHANGES[change](theirs)
    for a, b, before in zip(ours, theirs, made, strict=True):
        assert torch.equal(a, b)
        assert before.numel() == 1 or not torch.equal(a, before)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "view_of",
    [
        lambda x: x.t(),
        lambda x: x[::2, 1::3],
        lambda x: x.view(4, 6, 5, 8).to(memory_format=torch.channels_last),
        lambda x: x.view(4, 6, 5, 8).transpose(0, 3),
        lambda x: x[:, :1],
        lambda x: x[5, 5],
    ],
    ids=["transposed", "gaps", "channels_last", "first_dimension_fast", "column", "scalar"],
)
def test_any_layout(backend: str, change: str, dtype: torch.dtype, view_of) -> None:
    whole = random_tensor(24, 40, dtype=dtype)
    before = whole.clone()
    view = view_of(whole)
    old = wide(view.clone())
    CHANGES[change]([view])
    want = {
        "scale": lambda: old * float(torch.tensor(0.3)),
        "clamp": lambda: oracle.clamped(old, 0.3),
        "agc": lambda: oracle.agc(old, np.full_like(old, 0.5), 0.1, 1e-3),
    }[change]()
    # The oracle's own norms have a few roundings of float64.
    assert_rounded_once(view, want, roundings=16.0 if dtype == torch.float64 else 2.02)
    if view._base is whole:
        # Between the elements of the view nothing has changed.
        view_of(whole).copy_(view_of(before))
        assert torch.equal(whole, before)


def test_agc_with_other_layout_and_dtype_of_the_parameter(backend: str) -> None:
    grad = random_tensor(6, 4, 3, 3, dtype=torch.bfloat16)
    for param in (
        random_tensor(6, 4, 3, 3).to(memory_format=torch.channels_last),
        random_tensor(6, 4, 3, 3, dtype=torch.float64),
        random_tensor(3, 3, 4, 6, dtype=torch.float16).permute(3, 2, 0, 1),
        random_tensor(6, 4, 3, 6)[..., ::2],
    ):
        got = grad.clone()
        agc_grads_([got], [param], 0.05)
        assert_rounded_once(got, oracle.agc(wide(grad), wide(param), 0.05, 1e-3), roundings=2.02)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_nonfinite(backend: str, dtype: torch.dtype) -> None:
    nan, inf = math.nan, math.inf
    x = torch.tensor([nan, inf, -inf, 1.0, 0.0, -0.0], dtype=dtype)
    clamped, scaled = x.clone(), x.clone()
    clamp_grads_([clamped], 0.5)
    scale_grads_([scaled], torch.tensor(0.5))
    torch.testing.assert_close(clamped, torch.tensor([nan, 0.5, -0.5, 0.5, 0, 0], dtype=dtype), equal_nan=True)
    torch.testing.assert_close(scaled, torch.tensor([nan, inf, -inf, 0.5, 0, 0], dtype=dtype), equal_nan=True)
    assert clamped[5].signbit()
    for size in (1, 40, 16_390):
        for place, bad in itertools.product((0, -1), (nan, inf)):
            grad = torch.full((3, size), 2.0, dtype=dtype)
            grad[1, place] = bad
            before = grad.clone()
            agc_grads_([grad], [torch.ones(3, size, dtype=dtype)], 0.01)
            torch.testing.assert_close(grad[1], before[1], equal_nan=True, rtol=0, atol=0)
            torch.testing.assert_close(grad[[0, 2]], torch.full((2, size), 0.01, dtype=dtype), rtol=0.01, atol=0)
            # A weight that is not finite sets no limit.
            grad, param = torch.full((3, size), 2.0, dtype=dtype), torch.ones(3, size, dtype=dtype)
            param[1, place] = bad
            agc_grads_([grad], [param], 0.01)
            assert (grad[1] == 2.0).all()
            assert (grad[[0, 2]] < 0.1).all()


def test_limits_beyond_the_dtype(backend: str) -> None:
    for dtype, limit in itertools.product([*DTYPES, torch.float64], (1e6, 1e39, math.inf)):
        x = torch.tensor([5.0, math.inf, -3.0], dtype=dtype)
        clamp_grads_([x], limit)
        assert x[0] == 5.0
        assert x[2] == -3.0
        held = limit <= torch.finfo(dtype).max
        assert x[1] == (torch.tensor(limit, dtype=torch.float64).to(dtype) if held else math.inf)
    zero = torch.tensor([5.0, -3.0, math.nan])
    clamp_grads_([zero], 0.0)
    assert zero[:2].abs().sum() == 0.0
    assert zero[2].isnan()


def test_factors_of_any_dtype_and_shape(backend: str) -> None:
    for scale in (
        torch.tensor(0.5),
        torch.tensor([0.5]),
        torch.tensor(0.5, dtype=torch.float64),
        torch.tensor(0.5).half(),
    ):
        grads = [torch.full((3,), 4.0, dtype=dtype) for dtype in [*DTYPES, torch.float64]] + [torch.tensor(4.0)]
        scale_grads_(grads, scale)
        assert all((grad == 2.0).all() and grad.shape in ((3,), ()) for grad in grads)
    # A float64 gradient sees all digits of a float64 factor.
    grad = torch.tensor([3.0], dtype=torch.float64)
    scale_grads_([grad], torch.tensor(0.1, dtype=torch.float64))
    assert float(grad) == 3.0 * 0.1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 5),
    numbers=st.lists(st.floats(-(2.0**50), 2.0**50, width=32), min_size=1, max_size=40),
    clipping=st.sampled_from([0.0, 1e-3, 0.1, 3.0]),
    eps=st.sampled_from([0.0, 1e-3, 10.0]),
)
def test_agc_with_any_numbers(backend: str, rows: int, numbers: list[float], clipping: float, eps: float) -> None:
    grad = torch.tensor([numbers] * rows, dtype=torch.float32)
    grad *= torch.logspace(-3, 2, rows)[:, None]
    param = grad.flip(1) * 0.01
    got = grad.clone()
    agc_grads_([got], [param], clipping, eps)
    want = oracle.agc(wide(grad), wide(param), clipping, eps)
    # A norm within a rounding of the limit may fall on either side: the factor is then 1 up to that rounding.
    assert np.all(np.abs(wide(got) - want) <= 3 * 2.0**-24 * np.abs(want) + 2.0**-149)


@pytest.mark.parametrize("change", CHANGES)
def test_writes_are_seen_by_autograd(backend: str, change: str) -> None:
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    grad = torch.ones(2)
    product = (x * grad).sum()
    untouched = torch.ones(2)
    versions = grad._version, untouched._version
    CHANGES[change]([grad])
    assert grad._version > versions[0]
    assert untouched._version == versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_of_inference_mode_and_of_a_graph(backend: str, change: str) -> None:
    with torch.inference_mode():
        inference = torch.ones(4)
        CHANGES[change]([inference])
        assert (inference < 1).all()
    with_graph = torch.ones(4, requires_grad=True) * 1.0
    CHANGES[change]([with_graph])
    assert (with_graph < 1).all()


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_to_do(backend: str, change: str) -> None:
    CHANGES[change]([])
    CHANGES[change]([torch.empty(0), torch.empty(3, 0), torch.empty(0, 3, dtype=torch.float16)])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.ones(2, 2).to_sparse(), TypeError, r"grads\[1\].*sparse.*to_dense"),
        (lambda: torch.ones(2, dtype=torch.int64), TypeError, r"grads\[1\].*int64"),
        (lambda: torch.ones(2, dtype=torch.complex64), TypeError, r"grads\[1\].*complex64"),
        (lambda: torch.ones(1, 3).expand(4, 3), ValueError, r"grads\[1\].*share memory.*clone"),
    ],
    ids=["sparse", "integer", "complex", "expanded"],
)
def test_bad_gradients_are_refused_and_nothing_is_written(backend: str, change: str, make, error, message) -> None:
    good = torch.ones(3)
    calls = dict(CHANGES, agc=lambda grads: agc_grads_(grads, [torch.ones(3)] * 2, 0.1))
    with pytest.raises(error, match=message):
        calls[change]([good, make()])
    assert (good == 1.0).all()


def test_bad_arguments(backend: str) -> None:
    g = [torch.ones(3)]
    for limit in (-1.0, math.nan):
        with pytest.raises(ValueError, match="limit must be 0 or more"):
            clamp_grads_(g, limit)
        with pytest.raises(ValueError, match="clipping must be 0 or more"):
            agc_grads_(g, g, limit)
        with pytest.raises(ValueError, match="eps must be 0 or more"):
            agc_grads_(g, g, 0.1, limit)
    for scale in (torch.ones(2), torch.tensor(1)):
        with pytest.raises(ValueError, match="scale must be one floating number"):
            scale_grads_(g, scale)
    with pytest.raises(ValueError, match="grads has 1 tensors but params has 0"):
        agc_grads_(g, [])
    with pytest.raises(ValueError, match=r"params\[0\] must have the shape of grads\[0\] \(3,\), got \(1, 3\)"):
        agc_grads_(g, [torch.ones(1, 3)])
    with pytest.raises(TypeError, match=r"params\[0\].*sparse"):
        agc_grads_(g, [torch.ones(3).to_sparse()])
    assert (g[0] == 1.0).all()


def test_raw_ops_refuse_what_the_core_cannot_take(core) -> None:
    ops, ones = torch.ops.pyft, torch.ones
    one = torch.tensor(0.5)
    for call in (
        lambda g: ops.scale_grads_([g], one),
        lambda g: ops.clamp_grads_([g], 0.5),
        lambda g: ops.agc_grads_([g], [ones(4, 4)], 0.1, 1e-3),
    ):
        with pytest.raises(RuntimeError, match=r"grads\[0\] must be float32, bfloat16 or float16"):
            call(ones(4, 4, dtype=torch.float64))
        with pytest.raises(RuntimeError, match=r"grads\[0\].*gaps or overlaps"):
            call(ones(4, 8)[:, ::2])
    with pytest.raises(RuntimeError, match=r"grads\[0\].*rows are not contiguous"):
        ops.agc_grads_([ones(4, 4).t()], [ones(4, 4)], 0.1, 1e-3)
    with pytest.raises(RuntimeError, match=r"grads\[0\] has sizes \(4,\) but params\[0\] has sizes \(2, 2\)"):
        ops.agc_grads_([ones(4)], [ones(2, 2)], 0.1, 1e-3)
    with pytest.raises(RuntimeError, match="grads has 1 tensors but params has 0"):
        ops.agc_grads_([ones(4)], [], 0.1, 1e-3)
    with pytest.raises(RuntimeError, match="scale must be one float32"):
        ops.scale_grads_([ones(4)], ones(2))
    with pytest.raises(RuntimeError, match="limit"):
        ops.clamp_grads_([ones(4)], -1.0)


OPCHECK = (
    "import torch, pyft.ops.clip\n"
    "ops, check = torch.ops.pyft, torch.library.opcheck\n"
    "make = lambda: [torch.randn(40), torch.randn(3, 5).half(), torch.randn(2, 3, 4).bfloat16()]\n"
    "check(ops.scale_grads_.default, (make(), torch.tensor(0.5)))\n"
    "check(ops.clamp_grads_.default, (make(), 0.5))\n"
    "check(ops.agc_grads_.default, (make(), make(), 0.1, 1e-3))\n"
)


def test_opcheck_with_core(core) -> None:
    exec(OPCHECK, {})


def test_opcheck_without_core() -> None:
    """In a process of its own, since a loaded core stays loaded."""
    environment = {**os.environ, "PYFT_CORE": "off"}
    done = subprocess.run([sys.executable, "-c", OPCHECK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("change", CHANGES)
def test_compile_sees_no_graph_break(backend: str, change: str, compiler: str) -> None:
    def step(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        CHANGES[change]([a, b])
        return a * 2.0

    made = [random_tensor(8, 4), random_tensor(33, dtype=torch.bfloat16)]
    ours, plain = [t.clone() for t in made], [t.clone() for t in made]
    doubled = torch.compile(step, fullgraph=True, backend=compiler)(*ours)
    CHANGES[change](plain)
    assert torch.equal(doubled, plain[0] * 2.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("change", CHANGES)
def test_mixed_devices(backend: str, change: str) -> None:
    made = [random_tensor(8, 4), random_tensor(8, 4)]
    moved = [made[0].clone(), made[1].cuda()]
    CHANGES[change](made)
    CHANGES[change](moved)
    torch.testing.assert_close(moved[1].cpu(), made[1])
