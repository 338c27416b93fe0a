"""decay_to_init (L2-SP, Li et al. 2018): decay toward the value a parameter had at its first step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bfloat16_float64 import nearest_even
from family_float64 import CASE_IDS, CASES, DECOUPLED, NAMES, follow

from pyft import optim

STEPS = 12


@pytest.mark.parametrize(("name", "options"), CASES, ids=CASE_IDS)
def test_follows_float64(
    backend: str, name: str, options: dict, make_params: Any, give_grads: Any, assert_near: Any, array: Any
) -> None:
    params = make_params()
    start, history = [array(p) for p in params], [[] for _ in params]
    options = {"lr": 0.01, **options}
    optimizer = getattr(optim, name)(params, decay_to_init=2.0, **options)
    for step in range(STEPS):
        give_grads(params, seed=step)
        for seen, param in zip(history, params, strict=True):
            seen.append(array(param.grad))
        optimizer.step()
    for param, first, seen in zip(params, start, history, strict=True):
        theta, _ = follow(name, first, seen, decay_to_init=2.0, **options)
        assert_near(param, theta, 2 * STEPS)
        state = optimizer.state[param]
        assert state["init"].dtype == torch.float32
        assert np.array_equal(array(state["init"]), first)
    without, _ = follow(name, start[0], history[0], **options)
    assert np.abs(array(params[0]) - without).max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_bf16_reference_is_rounded_once(
    backend: str, name: str, make_params: Any, give_grads: Any, assert_near: Any, array: Any
) -> None:
    params = make_params()
    start, history = [array(p) for p in params], [[] for _ in params]
    optimizer = getattr(optim, name)(params, decay_to_init=1.0, init_dtype="bfloat16")
    for step in range(STEPS):
        give_grads(params, seed=step)
        for seen, param in zip(history, params, strict=True):
            seen.append(array(param.grad))
        optimizer.step()
    for param, first, seen in zip(params, start, history, strict=True):
        rounded = nearest_even(first.astype(np.float32)).astype(np.float64).reshape(first.shape)
        init = optimizer.state[param]["init"]
        assert init.dtype == torch.bfloat16
        assert np.array_equal(array(init), rounded)
        # The oracle with the rounded reference in its state.
        theta, state = first, {"step": np.array(0.0), "init": rounded}
        for gradient in seen:
            theta, state = one_step(name, theta, gradient, state)
        assert_near(param, theta, 2 * STEPS)


def one_step(name: str, theta: np.ndarray, gradient: np.ndarray, state: dict) -> tuple[np.ndarray, dict]:
    from family_float64 import ORACLES

    return ORACLES[name](theta, gradient, state, decay_to_init=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_each_group_has_its_own(
    backend: str, name: str, make_params: Any, give_grads: Any, assert_near: Any, array: Any
) -> None:
    params = make_params()
    start, history = [array(p) for p in params], [[] for _ in params]
    pulls = [0.0, 1.0, 5.0]
    groups = [{"params": params[2 * n : 2 * n + 2], "decay_to_init": pull} for n, pull in enumerate(pulls)]
    optimizer = getattr(optim, name)(groups, lr=0.01, weight_decay=0.1)
    for step in range(STEPS):
        give_grads(params, seed=step)
        for seen, param in zip(history, params, strict=True):
            seen.append(array(param.grad))
        optimizer.step()
    for number, param in enumerate(params):
        pull = pulls[number // 2]
        theta, _ = follow(name, start[number], history[number], lr=0.01, weight_decay=0.1, decay_to_init=pull)
        assert_near(param, theta, 2 * STEPS)
        assert ("init" in optimizer.state[param]) == (pull > 0.0)


@pytest.mark.parametrize("name", DECOUPLED)
def test_decoupled_pull_is_past_the_adaptive_step(backend: str, name: str, array: Any) -> None:
    """Without a gradient the distance to the start shrinks by lr * decay_to_init, and goes to 0, not to the origin."""
    param = torch.nn.Parameter(torch.full((6, 5), 3.0))
    optimizer = getattr(optim, name)([param], lr=0.1, decay_to_init=0.5, weight_decay=0.0)
    param.grad = torch.zeros(6, 5)
    optimizer.step()
    with torch.no_grad():
        param.add_(1.0)
    for step in range(1, 4):
        param.grad = torch.zeros(6, 5)
        optimizer.step()
        np.testing.assert_allclose(array(param), 3.0 + 0.95**step, rtol=1e-6)


@pytest.mark.parametrize("name", DECOUPLED)
def test_weights_that_decay_to_nothing_are_pulled_all_the_same(backend: str, name: str, array: Any) -> None:
    """lr * weight_decay = 1 leaves of the weights only the pull: (1 - 1) * 5 - 0.5 * (5 - 3)."""
    param = torch.nn.Parameter(torch.full((6, 5), 3.0))
    optimizer = getattr(optim, name)([param], lr=1.0, weight_decay=1.0, decay_to_init=0.5)
    param.grad = torch.zeros(6, 5)
    optimizer.step()
    with torch.no_grad():
        param.fill_(5.0)
    optimizer.step()
    np.testing.assert_allclose(array(param), -1.0, rtol=1e-6)


def test_first_step_counts_not_construction(backend: str) -> None:
    """Pretrained weights are often loaded after the optimizer was built."""
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = optim.SGD([param], lr=0.0, decay_to_init=1.0)
    with torch.no_grad():
        param.fill_(2.0)
    param.grad = torch.zeros(4)
    optimizer.step()
    with torch.no_grad():
        param.fill_(5.0)
    param.grad = torch.zeros(4)
    optimizer.step()
    assert bool((optimizer.state[param]["init"] == 2.0).all())


def test_a_skipped_step_is_not_the_first(backend: str, emulation: Any) -> None:
    if emulation is not None and backend == "core":
        pytest.skip("on a GPU the first step that was tried counts: nothing waits to learn that it was skipped")
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = optim.SGD([param], lr=0.0, decay_to_init=1.0, on_nonfinite="skip")
    param.grad = torch.full((4,), float("nan"))
    optimizer.step()
    with torch.no_grad():
        param.fill_(2.0)
    param.grad = torch.zeros(4)
    optimizer.step()
    assert bool((optimizer.state[param]["init"] == 2.0).all())


def test_switched_on_later_pulls_to_the_value_of_then(backend: str, make_params: Any, give_grads: Any) -> None:
    """A group whose decay_to_init is raised in mid-training, or state of torch, has no reference yet."""
    params = make_params()
    optimizer = optim.AdamW(params, lr=0.1)
    give_grads(params, seed=0)
    optimizer.step()
    optimizer.param_groups[0]["decay_to_init"] = 0.5
    here = [p.detach().clone() for p in params]
    for step in range(1, 4):
        give_grads(params, seed=step)
        optimizer.step()
    assert all(torch.equal(optimizer.state[p]["init"], h) for p, h in zip(params, here, strict=True))


@pytest.mark.parametrize("layout", ["last", "transposed", "gaps"])
@pytest.mark.parametrize("init_dtype", ["float32", "bfloat16"])
def test_any_layout(backend: str, layout: str, init_dtype: str) -> None:
    layouts = {
        "last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
        "gaps": lambda x: torch.stack([x, x], -1)[..., 0],
        "contiguous": lambda x: x.clone(),
    }
    results = []
    for each in (layout, "contiguous"):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(layouts[each](torch.randn(6, 5, 4, 3, generator=generator)))
        optimizer = optim.AdamW([param], lr=0.05, decay_to_init=1.0, init_dtype=init_dtype)
        for _ in range(4):
            param.grad = torch.randn(6, 5, 4, 3, generator=generator)
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_stay_near_their_start(backend: str, dtype: torch.dtype, array: Any) -> None:
    for name in NAMES:
        distances = []
        for pull in (0.0, 5.0):
            param = torch.nn.Parameter(torch.full((300,), 1.0, dtype=dtype))
            optimizer = getattr(optim, name)([param], lr=0.03, decay_to_init=pull)
            for _ in range(30):
                param.grad = torch.full((300,), 0.3, dtype=dtype)
                optimizer.step()
            distances.append(float(np.abs(array(param) - 1.0).mean()))
        assert 0.0 < distances[1] < 0.6 * distances[0], name


def test_reference_of_fp64_is_as_good_as_asked(backend: str) -> None:
    """init_dtype is the dtype of the reference, fp32 at the most asked; the pull of fp64 weights is then to it."""
    value = torch.full((3,), 1.0 + 2.0**-40, dtype=torch.float64)
    param = torch.nn.Parameter(value.clone())
    optimizer = optim.SGD([param], lr=1.0, decay_to_init=1.0)
    param.grad = torch.zeros(3, dtype=torch.float64)
    optimizer.step()
    reference = optimizer.state[param]["init"].double()
    torch.testing.assert_close(param.detach(), reference, rtol=0, atol=1e-15)
    assert bool(((reference - value).abs() <= 2.0**-24).all())
