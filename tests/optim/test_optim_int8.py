"""8-bit moments: their error, outliers, slow averages, convergence and size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from family_float64 import ELEMENTWISE, follow

from pyft import optim

BLOCK = 256
FULL = {
    "Adam": {"amsgrad": True},
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.5, "centered": True},
}


def wide_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The moments of the only parameter as fp32: what an fp32 optimizer makes of this state_dict."""
    param = optimizer.param_groups[0]["params"][0]
    options = {
        key: optimizer.param_groups[0][key] for key in ("amsgrad", "momentum", "centered") if key in optimizer.defaults
    }
    second = type(optimizer)([torch.nn.Parameter(param.detach().clone())], state_dtype="float32", **options)
    second.load_state_dict(optimizer.state_dict())
    return next(iter(second.state.values()))


def of_blocks(x: np.ndarray) -> np.ndarray:
    """The largest absolute value of the block of each element of a vector."""
    blocks = [x[start : start + BLOCK] for start in range(0, len(x), BLOCK)]
    return np.concatenate([np.full(len(b), np.abs(b).max()) for b in blocks]) if blocks else x


GRADIENTS = {
    "normal": lambda n, g: torch.randn(n, generator=g),
    "blocks of very different size": lambda n, g: (
        torch.randn(n, generator=g) * 10.0 ** (torch.arange(n) // BLOCK % 9 - 4.0)
    ),
    "one outlier": lambda n, g: torch.randn(n, generator=g) * torch.where(torch.arange(n) == 3, 1e6, 1.0),
    "a block of zeros": lambda n, g: torch.randn(n, generator=g) * (torch.arange(n) >= BLOCK),
    "log-normal": lambda n, g: torch.exp(3.0 * torch.randn(n, generator=g)),
    "tiny": lambda n, g: torch.randn(n, generator=g) * 1e-18,
    "denormal": lambda n, g: torch.randn(n, generator=g) * 1e-40,
    "huge": lambda n, g: torch.randn(n, generator=g) * 1e15,
    "all equal": lambda n, g: torch.full((n,), -0.37),
}


@pytest.mark.parametrize("size", [1, 5, 255, 256, 257, 511, 512, 3000])
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_error_of_a_step(backend: str, name: str, kind: str, size: int, array: Any) -> None:
    """Every moment within one code, an eighth of it or 1e-5 of the largest of its block; first weights are exact."""
    grad = GRADIENTS[kind](size, torch.Generator().manual_seed(size))
    full = FULL.get(name, {})
    narrow, wide = (torch.nn.Parameter(torch.ones(size)) for _ in range(2))
    a = getattr(optim, name)([narrow], state_dtype="int8", weight_decay=0.0, **full)
    b = getattr(optim, name)([wide], weight_decay=0.0, **full)
    narrow.grad, wide.grad = grad.clone(), grad.clone()
    a.step()
    b.step()
    assert torch.equal(narrow, wide)
    exact = b.state[wide]
    for key, value in wide_state(a).items():
        if key == "step":
            continue
        want, got = array(exact[key]), array(value)
        largest = of_blocks(want)
        assert np.all(np.isfinite(got)), key
        # Below the smallest normal number a scale has few bits itself.
        error = np.abs(got - want)
        assert np.all(error <= np.abs(want) / 8 + 1e-5 * largest + 1.2e-38), (key, (error / (largest + 1e-45)).max())
        if key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"):
            # Never 0 beside what is not 0: a weight would be divided by eps alone.
            assert np.all(got >= 0.0), key
            assert np.all(got[want == 0.0] <= 1e-9 * largest[want == 0.0]), key
        else:
            assert np.all(got[want == 0.0] == 0.0), key


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_keys_shapes_and_bytes(backend: str, name: str) -> None:
    shapes = [(100, 37), (255,), (256,), (257,), (), (0,), (1,)]
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    optimizer = getattr(optim, name)(params, state_dtype="int8", **FULL.get(name, {}))
    for param in params:
        param.grad = torch.randn(param.shape)
    optimizer.step()
    for param in params:
        state = dict(optimizer.state[param])
        state.pop("step", None)
        moments = {key.removesuffix("_q8") for key in state if key.endswith("_q8")}
        assert moments
        assert set(state) == {f"{m}_q8" for m in moments} | {f"{m}_scale" for m in moments}
        for moment in moments:
            assert state[f"{moment}_q8"].dtype in (torch.int8, torch.uint8)
            assert state[f"{moment}_q8"].shape == param.shape
            assert state[f"{moment}_scale"].dtype == torch.float32
            assert state[f"{moment}_scale"].numel() == math.ceil(param.numel() / BLOCK)
        held = sum(value.untyped_storage().nbytes() for value in state.values())
        assert held == len(moments) * (param.numel() + 4 * math.ceil(param.numel() / BLOCK))


def test_about_two_bytes_for_each_parameter_of_adamw(backend: str) -> None:
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((300, 100), (50_000,))]
    optimizer = optim.AdamW(params, state_dtype="int8", clip_norm=1.0)
    for param in params:
        param.grad = torch.randn(param.shape)
    optimizer.step()
    held = sum(v.untyped_storage().nbytes() for state in optimizer.state.values() for v in state.values())
    assert 2.0 <= held / 80_000 < 2.04


@pytest.mark.parametrize("layout", ["last", "transposed", "gaps"])
def test_blocks_follow_memory(backend: str, layout: str, array: Any) -> None:
    layouts = {
        "last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
        "gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    }
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(8, 6, 7, 9, generator=generator)
    param = torch.nn.Parameter(layouts[layout](torch.zeros(8, 6, 7, 9)))
    optimizer = optim.AdamW([param], state_dtype="int8", weight_decay=0.0)
    start, history = array(param), []
    for step in range(5):
        param.grad = grad * (1.0 + 0.1 * step)
        history.append(array(param.grad))
        optimizer.step()
    theta, state = follow("AdamW", start, history, weight_decay=0.0)
    moment = array(wide_state(optimizer)["exp_avg"])
    assert np.abs(moment - state["exp_avg"]).max() <= 0.12 * np.abs(state["exp_avg"]).max()
    # A constant direction: every weight has moved lr a step, but for what the moments of small gradients lost.
    assert np.abs(np.median(np.abs(array(param))) - np.median(np.abs(theta))) < 0.05 * np.median(np.abs(theta))


@pytest.mark.parametrize(("orders", "times"), [(3, 4), (8, 30)])
@pytest.mark.parametrize("name", ["AdamW", "Adam", "RMSprop", "Adagrad"])
def test_no_step_is_wild_beside_an_outlier(backend: str, name: str, orders: int, times: int) -> None:
    """A second moment rounded to 0 under a first moment that was not would throw a weight far off."""
    generator = torch.Generator().manual_seed(0)
    scale = 10.0 ** torch.linspace(-orders, 0, 1000)[torch.randperm(1000, generator=generator)]
    narrow, wide = (torch.nn.Parameter(torch.zeros(1000)) for _ in range(2))
    a = getattr(optim, name)([narrow], lr=1e-3, state_dtype="int8")
    b = getattr(optim, name)([wide], lr=1e-3)
    largest_narrow = largest_wide = 0.0
    for step in range(150):
        grad = torch.randn(1000, generator=generator) * scale
        if step % 10 == 9:
            grad = grad * 0.01
        before = narrow.detach().clone(), wide.detach().clone()
        narrow.grad, wide.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
        largest_narrow = max(largest_narrow, float((narrow.detach() - before[0]).abs().max()))
        largest_wide = max(largest_wide, float((wide.detach() - before[1]).abs().max()))
    assert largest_narrow <= times * largest_wide
    assert bool(torch.isfinite(narrow).all())


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_slow_averages_do_not_stick(core: Any, weights_dtype: torch.dtype) -> None:
    """exp_avg_sq moves by a thousandth a step, less than its spacing: rounded to nearest it would stand still.

    Half of each block falls tenfold in size, then comes back; 5000 steps each time.
    """
    generator = torch.Generator().manual_seed(0)
    size = 512
    param = torch.nn.Parameter(torch.zeros(size, dtype=weights_dtype))
    optimizer = optim.AdamW([param], lr=1e-6, state_dtype="int8", weight_decay=0.0)
    half = torch.arange(size) % 2 == 0
    exact = torch.zeros(size, dtype=torch.float64)
    noise = torch.randn(64, size, generator=generator).sign() * (0.5 + torch.rand(64, size, generator=generator))
    for small, steps in ((1.0, 1500), (0.1, 5000), (1.0, 3000)):
        scale = torch.where(half, small, 1.0)
        grads = (noise * scale).to(weights_dtype)
        squares = grads.double().square()
        for step in range(steps):
            param.grad = grads[step % 64]
            optimizer.step()
            exact.mul_(0.999).add_(squares[step % 64], alpha=0.001)
        ratio = wide_state(optimizer)["exp_avg_sq"].double() / exact
        for part in (half, ~half):
            assert 0.8 < float(ratio[part].mean()) < 1.25, (small, float(ratio[part].mean()))
            assert float(ratio[part].min()) > 0.4
            assert float(ratio[part].max()) < 2.5


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reaches_the_loss_of_fp32_moments(core: Any, name: str, dtype: torch.dtype) -> None:
    """Noisy least squares, far from done: the losses on the way are within 2 %."""
    lr = {"SGD": 0.01, "Lion": 3e-3, "Adagrad": 0.1}.get(name, 0.01)
    options = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.5}}.get(name, {})
    weights = {"weights": "split32"} if dtype == torch.bfloat16 else {}
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 40, generator=generator) * 10.0 ** torch.linspace(-1, 0, 40)
    targets = inputs @ torch.randn(40, 30, generator=generator) + torch.randn(600, 30, generator=generator)
    losses = []
    for state_dtype in ("float32", "int8"):
        param = torch.nn.Parameter(torch.zeros(40, 30, dtype=dtype))
        optimizer = getattr(optim, name)([param], lr=lr, state_dtype=state_dtype, **options, **weights)
        order = torch.Generator().manual_seed(1)
        for step in range(300):
            if step == 200:
                optimizer.param_groups[0]["lr"] = lr * 0.1
            rows = torch.randint(600, (60,), generator=order)
            optimizer.zero_grad()
            (inputs[rows] @ param.float() - targets[rows]).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(float((inputs @ param.float() - targets).square().mean()))
    assert losses[0] < 0.7 * float(targets.square().mean())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_repeats_to_the_bit_and_depends_on_nothing_else(backend: str, assert_equal: Any) -> None:
    def run(order: list[int], seed: int = 0) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.zeros(n)) for n in (300, 7, 1000)]
        optimizer = optim.AdamW([params[i] for i in order], state_dtype="int8", seed=seed)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        return [p.detach() for p in params]

    first = run([0, 1, 2])
    assert_equal(run([0, 1, 2]), first)
    torch.manual_seed(99)  # the global generator has no say
    torch.rand(3)
    assert_equal(run([0, 1, 2]), first)


def test_moments_of_fp16_and_bf16_parameters(backend: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for name in ELEMENTWISE:
            param = torch.nn.Parameter(torch.ones(600, dtype=dtype))
            optimizer = getattr(optim, name)([param], lr=0.05, state_dtype="int8", **FULL.get(name, {}))
            for _ in range(3):
                param.grad = torch.full((600,), 0.25, dtype=dtype)
                optimizer.step()
            assert bool((param < 0.99).all()), name
            assert bool(torch.isfinite(param).all()), name


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_a_slow_average_does_not_stick(backend: str, state_dtype: str) -> None:
    """exp_avg_sq of elements whose gradient is gone falls by beta2 a step, less than half a code or bf16 step."""
    param = torch.nn.Parameter(torch.zeros(256))
    optimizer = optim.AdamW([param], lr=0.0, betas=(0.9, 0.999), state_dtype=state_dtype)
    for step in range(800):
        grad = torch.ones(256)
        if step >= 100:
            grad[128:] = 0.0
        param.grad = grad
        optimizer.step()
    wide = optim.AdamW([torch.nn.Parameter(torch.zeros(256))])
    wide.load_state_dict(optimizer.state_dict())
    kept = next(iter(wide.state.values()))["exp_avg_sq"]
    want = (1 - 0.999**100) * 0.999**700
    assert float(kept[128:].mean()) == pytest.approx(want, rel=0.1)
    assert float(kept[:128].mean()) == pytest.approx(1 - 0.999**800, rel=0.1)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_a_block_that_is_lost_does_no_harm(backend: str, bad: float) -> None:
    """With on_nonfinite="ignore": the weight is NaN, the others of its block stand still, the next block goes on."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(2 * BLOCK, generator=generator))
    optimizer = optim.AdamW([param], lr=0.1, state_dtype="int8", weight_decay=0.0, on_nonfinite="ignore")
    for step in range(5):
        param.grad = torch.randn(2 * BLOCK, generator=generator)
        if step == 2:
            param.grad[5] = bad
        before = param.detach().clone()
        optimizer.step()
    assert param.isnan().nonzero().flatten().tolist() == [5]
    moved = param.detach() != before
    assert moved[:BLOCK].nonzero().flatten().tolist() == [5]
    assert int(moved[BLOCK:].sum()) == BLOCK
