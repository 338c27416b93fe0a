"""Clipping inside the step: by value, tensor, row (AGC), group and all together, against float64 formulas."""

from __future__ import annotations

import math
from typing import Any

import clip_modes_float64 as formulas
import numpy as np
import pytest
import torch
from family_float64 import NAMES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyft import optim

# A Linear, its bias, a convolution, a scalar, an empty tensor, rows that are zero, a large vector.
SHAPES = [(6, 10), (6,), (5, 3, 3, 3), (), (0, 4), (4, 9), (5000,)]


@pytest.fixture
def model() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    with torch.no_grad():
        params[5][1] = 0.0  # a zero row of weights: its limit is clipping * eps
        params[5][2] = 1e-5
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 0.5
    params[5].grad[0] = 0.0  # a zero row of gradients
    params[0].grad[3] *= 1e-3  # a row below its limit
    return params


GROUPS = [0, 0, 0, 1, 1, 1, 2]


def in_groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": [p for p, n in zip(params, GROUPS, strict=True) if n == number]} for number in range(3)]


MODES: list[tuple[dict[str, float], float | None]] = [
    ({"global": 1.0}, None),
    ({"global": 1e6}, None),
    ({"group": 2.0}, None),
    ({"tensor": 1.5}, None),
    ({"agc": 0.05}, None),
    ({"agc": 50.0}, None),
    ({}, 0.3),
    ({}, 1e-30),
    ({"global": 1.0}, 0.3),
    ({"tensor": 0.7}, 0.2),
    ({"agc": 0.02}, 0.1),
    ({"agc": 0.1, "global": 1.0}, None),
    ({"tensor": 0.5, "group": 0.8}, None),
    ({"tensor": 0.5, "global": 0.8}, 0.4),
    ({"agc": 0.1, "group": 0.3}, 0.6),
]
IDS = [f"{'+'.join(modes) or 'value'}-{number}" for number, (modes, _) in enumerate(MODES)]


def applied(params: list[torch.nn.Parameter], **options: Any) -> tuple[list[np.ndarray], Any]:
    """What one step of SGD with lr 1 takes off the weights: the clipped gradients. In float64 parameters, exact."""
    wide = [torch.nn.Parameter(p.detach().double()) for p in params]
    for mine, param in zip(wide, params, strict=True):
        mine.grad = param.grad.double()
    optimizer = optim.SGD(in_groups(wide), lr=1.0, **options)
    before = [p.detach().clone() for p in wide]
    optimizer.step()
    return [(q - p).detach().numpy() for p, q in zip(wide, before, strict=True)], optimizer.last_step


def assert_is_clipped(got: np.ndarray, want: np.ndarray, weights: torch.Tensor) -> None:
    # The factor is rounded in fp32, as torch's is; the difference of weights in their own dtype.
    spacing = torch.finfo(weights.dtype).eps
    size = np.abs(weights.detach().double().numpy()) + np.abs(want)
    assert np.all(np.abs(got - want) <= 3 * 2.0**-23 * np.abs(want) + spacing * size)


@pytest.mark.parametrize(("modes", "value"), MODES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modes_follow_float64(
    backend: str, model: list, modes: dict, value: float | None, dtype: torch.dtype, array: Any
) -> None:
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in model]
    for param, old in zip(params, model, strict=True):
        param.grad = old.grad.to(dtype)
    grads, weights = [array(p.grad).copy() for p in params], [array(p).copy() for p in params]
    want, total, smallest = formulas.clip(grads, weights, GROUPS, modes, value)
    optimizer = optim.SGD(in_groups(params), lr=1.0, clip_norm=modes or None, clip_value=value)
    optimizer.step()
    for param, old, clipped, weight in zip(params, weights, want, model, strict=True):
        assert_is_clipped(old - array(param), clipped, weight.to(dtype))
    last = optimizer.last_step
    if modes:
        assert last.total_norm == pytest.approx(total, rel=3e-7)
    else:
        assert last.total_norm is None
    assert last.clip_coef == pytest.approx(smallest, rel=3e-7)
    assert not last.skipped
    assert last.first_bad is None
    assert last.skipped_steps == 0
    changed = [not np.array_equal(w, g) for w, g in zip(want, grads, strict=True)]
    assert any(changed) == (smallest < 1.0 or value is not None)
    for param, grad in zip(params, grads, strict=True):
        assert np.array_equal(array(param.grad), grad)  # p.grad is never changed


@pytest.mark.parametrize(("mode", "limit"), [("global", 1.0), ("group", 2.0), ("tensor", 1.5), ("agc", 0.05)])
def test_number_with_clip_mode_is_the_dict_of_one(backend: str, model: list, mode: str, limit: float) -> None:
    short, last = applied(model, clip_norm=limit, clip_mode=mode)
    long, last_long = applied(model, clip_norm={mode: limit})
    assert all(np.array_equal(a, b) for a, b in zip(short, long, strict=True))
    assert last == last_long


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("modes", "value"), [({"agc": 0.02}, None), ({"tensor": 0.5, "global": 0.8}, 0.4)])
def test_every_class_clips_as_if_the_gradients_had_come_so(
    backend: str, model: list, name: str, modes: dict, value: float | None, assert_near: Any, array: Any
) -> None:
    """The step with clipping is the step on gradients that were clipped by hand before."""
    inside = [torch.nn.Parameter(p.detach().clone()) for p in model]
    by_hand = [torch.nn.Parameter(p.detach().clone()) for p in model]
    a = getattr(optim, name)(in_groups(inside), lr=0.02, clip_norm=modes, clip_value=value)
    b = getattr(optim, name)(in_groups(by_hand), lr=0.02)
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        for mine, other in zip(inside, by_hand, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        grads, weights = [array(p.grad) for p in by_hand], [array(p) for p in by_hand]
        for param, grad in zip(by_hand, formulas.clip(grads, weights, GROUPS, modes, value)[0], strict=True):
            param.grad.copy_(torch.from_numpy(np.asarray(grad)))
        a.step()
        b.step()
    for mine, other in zip(inside, by_hand, strict=True):
        assert_near(mine, other, 12)


def test_factor_of_each_tensor_is_torch_s_to_the_bit(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for exponent in range(-4, 6):
        param = torch.nn.Parameter(torch.zeros(3))
        param.grad = torch.randn(3, generator=generator) * 10.0**exponent
        optimizer = optim.SGD([param], lr=1.0, clip_norm=0.37, clip_mode="tensor")
        grad = param.grad.clone()
        optimizer.step()
        coef = torch.clamp(0.37 / (torch.tensor(optimizer.last_step.total_norm) + 1e-6), max=1.0)
        assert optimizer.last_step.clip_coef == float(coef)
        assert torch.equal(param.detach(), -(grad * coef))


def test_value_is_torch_s_to_the_bit(backend: str, model: list) -> None:
    theirs = [torch.nn.Parameter(torch.zeros_like(p)) for p in model]
    ours = [torch.nn.Parameter(torch.zeros_like(p)) for p in model]
    for a, b, old in zip(ours, theirs, model, strict=True):
        a.grad, b.grad = old.grad.clone(), old.grad.clone()
    optim.SGD(ours, lr=1.0, clip_value=0.3).step()
    torch.nn.utils.clip_grad_value_(theirs, 0.3)
    torch.optim.SGD(theirs, lr=1.0).step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_agc_rows_of_any_memory_layout(backend: str) -> None:
    layouts = {
        "contiguous": lambda x: x.clone(),
        "last": lambda x: x.clone(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    }
    generator = torch.Generator().manual_seed(0)
    value, grad = (torch.randn(7, 5, 3, 2, generator=generator) for _ in range(2))
    value *= 10.0 ** torch.arange(-3.0, 4.0).reshape(7, 1, 1, 1)
    want = value.numpy() - formulas.clip([grad.numpy()], [value.numpy()], [0], {"agc": 0.1})[0][0]
    for of_param in layouts:
        for of_grad in layouts:
            param = torch.nn.Parameter(layouts[of_param](value))
            param.grad = layouts[of_grad](grad)
            optim.SGD([param], lr=1.0, clip_norm=0.1, clip_mode="agc").step()
            np.testing.assert_allclose(
                param.detach().numpy(), want, rtol=1e-6, atol=1e-6, err_msg=f"{of_param} {of_grad}"
            )


@pytest.mark.parametrize("columns", [1, 255, 256, 257, 20_000, 70_000])
def test_agc_rows_longer_and_shorter_than_a_chunk(backend: str, columns: int) -> None:
    """A factor belongs to a row, wherever the chunks of work are cut."""
    rows = 5 if columns > 1 else 40_000
    generator = torch.Generator().manual_seed(columns)
    value = torch.randn(rows, columns, generator=generator)
    grad = torch.randn(rows, columns, generator=generator) * 10.0 ** (torch.arange(rows) % 5 - 2.0).reshape(rows, 1)
    param = torch.nn.Parameter(value.clone())
    param.grad = grad.clone()
    optim.SGD([param], lr=1.0, clip_norm=0.3, clip_mode="agc").step()
    want = value.double().numpy() - formulas.clip([grad.numpy()], [value.numpy()], [0], {"agc": 0.3})[0][0]
    np.testing.assert_allclose(param.detach().double().numpy(), want, rtol=1e-6, atol=2e-6)


def test_parameters_without_a_gradient_count_for_nothing(backend: str, model: list) -> None:
    model[6].grad = None
    model[3].grad = None
    optimizer = optim.SGD(in_groups(model), lr=0.1, clip_norm={"tensor": 1.0, "group": 1.0})
    optimizer.step()
    present = [p.grad.double() for p in model if p.grad is not None]
    want = math.sqrt(sum(float(g.square().sum()) for g in present))
    assert optimizer.last_step.total_norm == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["global", "group", "tensor"])
def test_narrow_gradients_beyond_65504_are_clipped_not_zeroed(backend: str, dtype: torch.dtype, mode: str) -> None:
    param = torch.nn.Parameter(torch.zeros(9000, dtype=dtype))
    param.grad = torch.full((9000,), 1000.0, dtype=dtype)
    optimizer = optim.SGD([param], lr=1.0, clip_norm=1.0, clip_mode=mode)
    optimizer.step()
    assert optimizer.last_step.total_norm == pytest.approx(float(param.grad[0]) * math.sqrt(9000), rel=1e-6)
    assert float(param.detach().float().norm()) == pytest.approx(1.0, rel=1e-2)


def test_huge_finite_gradients(backend: str) -> None:
    for mode in ("global", "group", "tensor", "agc"):
        param = torch.nn.Parameter(torch.full((4,), 0.5))
        param.grad = torch.full((4,), 3e38)
        optim.SGD([param], lr=0.1, clip_norm=1.0, clip_mode=mode).step()
        torch.testing.assert_close(param.detach(), torch.full((4,), 0.45), rtol=1e-5, atol=0)


def test_total_norm_does_not_depend_on_order_or_threads(core: Any, thread_counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, generator=generator) * 10.0 ** (n % 7 - 3) for n in (5, 70_001, 3000, 1, 16_384, 600_000)]
    seen = set()
    for threads in thread_counts:
        torch.set_num_threads(threads)
        for order in (grads, grads[::-1]):
            params = [torch.nn.Parameter(torch.zeros_like(g)) for g in order]
            for param, grad in zip(params, order, strict=True):
                param.grad = grad
            optimizer = optim.SGD(params, clip_norm=1.0)
            optimizer.step()
            seen.add((optimizer.last_step.total_norm, optimizer.last_step.clip_coef))
    assert len(seen) == 1


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    limit=st.floats(2.0**-10, 2.0**10, width=32),
    scale=st.floats(2.0**-10, 2.0**10, width=32),
    mode=st.sampled_from(["global", "group", "tensor", "agc"]),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
)
def test_no_norm_is_above_its_limit_and_no_direction_changes(
    core: Any, limit: float, scale: float, mode: str, sizes: list[int]
) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    params = [torch.nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in sizes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale
    optimizer = optim.SGD(params, lr=1.0, clip_norm=limit, clip_mode=mode)
    optimizer.step()
    taken = [-p.detach() for p in params]
    norms = [float(t.norm()) for t in taken]
    highest = limit * (1e-3 if mode == "agc" else 1.0)  # weights are 0, so AGC's eps counts
    assert (math.hypot(*norms) if mode in ("global", "group") else max(norms)) <= highest * (1 + 1e-6)
    for grad, step in zip([p.grad for p in params], taken, strict=True):
        factor = float(step.abs().max() / grad.abs().max()) if grad.numel() else 1.0
        assert optimizer.last_step.clip_coef - 1e-7 <= factor <= 1.0 + 1e-12
        torch.testing.assert_close(step, grad * factor, rtol=1e-6, atol=1e-12)
