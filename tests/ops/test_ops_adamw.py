"""adamw_: against the paper in float64, on every CPU target, at awkward sizes and layouts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyft.ops import adamw_

_spec = importlib.util.spec_from_file_location(
    "adamw_float64", Path(__file__).resolve().parents[1] / "reference" / "adamw_float64.py"
)
assert _spec is not None
assert _spec.loader is not None
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 8191, 8192, 8193, 9999, 16383, 16384, 16385, 50_021]
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
ULP = 2.0**-23


def make(shape: tuple[int, ...] | int, seed: int, step: float = 3.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, g, m, v = (torch.randn(shape, generator=generator) for _ in range(4))
    return [p, g, m * 0.1, v.square() * 0.01, torch.tensor(step)]


def run(tensors: list[torch.Tensor], clip_coef: float | None = None, maximize: bool = False) -> None:
    coef = None if clip_coef is None else torch.tensor(clip_coef)
    adamw_(*[[t] for t in tensors], coef, **HYPER, maximize=maximize)


def expected(tensors: list[torch.Tensor], clip_coef: float | None = None, maximize: bool = False):
    p, g, m, v, step = (t.detach().double().numpy() for t in tensors)
    coef = 1.0 if clip_coef is None else float(torch.tensor(clip_coef))
    return oracle.adamw_step(p, g, m, v, int(step), **HYPER, maximize=maximize, clip_coef=coef)


def assert_close(got: torch.Tensor, want: np.ndarray, scale: float | np.ndarray) -> None:
    """Within a few roundings of fp32 of the value and of `scale`, the size of what was added; far below one step."""
    error = np.abs(got.detach().double().numpy() - want)
    assert np.all(error <= 4 * ULP * (np.abs(want) + scale)), f"largest error {error.max()}"


def rounding_scale(before: list[torch.Tensor], v: np.ndarray) -> np.ndarray:
    """Sizes of the terms that make up the update: m and g may cancel, their roundings do not."""
    _, g, m, _, step = (t.double().numpy() for t in before)
    root = np.sqrt(v / (1.0 - HYPER["beta2"] ** step)) + HYPER["eps"]
    return HYPER["lr"] / (1.0 - HYPER["beta1"] ** step) * (np.abs(m) + np.abs(g)) / root


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("clip_coef", "maximize"), [(None, False), (0.25, False), (0.5, True)])
def test_equals_float64(cpu_target: str, size: int, clip_coef: float | None, maximize: bool) -> None:
    tensors = make(size, size)
    before = [t.clone() for t in tensors]
    p, m, v = expected(tensors, clip_coef, maximize)
    run(tensors, clip_coef, maximize)
    assert_close(tensors[0], p, scale=rounding_scale(before, v))
    assert_close(tensors[2], m, scale=0.1)
    assert_close(tensors[3], v, scale=1e-3)
    assert torch.equal(tensors[1], before[1])
    assert torch.equal(tensors[4], before[4])
    if size > 0:
        assert (tensors[0] - before[0]).abs().max() > 1e-4  # a kernel that does nothing fails here


def test_writes_nothing_outside_a_view_at_an_odd_offset(cpu_target: str) -> None:
    sentinel = 12345.0
    for offset in (1, 5, 13):
        holders = [torch.full((9000,), sentinel) for _ in range(4)]
        values = make(8500, offset)
        views = [holder[offset : offset + 8500] for holder in holders]
        for view, value in zip(views, values[:4], strict=True):
            view.copy_(value)
        p, m, v = expected([*views, values[4]])
        run([*views, values[4]])
        assert_close(views[0], p, rounding_scale(values, v))
        assert_close(views[2], m, 0.1)
        assert_close(views[3], v, 1e-3)
        for holder in holders:
            assert (holder[:offset] == sentinel).all()
            assert (holder[offset + 8500 :] == sentinel).all()


def test_same_bits_for_threads_and_targets(core, one_thread_then_two: list[int]) -> None:
    sizes = [3, 1000, 20_000, 0, 70_001, 1, 9_000_000]

    def updated() -> list[torch.Tensor]:
        columns = list(zip(*[make(n, i, step=i + 1.0) for i, n in enumerate(sizes)], strict=True))
        adamw_(*[list(column) for column in columns], torch.tensor(0.37), **HYPER, maximize=False)
        return [t for column in (columns[0], columns[2], columns[3]) for t in column]

    want = updated()
    for target in core.build_info()["cpu_targets"]:
        core.set_cpu_target(target)
        for threads in one_thread_then_two:
            torch.set_num_threads(threads)
            assert all(torch.equal(got, first) for got, first in zip(updated(), want, strict=True))
    core.set_cpu_target("auto")


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "gaps": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("state_layout", ["contiguous", "channels_last"])
def test_any_mix_of_layouts(backend: str, param_layout: str, grad_layout: str, state_layout: str) -> None:
    p, g, m, v, step = make((6, 5, 4, 3), 11)
    tensors = [
        LAYOUTS[param_layout](p),
        LAYOUTS[grad_layout](g),
        LAYOUTS[state_layout](m),
        LAYOUTS[state_layout](v),
        step,
    ]
    want = expected(tensors)
    run(tensors)
    assert_close(tensors[0], want[0], HYPER["lr"])
    assert_close(tensors[2], want[1], 0.1)
    assert_close(tensors[3], want[2], 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_run_the_reference(backend: str, dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in make(300, 5)[:4]] + [torch.tensor(2.0)]
    want = expected(tensors)
    run(tensors)
    tolerance = torch.finfo(dtype).eps
    for got, expect in zip((tensors[0], tensors[2], tensors[3]), want, strict=True):
        np.testing.assert_allclose(got.double().numpy(), expect, rtol=2 * tolerance, atol=tolerance * 0.5)


def test_mixed_list_updates_each(backend: str) -> None:
    a, b = make(100, 1), [t.double() for t in make(50, 2)]
    wants = [expected(a), expected(b)]
    adamw_(*[[x, y] for x, y in zip(a, b, strict=True)], **HYPER)
    for tensors, want in zip((a, b), wants, strict=True):
        assert_close(tensors[0], want[0], HYPER["lr"])


def test_extreme_gradients(cpu_target: str) -> None:
    p, g = make(70, 9)[:2]
    g[:4] = torch.tensor([0.0, 1e-30, 1e18, -1e18])
    tensors = [p, g, torch.zeros(70), torch.zeros(70), torch.tensor(1.0)]
    want = expected(tensors)[0]
    run(tensors)
    assert torch.isfinite(tensors[0]).all()
    # 1e-30 squared is 0 in fp32, so eps alone divides: the step is nearly 0, in float64 too.
    assert_close(tensors[0], want, HYPER["lr"])


def test_autograd_sees_the_write(backend: str) -> None:
    w = torch.nn.Parameter(torch.ones(3))
    y = (w * w).sum()
    adamw_([w], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], [torch.tensor(1.0)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def bad_calls():
    one = torch.ones(2)
    yield "length", ([one], [], [one], [one], [one[:1]]), ValueError, "grads has 0 tensors but params has 1"
    yield "shape", ([one], [torch.ones(3)], [one], [one], [one[:1]]), ValueError, r"grads\[0\].*shape of params\[0\]"
    yield "sparse", ([one], [one.to_sparse()], [one], [one], [one[:1]]), TypeError, r"grads\[0\] is sparse"
    yield "step", ([one], [one], [one], [one], [one]), ValueError, r"steps\[0\] must hold one number"
    wide = torch.ones(1).expand(2)
    yield "expanded", ([wide], [one], [one], [one], [one[:1]]), ValueError, "share memory"
    yield "integer", ([torch.ones(2, dtype=torch.int64)], [one], [one], [one], [one[:1]]), TypeError, "floating"


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*c[1:], id=c[0]) for c in bad_calls()])
def test_bad_input_is_one_clear_error_and_writes_nothing(backend: str, call, error, message: str) -> None:
    before = call[0][0].clone()
    with pytest.raises(error, match=message):
        adamw_(*call)
    assert torch.equal(call[0][0], before)


def test_compiled_step_has_no_graph_break(backend: str) -> None:
    tensors = make(64, 4)
    want = expected(tensors)[0]

    def step(p, g, m, v, count):
        adamw_([p], [g], [m], [v], [count], **HYPER)
        return p * 1.0

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors)
    assert_close(got, want, HYPER["lr"])


def test_unknown_or_missing_target_is_named(core) -> None:
    with pytest.raises(RuntimeError, match=r"must be one of auto, baseline.*got 'sse9'"):
        core.set_cpu_target("sse9")
    assert core.cpu_target() in core.build_info()["cpu_targets"]


def test_environment_forces_the_target(core) -> None:
    code = "from pyft.core.loader import load_core; print(load_core().cpu_target())"
    for target in core.build_info()["cpu_targets"]:
        environment = {**os.environ, "PYFT_CPU_TARGET": target}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == target, done.stderr
