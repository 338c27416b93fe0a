"""NaN and inf in gradients: a step decides before it writes; skip, raise and ignore."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from family_float64 import NAMES

from pyft import optim
from pyft.errors import NonFiniteError

BAD = [float("nan"), float("inf"), -float("inf")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FULL = {
    "Adam": {"amsgrad": True},
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.5, "centered": True},
}


def named(params: list[torch.nn.Parameter]) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"layer.{number}", param) for number, param in enumerate(params)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_nothing_is_written(
    backend: str,
    name: str,
    dtype: torch.dtype,
    policy: str,
    make_params: Any,
    give_grads: Any,
    snapshot: Any,
    assert_untouched: Any,
) -> None:
    params = make_params(dtype=dtype)
    optimizer = getattr(optim, name)(named(params), on_nonfinite=policy, **FULL.get(name, {}))
    give_grads(params, seed=0)
    optimizer.step()
    before = snapshot(params, optimizer)
    skipped = 0
    for number in (0, 2, 4, 5):
        for place in (0, -1):
            for bad in BAD:
                give_grads(params, seed=1)
                params[number].grad.view(-1)[place] = bad
                kept = [p.grad.clone() for p in params]
                if policy == "raise":
                    with pytest.raises(NonFiniteError, match=rf"'layer\.{number}'"):
                        optimizer.step()
                else:
                    optimizer.step()
                    skipped += 1
                    assert optimizer.last_step.skipped
                    assert optimizer.last_step.first_bad == f"layer.{number}"
                    assert optimizer.last_step.skipped_steps == skipped
                assert_untouched(params, optimizer, before)
                assert all(
                    torch.equal(p.grad.nan_to_num(7.0), g.nan_to_num(7.0)) for p, g in zip(params, kept, strict=True)
                )
    give_grads(params, seed=2)
    optimizer.step()
    assert not optimizer.last_step.skipped
    assert optimizer.last_step.first_bad is None
    assert optimizer.last_step.skipped_steps == skipped
    assert any(not torch.equal(p, q) for p, q in zip(params, before[0], strict=True))


CONFIGURATIONS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.float32, {"clip_norm": 1.0}),
    (torch.float32, {"clip_norm": 1.0, "clip_mode": "group"}),
    (torch.float32, {"clip_norm": 1.0, "clip_mode": "tensor"}),
    (torch.float32, {"clip_norm": 0.1, "clip_mode": "agc"}),
    (torch.float32, {"clip_norm": {"agc": 0.1, "global": 1.0}, "clip_value": 0.5}),
    (torch.float32, {"clip_value": 0.5}),
    (torch.float32, {"state_dtype": "int8"}),
    (torch.float32, {"state_dtype": "bfloat16"}),
    (torch.float32, {"decay_to_init": 0.1}),
    (torch.bfloat16, {"weights": "split32"}),
    (torch.bfloat16, {"weights": "kahan", "clip_norm": 1.0}),
    (torch.bfloat16, {"weights": "stochastic", "state_dtype": "int8"}),
]


@pytest.mark.parametrize("policy", ["skip", "raise"])
@pytest.mark.parametrize(("dtype", "options"), CONFIGURATIONS)
def test_nothing_is_written_whatever_the_options(
    backend: str,
    dtype: torch.dtype,
    options: dict,
    policy: str,
    make_params: Any,
    give_grads: Any,
    snapshot: Any,
    assert_untouched: Any,
) -> None:
    for bad in BAD:
        params = make_params(dtype=dtype)
        optimizer = optim.AdamW(params, on_nonfinite=policy, **options)
        give_grads(params, seed=0)
        optimizer.step()
        before = snapshot(params, optimizer)
        give_grads(params, seed=1)
        params[5].grad[-1] = bad
        params[2].grad[3, 2, 1, 0] = bad
        if policy == "raise":
            with pytest.raises(NonFiniteError, match="number 2"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.last_step.first_bad == "number 2"
            assert optimizer.last_step.skipped
        assert_untouched(params, optimizer, before)


def test_very_first_step_may_be_bad(
    backend: str, make_params: Any, give_grads: Any, snapshot: Any, assert_untouched: Any
) -> None:
    for name in NAMES:
        for options in ({}, {"state_dtype": "int8"}, {"decay_to_init": 0.1}):
            if name == "Adafactor" and "state_dtype" in options:
                continue
            params, clean = make_params(), make_params()
            a = getattr(optim, name)(params, on_nonfinite="skip", **options)
            before = snapshot(params, a)
            give_grads(params, seed=0)
            params[0].grad[0, 0] = float("nan")
            a.step()
            assert_untouched(params, a, before)
            assert a.last_step.skipped_steps == 1
            # The run is then as if that step had never been.
            b = getattr(optim, name)(clean, on_nonfinite="skip", **options)
            for step in range(1, 4):
                give_grads(params, clean, seed=step)
                a.step()
                b.step()
            assert all(torch.equal(p, q) for p, q in zip(params, clean, strict=True))


def test_every_element_is_looked_at(core: Any) -> None:
    """Vector lanes, tails and chunk borders: a bad element at each place of small tensors and at many of large ones."""
    for dtype in DTYPES:
        for size in [*range(1, 40), 255, 256, 257, 16_384, 16_385, 40_000]:
            param = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
            optimizer = optim.SGD([param], on_nonfinite="skip")
            param.grad = torch.zeros(size, dtype=dtype)
            places = (
                range(size)
                if size < 40
                else sorted({0, 1, 7, 8, size // 2, size - 9, size - 2, size - 1, 16_383 % size})
            )
            for count, place in enumerate(places, start=1):
                param.grad[place] = BAD[place % 3]
                optimizer.step()
                param.grad[place] = 0.0
                assert optimizer.last_step.skipped, (dtype, size, place)
                assert optimizer.last_step.skipped_steps == count


def test_bad_elements_that_cancel_or_hide_behind_zeros(backend: str) -> None:
    for first, second in ((math.inf, -math.inf), (math.nan, math.inf), (-math.inf, math.nan)):
        params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
        for param in params:
            param.grad = torch.zeros(3)
        params[1].grad[:2] = torch.tensor([first, second])
        optimizer = optim.SGD(params, on_nonfinite="skip")
        optimizer.step()
        assert optimizer.last_step.first_bad == "number 1"


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "gaps", "of another stride"])
def test_bad_gradient_of_any_layout(backend: str, layout: str) -> None:
    value = torch.zeros(4, 3, 2, 2)
    laid = {
        "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "gaps": lambda x: torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0],
    }.get(layout, lambda x: x)
    param = torch.nn.Parameter(laid(value))
    param.grad = laid(torch.ones(4, 3, 2, 2))
    if layout == "of another stride":
        param.grad = torch.ones(2, 2, 3, 4).permute(3, 2, 1, 0)
    optimizer = optim.SGD([param], lr=1.0, on_nonfinite="skip")
    optimizer.step()  # the NaN in the gaps belong to nobody
    assert not optimizer.last_step.skipped
    param.grad[3, 2, 1, 0] = math.nan
    optimizer.step()
    assert optimizer.last_step.skipped
    assert bool((param == -1.0).all())


def test_largest_finite_gradients_are_finite(backend: str) -> None:
    for dtype in DTYPES:
        for clip_norm in (None, 1.0):
            param = torch.nn.Parameter(torch.zeros(300, dtype=dtype))
            largest = min(torch.finfo(dtype).max, 1e150)  # beyond, the norm of float64 itself is inf
            param.grad = torch.full((300,), largest, dtype=dtype)
            optimizer = optim.SGD([param], lr=0.0, on_nonfinite="raise", clip_norm=clip_norm)
            optimizer.step()
            assert not optimizer.last_step.skipped


def test_none_means_raise_where_a_norm_is_taken_else_ignore(backend: str, make_params: Any, give_grads: Any) -> None:
    for mode in ("global", "group", "tensor", "agc"):
        params = make_params()
        give_grads(params, seed=0)
        params[1].grad[2] = math.nan
        with pytest.raises(NonFiniteError, match="number 1"):
            optim.SGD(params, clip_norm=1.0, clip_mode=mode).step()
    params = make_params()
    give_grads(params, seed=0)
    params[1].grad[2] = math.nan
    optimizer = optim.SGD(params, lr=0.1)
    optimizer.step()
    assert int(torch.isnan(params[1]).sum()) == 1
    assert not any(bool(torch.isnan(p).any()) for n, p in enumerate(params) if n != 1)
    assert optimizer.last_step.total_norm is None


@pytest.mark.parametrize("name", NAMES)
def test_ignore_goes_on(backend: str, name: str, make_params: Any, give_grads: Any) -> None:
    params = make_params()
    optimizer = getattr(optim, name)(params, on_nonfinite="ignore")
    for step in range(2):
        give_grads(params, seed=step)
        params[1].grad[2] = math.nan
        optimizer.step()
    assert not optimizer.last_step.skipped
    assert optimizer.last_step.skipped_steps == 0
    assert not bool(torch.isfinite(params[1][2])) or name == "Lion"
    assert all(bool(torch.isfinite(p).all()) for n, p in enumerate(params) if n != 1)
    if "step" in optimizer.state[params[1]]:
        assert float(optimizer.state[params[1]]["step"]) == 2.0


def test_ignore_with_value_clips_inf_as_torch(backend: str) -> None:
    """torch's clamp turns inf into the limit and leaves NaN."""
    ours, theirs = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    for param in (ours, theirs):
        param.grad = torch.tensor([math.inf, -math.inf, math.nan, 0.1])
    torch.nn.utils.clip_grad_value_([theirs], 0.5)
    torch.optim.SGD([theirs], lr=1.0).step()
    for policy in (None, "ignore"):
        with torch.no_grad():
            ours.zero_()
        optim.SGD([ours], lr=1.0, clip_value=0.5, on_nonfinite=policy).step()
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
        assert ours.detach().tolist()[:2] == [-0.5, 0.5]


def test_inf_is_bad_even_where_value_would_hide_it(backend: str, make_params: Any, give_grads: Any) -> None:
    for policy in ("skip", "raise", None):
        params = make_params()
        before = [p.detach().clone() for p in params]
        optimizer = optim.SGD(params, clip_value=0.5, clip_norm=1.0, on_nonfinite=policy)
        give_grads(params, seed=0)
        params[2].grad[0, 0, 0, 0] = math.inf
        if policy == "skip":
            optimizer.step()
            assert optimizer.last_step.first_bad == "number 2"
        else:
            with pytest.raises(NonFiniteError, match="number 2"):
                optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_message_names_shape_and_mend(backend: str, make_params: Any, give_grads: Any) -> None:
    params = make_params()
    optimizer = optim.Lion(named(params), on_nonfinite="raise")
    give_grads(params, seed=0)
    params[2].grad[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"(?s)'layer\.2' of shape \(4, 3, 3, 3\).*[Nn]othing was"):
        optimizer.step()


def test_number_counts_all_parameters_of_all_groups(backend: str, make_params: Any, give_grads: Any) -> None:
    params = make_params()
    optimizer = optim.SGD([{"params": params[:3]}, {"params": params[3:]}], on_nonfinite="skip")
    give_grads(params, seed=0)
    params[1].grad = None  # not passed over in the count
    params[5].grad[9] = math.inf
    optimizer.step()
    assert optimizer.last_step.first_bad == "number 5"


def test_skipped_steps_count_on_after_a_good_step_and_a_copy(backend: str, make_params: Any, give_grads: Any) -> None:
    params = make_params()
    optimizer = optim.AdamW(params, on_nonfinite="skip", clip_norm=1.0)
    for step in range(6):
        give_grads(params, seed=step)
        if step % 2:
            params[0].grad[0, 0] = math.nan
        optimizer.step()
    assert optimizer.last_step.skipped_steps == 3
    assert float(optimizer.state[params[0]]["step"]) == 3.0
    assert not math.isfinite(optimizer.last_step.total_norm or math.nan)


def test_mixed_dtypes_name_the_first_in_order(backend: str) -> None:
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32]
    for bad in range(5):
        params = [torch.nn.Parameter(torch.zeros(9, dtype=d)) for d in dtypes]
        for param in params:
            param.grad = torch.ones_like(param)
        for later in range(bad, 5):
            params[later].grad[4] = math.nan
        optimizer = optim.SGD(params, on_nonfinite="skip")
        optimizer.step()
        assert optimizer.last_step.first_bad == f"number {bad}"
        assert not any(bool(p.any()) for p in params)
