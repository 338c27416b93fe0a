"""Work done during backward: the norm, the step itself; gradients freed as soon as they are used."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from family_float64 import NAMES

from pyft import optim
from pyft.errors import NonFiniteError
from pyft.optim import norm_in_backward


def network(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 36, 20),
        torch.nn.Linear(20, 2),
    )


def loss_of(model: torch.nn.Module, seed: int) -> torch.Tensor:
    batch = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return model(batch).square().sum()


def norm_of(params: Any) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in params if p.grad is not None))


# The norm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("options", [{}, {"clip_value": 0.01}, {"clip_mode": "group"}, {"clip_mode": "tensor"}])
def test_norm_in_backward_changes_no_result(backend: str, accumulate: int, options: dict, assert_equal: Any) -> None:
    results, reports = [], []
    for in_backward in (False, True):
        model = network()
        groups = [{"params": list(model[:3].parameters())}, {"params": list(model[3:].parameters())}]
        norms = norm_in_backward(model.parameters(), accumulate=accumulate) if in_backward else None
        optimizer = optim.AdamW(groups, lr=0.01, clip_norm=0.5, norm_in_backward=norms, **options)
        for step in range(4):
            optimizer.zero_grad()
            for micro in range(accumulate):
                loss_of(model, 10 * step + micro).backward()
            if not options:
                want = norm_of(model.parameters())
            optimizer.step()
            if not options:
                assert optimizer.last_step.total_norm == pytest.approx(want, rel=1e-7)
            reports.append(optimizer.last_step)
        results.append([p.detach() for p in model.parameters()])
    for plain, other in zip(reports[:4], reports[4:], strict=True):
        assert other.total_norm == pytest.approx(plain.total_norm, rel=1.2e-7)
        assert other.clip_coef == pytest.approx(plain.clip_coef, rel=2.4e-7)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


CHANGES = {
    "scaled in place": lambda p: p.grad.mul_(3.0),
    "one element": lambda p: p.grad.view(-1)[0].fill_(100.0),
    "clipped by torch": lambda p: torch.nn.utils.clip_grad_norm_([p], 1e-3),
    "foreach": lambda p: torch._foreach_mul_([p.grad], 3.0),
    "replaced": lambda p: setattr(p, "grad", p.grad * 3.0),
    "zeroed": lambda p: p.grad.zero_(),
    "dropped": lambda p: setattr(p, "grad", None),
    "unscaled by GradScaler": lambda p: torch._amp_foreach_non_finite_check_and_unscale_(
        [p.grad], torch.zeros(1), torch.full((1,), 0.125)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_gradient_changed_after_backward_is_summed_again(backend: str, change: str) -> None:
    model = network()
    norms = norm_in_backward(model.parameters())
    optimizer = optim.SGD(model.parameters(), clip_norm=1e-2, norm_in_backward=norms)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        CHANGES[change](model[3].weight)
        want = norm_of(model.parameters())
        optimizer.step()
        assert optimizer.last_step.total_norm == pytest.approx(want, rel=1e-6)


def test_new_gradient_at_the_address_of_the_old_one(backend: str) -> None:
    """An allocator gives freed memory back: same address, same version, other gradient."""
    param = torch.nn.Parameter(torch.zeros(1000))
    norms = norm_in_backward([param])
    optimizer = optim.SGD([param], clip_norm=1.0, norm_in_backward=norms)
    for factor in (2.0, 3.0, 5.0):
        (param * 1.0).sum().backward()
        optimizer.step()
        for _ in range(5):
            param.grad = None
            param.grad = torch.full((1000,), factor)
            optimizer.step()
            assert optimizer.last_step.total_norm == pytest.approx(factor * math.sqrt(1000), rel=1e-6)
        param.grad = None


def test_last_micro_batch_may_be_missing_or_one_more(backend: str) -> None:
    for backwards in (1, 2, 3, 4, 5):
        model = network()
        norms = norm_in_backward(model.parameters(), accumulate=3)
        optimizer = optim.SGD(model.parameters(), lr=1e-4, clip_norm=1.0, norm_in_backward=norms)
        for step in range(3):
            optimizer.zero_grad()
            for micro in range(backwards if step == 1 else 3):
                loss_of(model, 10 * step + micro).backward()
            want = norm_of(model.parameters())
            optimizer.step()
            assert optimizer.last_step.total_norm == pytest.approx(want, rel=1e-6), (backwards, step)


def test_parameter_not_used_in_every_micro_batch(backend: str) -> None:
    a, b = torch.nn.Parameter(torch.ones(300)), torch.nn.Parameter(torch.ones(200))
    norms = norm_in_backward([a, b], accumulate=2)
    optimizer = optim.SGD([a, b], lr=1e-4, clip_norm=1.0, norm_in_backward=norms)
    for step in range(4):
        optimizer.zero_grad()
        (a.sum() * 2.0 + b.sum() * (3.0 + step)).backward()
        a.sum().backward()
        want = norm_of([a, b])
        optimizer.step()
        assert optimizer.last_step.total_norm == pytest.approx(want, rel=1e-6)


def test_step_without_a_new_backward(backend: str) -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), clip_norm=1.0, norm_in_backward=norm_in_backward(model.parameters()))
    loss_of(model, 0).backward()
    want = norm_of(model.parameters())
    for _ in range(3):
        optimizer.step()
        assert optimizer.last_step.total_norm == pytest.approx(want, rel=1e-6)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert optimizer.last_step.total_norm == 0.0


def test_parameters_outside_the_handle_and_tied_weights(backend: str) -> None:
    a, b, c = (torch.nn.Parameter(torch.ones(300)) for _ in range(3))
    norms = norm_in_backward([a, c])
    optimizer = optim.SGD([a, b], lr=1e-3, clip_norm=1.0, norm_in_backward=norms)  # c is not the optimizer's
    for _ in range(2):
        optimizer.zero_grad()
        c.grad = None
        (a.square().sum() + (a * b).sum() + c.sum()).backward()  # a is used three times
        want = norm_of([a, b])
        optimizer.step()
        assert optimizer.last_step.total_norm == pytest.approx(want, rel=1e-6)


def test_handle_is_removed(backend: str) -> None:
    model = network()
    norms = norm_in_backward(model.parameters())
    optimizer = optim.SGD(model.parameters(), clip_norm=1.0, norm_in_backward=norms)
    loss_of(model, 0).backward()
    optimizer.step()
    norms.remove()
    norms.remove()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        want = norm_of(model.parameters())
        optimizer.step()
        assert optimizer.last_step.total_norm == pytest.approx(want, rel=1e-6)
    with norm_in_backward(model.parameters()):
        assert all(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_handle_keeps_no_gradient_alive(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(300))
    norms = norm_in_backward([param])
    optimizer = optim.SGD([param], clip_norm=1.0, norm_in_backward=norms)
    param.sum().backward()
    seen = weakref.ref(param.grad)
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("policy", ["skip", "raise"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_gradient_seen_in_backward(backend: str, policy: str, bad: float) -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    norms = norm_in_backward(model.parameters())
    optimizer = optim.AdamW(model.named_parameters(), clip_norm=1.0, norm_in_backward=norms, on_nonfinite=policy)
    (loss_of(model, 0) + (model[3].bias * bad).sum()).backward()
    if policy == "skip":
        optimizer.step()
        assert optimizer.last_step.first_bad == "3.bias"
    else:
        with pytest.raises(NonFiniteError, match=r"3\.bias"):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()
    assert not optimizer.last_step.skipped


def test_norm_in_backward_with_a_grad_scaler(backend: str) -> None:
    """GradScaler divides the gradients after backward, without a trace in their version."""
    param = torch.nn.Parameter(torch.zeros(1000))
    norms = norm_in_backward([param])
    optimizer = optim.SGD([param], lr=1.0, clip_norm=1.0, norm_in_backward=norms)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    assert optimizer.last_step.total_norm == pytest.approx(math.sqrt(1000), rel=1e-6)
    assert float(param.detach().norm()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_norm_in_backward_of_other_dtypes(backend: str, dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(torch.ones(9000, dtype=dtype))
    norms = norm_in_backward([param])
    optimizer = optim.SGD([param], lr=0.1, clip_norm=1.0, norm_in_backward=norms)
    (param * 1000.0).sum().backward()
    optimizer.step()
    assert optimizer.last_step.total_norm == pytest.approx(1000 * math.sqrt(9000), rel=1e-6)


# The step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_norm": 0.05, "clip_mode": "tensor"},
        {"clip_norm": 0.01, "clip_mode": "agc", "clip_value": 0.5},
        {"state_dtype": "int8"},
        {"decay_to_init": 0.1},
    ],
)
def test_step_in_backward_is_the_usual_step(backend: str, name: str, options: dict, assert_equal: Any) -> None:
    if name == "Adafactor" and "state_dtype" in options:
        pytest.skip("its moments are small, and float32")
    results = []
    for in_backward in (False, True):
        model = network()
        optimizer = getattr(optim, name)(model.parameters(), lr=1e-3, step_in_backward=in_backward, **options)
        for step in range(4):
            loss_of(model, step).backward()
            if in_backward:
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])
        assert all(float(s["step"]) == 4.0 for s in optimizer.state.values() if "step" in s)
        assert len(optimizer.state) == 6 or name == "SGD"
    assert_equal(*results)
    assert not torch.equal(results[1][0], next(network().parameters()))


def test_gradients_are_never_all_alive(backend: str) -> None:
    depth, alive, most = 8, [0], [0]
    layers = torch.nn.Sequential(*[torch.nn.Linear(16, 16, bias=False) for _ in range(depth)])

    def count(*_: object) -> None:
        alive[0] = sum(p.grad is not None for p in layers.parameters())
        most[0] = max(most[0], alive[0])

    handles = [p.register_post_accumulate_grad_hook(count) for p in layers.parameters()]
    optimizer = optim.AdamW(layers.parameters(), step_in_backward=True)
    before = [p.detach().clone() for p in layers.parameters()]
    layers(torch.ones(2, 16)).sum().backward()
    assert most[0] == 1
    assert all(p.grad is None for p in layers.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(layers.parameters(), before, strict=True))
    for handle in handles:
        handle.remove()
    optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 1.0},
        {"clip_norm": 1.0, "clip_mode": "global"},
        {"clip_norm": 1.0, "clip_mode": "group"},
        {"clip_norm": {"tensor": 1.0, "global": 1.0}},
        {"clip_norm": {"agc": 0.1, "group": 1.0}},
    ],
)
def test_clipping_that_needs_all_gradients_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="step_in_backward"):
        optim.AdamW(network().parameters(), step_in_backward=True, **options)


def test_step_in_backward_counts_a_tied_weight_once(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9, step_in_backward=True)
    (param.sum() + (param * 2.0).sum()).backward()
    torch.testing.assert_close(param.detach(), torch.full((4,), 0.7))
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((4,), 0.7))


def test_step_in_backward_sees_schedulers_and_later_groups(backend: str) -> None:
    a, b = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    optimizer = optim.SGD([a], lr=0.1, step_in_backward=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    a.sum().backward()
    optimizer.step()
    schedule.step()
    optimizer.add_param_group({"params": [b], "lr": 0.5})
    (a.sum() + b.sum()).backward()
    optimizer.step()
    torch.testing.assert_close(a.detach(), torch.full((4,), 0.89))
    torch.testing.assert_close(b.detach(), torch.full((4,), 0.5))
    assert a.grad is None
    assert b.grad is None


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_step_in_backward_decides_for_each_parameter(backend: str, policy: str) -> None:
    a, b = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    optimizer = optim.AdamW([("a", a), ("b", b)], lr=0.1, on_nonfinite=policy, step_in_backward=True)
    loss = (a * 1.0).sum() + (b * math.nan).sum()
    if policy == "skip":
        loss.backward()
        optimizer.step()
        assert bool((a < 1.0).all())
        assert optimizer.last_step.first_bad == "b"
        assert optimizer.last_step.skipped_steps == 1
    else:
        with pytest.raises(NonFiniteError, match="'b'"):
            loss.backward()
    assert bool((b == 1.0).all())
    assert not optimizer.state.get(b) or float(optimizer.state[b]["step"]) == 0.0


def test_step_in_backward_survives_a_copy(backend: str) -> None:
    """Hooks are not copied with parameters: a copied optimizer must hang its own on them."""
    model = network()
    optimizer = optim.AdamW(model.parameters(), lr=0.01, step_in_backward=True)
    loss_of(model, 0).backward()
    optimizer.step()
    other_model, other = copy.deepcopy((model, optimizer))
    kept = [p.detach().clone() for p in model.parameters()]
    loss_of(other_model, 1).backward()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), kept, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(other_model.parameters(), kept, strict=True))
    loss_of(model, 1).backward()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other_model.parameters(), strict=True))


def test_step_in_backward_resumes(backend: str, assert_equal: Any) -> None:
    straight, stopped = network(), network()
    a, b = (optim.AdamW(m.parameters(), step_in_backward=True) for m in (straight, stopped))
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy((stopped.state_dict(), b.state_dict()))
            del b
            gc.collect()
            stopped = network(seed=9)
            b = optim.AdamW(stopped.parameters(), step_in_backward=True)
            stopped.load_state_dict(saved[0])
            b.load_state_dict(saved[1])
        for model, optimizer in ((straight, a), (stopped, b)):
            loss_of(model, step).backward()
            optimizer.step()
    assert_equal(straight.parameters(), stopped.parameters())


# Freeing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_grads_free(backend: str, name: str, assert_equal: Any) -> None:
    results = []
    for grads in ("keep", "free"):
        model = network()
        optimizer = getattr(optim, name)(model.parameters(), grads=grads, clip_norm=0.5)
        for step in range(3):
            loss_of(model, step).backward()
            optimizer.step()
            assert all((p.grad is None) == (grads == "free") for p in model.parameters())
            optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])
    assert_equal(*results)


def test_freed_gradients_are_gone(backend: str) -> None:
    params = [torch.nn.Parameter(torch.ones(300)), torch.nn.Parameter(torch.ones(6, 5, 4, 3))]
    optimizer = optim.AdamW(params, grads="free", clip_norm=1.0)
    for _ in range(2):
        params[0].grad = torch.ones(300)
        params[1].grad = torch.ones(3, 4, 5, 6).permute(3, 2, 1, 0)  # relaid for the core
        seen = [weakref.ref(p.grad) for p in params]
        optimizer.step()
        gc.collect()
        assert all(ref() is None for ref in seen)


def test_kept_gradients_are_the_same_objects(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(300))
    param.grad = grad = torch.ones(300)
    optim.AdamW([param], clip_norm=1e-3, clip_value=0.5).step()
    assert param.grad is grad
    assert bool((grad == 1.0).all())
