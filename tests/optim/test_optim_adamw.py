"""pyft.optim.AdamW takes the place of torch.optim.AdamW."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyft.errors import NonFiniteError
from pyft.optim import AdamW

SHAPES = [(30, 20), (7,), (4, 3, 3, 3), (0,), ()]


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(*models: list[torch.nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for same in zip(*models, strict=True):
        grad = torch.randn(same[0].shape, generator=generator) * scale
        for param in same:
            param.grad = grad.to(param.dtype).clone()


def assert_same(ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter], tolerance: float = 1e-6) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


OPTIONS = [
    {},
    {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3},
    {"maximize": True, "weight_decay": 0.0},
    {"lr": torch.tensor(0.02)},
    {"betas": (0.0, 0.0)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_follows_torch(backend: str, options: dict, clip: float | None) -> None:
    ours, theirs = parameters(), parameters()
    a, b = AdamW(ours, clip_norm=clip, **options), torch.optim.AdamW(theirs, **options)
    start = [p.detach().clone() for p in ours]
    for step in range(20):
        give_gradients(ours, theirs, seed=step)
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(theirs, clip)
        a.step()
        b.step()
        if clip is not None:
            assert a.last_step.total_norm == pytest.approx(float(norm), rel=1e-6)
    assert_same(ours, theirs)
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(ours, start, strict=True) if p.numel())


def test_clip_coefficient_is_torch_s_to_the_bit(backend: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(ours, clip_norm=0.37)
    give_gradients(ours, theirs, seed=1)
    norm = torch.nn.utils.get_total_norm([p.grad for p in theirs])
    optimizer.step()
    coef = torch.clamp(0.37 / (torch.tensor(optimizer.last_step.total_norm) + 1e-6), max=1.0)
    assert optimizer.last_step.clip_coef == float(coef)
    assert float(norm) == pytest.approx(optimizer.last_step.total_norm, rel=2e-7)


def test_gradients_are_left_alone(backend: str) -> None:
    params = parameters()
    give_gradients(params, seed=0)
    before = [p.grad.clone() for p in params]
    AdamW(params, clip_norm=1e-3).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


@pytest.mark.parametrize("first", ["pyft", "torch"])
def test_state_dict_goes_both_ways_in_mid_training(backend: str, first: str) -> None:
    makers = {"pyft": AdamW, "torch": torch.optim.AdamW}
    ours, theirs = parameters(), parameters()
    a, b = makers[first](ours, lr=0.01), torch.optim.AdamW(theirs, lr=0.01)
    for step in range(5):
        give_gradients(ours, theirs, seed=step)
        a.step()
        b.step()
    buffer = io.BytesIO()
    torch.save(a.state_dict(), buffer)
    buffer.seek(0)
    second = makers["torch" if first == "pyft" else "pyft"](ours, lr=0.5)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(5, 10):
        give_gradients(ours, theirs, seed=step)
        second.step()
        b.step()
    assert_same(ours, theirs)
    assert float(second.state[ours[0]]["step"]) == 10.0
    assert second.param_groups[0]["lr"] == 0.01


def test_loads_state_of_torch_fused_and_foreach(backend: str) -> None:
    for option in ({"fused": True}, {"foreach": True}):
        ours, theirs = parameters(), parameters()
        b = torch.optim.AdamW(theirs, **option)
        for step in range(3):
            give_gradients(ours, theirs, seed=step)
            b.step()
        with torch.no_grad():
            for p, q in zip(ours, theirs, strict=True):
                p.copy_(q)
        a = AdamW(ours)
        a.load_state_dict(copy.deepcopy(b.state_dict()))
        give_gradients(ours, theirs, seed=9)
        a.step()
        b.step()
        assert_same(ours, theirs)


def test_loading_again_while_running_uses_the_loaded_state(backend: str) -> None:
    params = parameters()
    optimizer = AdamW(params, lr=0.01)
    give_gradients(params, seed=0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in params]
    runs = []
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(saved))
        with torch.no_grad():
            for p, w in zip(params, weights, strict=True):
                p.copy_(w)
        give_gradients(params, seed=1)
        optimizer.step()
        runs.append([p.detach().clone() for p in params])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
    assert float(optimizer.state[params[0]]["step"]) == 2.0


def test_state_replaced_by_hand_is_seen(backend: str) -> None:
    ours, theirs = parameters(), parameters()
    a, b = AdamW(ours), torch.optim.AdamW(theirs)
    for step in range(4):
        give_gradients(ours, theirs, seed=step)
        if step == 2:
            for optimizer, params in ((a, ours), (b, theirs)):
                optimizer.state[params[0]]["exp_avg"] = torch.ones_like(params[0])
                optimizer.state[params[1]]["step"] = torch.tensor(50.0)
        a.step()
        b.step()
    assert_same(ours, theirs)


def test_state_moved_in_place_is_seen(backend: str) -> None:
    ours, theirs = parameters(), parameters()
    a, b = AdamW(ours), torch.optim.AdamW(theirs)
    for step in range(5):
        give_gradients(ours, theirs, seed=step)
        if step == 2:
            for state in a.state.values():
                state["exp_avg"].data = state["exp_avg"].data.clone()
                state["exp_avg_sq"].data = state["exp_avg_sq"].data.clone()
        if step == 3:
            moment = a.state[ours[2]]["exp_avg"]
            moment.data = moment.data.to(memory_format=torch.channels_last)
        if step == 4:
            count = a.state[ours[1]]["step"]
            count.data = count.data.double()
        a.step()
        b.step()
    assert_same(ours, theirs)
    # What the optimizer would save is what it used.
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert_same([a.state[mine][key].double()], [b.state[other][key].double()])


def test_parameter_and_state_of_another_size(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([param])
    param.grad = torch.ones(3)
    optimizer.step()
    param.data = torch.ones(5)
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[param][key].data = torch.zeros(5)
    param.grad = torch.ones(5)
    optimizer.step()
    assert bool((param != 1.0).all())


def test_each_parameter_counts_its_own_steps(backend: str) -> None:
    ours, theirs = parameters(), parameters()
    a, b = AdamW(ours[:2], lr=0.01), torch.optim.AdamW(theirs[:2], lr=0.01)
    for step in range(8):
        give_gradients(ours, theirs, seed=step)
        if step == 3:
            a.add_param_group({"params": ours[2:], "lr": 0.1})
            b.add_param_group({"params": theirs[2:], "lr": 0.1})
        if step % 2:
            ours[1].grad = theirs[1].grad = None
        a.step()
        b.step()
    assert_same(ours, theirs)
    assert [float(a.state[p]["step"]) for p in ours] == [8.0, 4.0, 5.0, 5.0, 5.0]


def test_groups_with_names_schedulers_and_hooks(backend: str) -> None:
    ours, theirs = parameters(), parameters()

    def build(make, params):
        named = [(f"layer.{i}", p) for i, p in enumerate(params)]
        groups = [{"params": named[:2], "weight_decay": 0.0}, {"params": named[2:], "betas": (0.5, 0.6)}]
        return make(groups, lr=0.1)

    a, b = build(AdamW, ours), build(torch.optim.AdamW, theirs)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10) for o in (a, b)]
    called: list[int] = []
    a.register_step_post_hook(lambda *_: called.append(1))
    for step in range(9):
        give_gradients(ours, theirs, seed=step)
        a.step()
        b.step()
        for schedule in schedules:
            schedule.step()
    assert_same(ours, theirs, 3e-6)
    assert len(called) == 9
    assert a.state_dict()["param_groups"][0]["param_names"] == ["layer.0", "layer.1"]


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "gaps": lambda x: torch.stack([x, x], -1)[..., 1],
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_any_layout_of_parameter_and_gradient(backend: str, param_layout: str, grad_layout: str) -> None:
    value = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(LAYOUTS[param_layout](value)), torch.nn.Parameter(value.clone())
    assert ours.stride() == LAYOUTS[param_layout](value).stride()
    a, b = AdamW([ours], clip_norm=1.0), torch.optim.AdamW([theirs])
    for step in range(3):
        grad = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(step + 1))
        ours.grad, theirs.grad = LAYOUTS[grad_layout](grad), grad.clone()
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        a.step()
        b.step()
    assert_same([ours], [theirs])


def test_layout_or_storage_changed_between_steps(backend: str) -> None:
    value = torch.randn(6, 5, 4, 3)
    ours, theirs = torch.nn.Parameter(value.clone()), torch.nn.Parameter(value.clone())
    a, b = AdamW([ours]), torch.optim.AdamW([theirs])
    for step in range(4):
        if step == 1:
            ours.data = ours.data.to(memory_format=torch.channels_last)
        if step == 2:
            ours.data = ours.data.clone(memory_format=torch.contiguous_format)
        give_gradients([ours], [theirs], seed=step)
        a.step()
        b.step()
    assert_same([ours], [theirs])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(backend: str, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype=dtype), parameters(dtype=torch.float64)
    a, b = AdamW(ours, clip_norm=1.0), torch.optim.AdamW(theirs)
    for step in range(3):
        give_gradients(ours, theirs, seed=step)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        a.step()
        b.step()
    tolerance = 1e-7 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    assert_same([p.double() for p in ours], theirs, tolerance)


def test_mixed_dtypes_share_one_clip_norm(backend: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(9, dtype=d)) for d in (torch.float32, torch.float64, torch.bfloat16)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = AdamW(params, clip_norm=1.0)
    optimizer.step()
    assert optimizer.last_step.total_norm == pytest.approx(math.sqrt(27), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_gradient_raises_before_anything_is_written(backend: str, bad: float) -> None:
    params = parameters()
    optimizer = AdamW([(f"layer.{i}", p) for i, p in enumerate(params)], clip_norm=1.0)
    give_gradients(params, seed=0)
    optimizer.step()
    before = copy.deepcopy([p.detach() for p in params]), copy.deepcopy(optimizer.state_dict())
    give_gradients(params, seed=1)
    params[2].grad.view(-1)[5] = bad
    with pytest.raises(NonFiniteError, match=r"'layer\.2' of shape \(4, 3, 3, 3\)"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before[0], strict=True))
    for old, new in zip(before[1]["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_large_finite_gradients_do_not_overflow_the_norm(backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.full((4,), 3e38)
    optimizer = AdamW([param], lr=0.1, clip_norm=1.0, weight_decay=0.0)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((4,), -0.1), rtol=1e-4, atol=0)


def test_no_gradients_at_all_does_nothing(backend: str) -> None:
    params = parameters()
    optimizer = AdamW(params, clip_norm=1.0)
    optimizer.step()
    assert optimizer.last_step.total_norm is None
    assert not optimizer.state


def test_closure_is_called_with_gradients_on(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([param], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert (param < 1).all()


def test_deepcopy_goes_its_own_way(backend: str) -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = AdamW(model.parameters(), clip_norm=0.5)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    other_model, other = copy.deepcopy((model, optimizer))
    frozen = [p.detach().clone() for p in model.parameters()]
    other_model(torch.ones(1, 4)).sum().backward()
    other.step()
    assert other.clip_norm == 0.5
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), frozen, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(other_model.parameters(), frozen, strict=True))


def test_autograd_notices_a_stale_value(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    loss = (param * param).sum()
    param.grad = torch.ones(3)
    AdamW([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_grad_scaler_works(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AdamW([param], lr=0.1, clip_norm=1.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert float(optimizer.state[param]["step"]) == 2.0
    assert torch.isfinite(param).all()


def test_thousand_parameters_of_size_one(backend: str) -> None:
    ours = [torch.nn.Parameter(torch.full((1,), float(i))) for i in range(1000)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a, b = AdamW(ours), torch.optim.AdamW(theirs)
    give_gradients(ours, theirs, seed=0)
    a.step()
    b.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be 0 or more, got -1.0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\)"),
        ({"eps": -1e-8}, "eps must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"clip_norm": -1.0}, "clip_norm must be above 0"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(parameters(), **options)


def test_parameters_that_cannot_be_updated_are_refused() -> None:
    with pytest.raises(ValueError, match=r"params\[0\].*share memory"):
        AdamW([torch.nn.Parameter(torch.ones(1).expand(4))])
    with pytest.raises(TypeError, match=r"complex64"):
        AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"gradient of shape \(5, 3\) is sparse"):
        AdamW(table.parameters()).step()


def test_amsgrad_of_a_loaded_group_is_taken_over(backend: str) -> None:
    ours, theirs = parameters(), parameters()
    b = torch.optim.AdamW(theirs, amsgrad=True)
    a = AdamW(ours)
    for step in range(4):
        give_gradients(ours, theirs, seed=step)
        b.step()
        if step == 1:
            a.load_state_dict(copy.deepcopy(b.state_dict()))
            with torch.no_grad():
                for p, q in zip(ours, theirs, strict=True):
                    p.copy_(q)
        elif step > 1:
            a.step()
    assert_same(ours, theirs)
    assert_same([a.state[ours[0]]["max_exp_avg_sq"]], [b.state[theirs[0]]["max_exp_avg_sq"]])


def test_what_was_loaded_is_not_changed_by_steps(backend: str) -> None:
    params = parameters()
    a = AdamW(params)
    give_gradients(params, params, seed=0)
    a.step()
    kept = copy.deepcopy(a.state_dict())
    before = copy.deepcopy(kept)
    b = AdamW(params)
    b.load_state_dict(kept)
    b.step()
    for number, of_one in before["state"].items():
        assert all(torch.equal(value, kept["state"][number][key]) for key, value in of_one.items())


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_refused_first_step_leaves_no_state(backend: str, policy: str) -> None:
    params = parameters()
    give_gradients(params, params, seed=0)
    params[1].grad[2] = float("nan")
    optimizer = AdamW(params, on_nonfinite=policy)
    if policy == "raise":
        with pytest.raises(NonFiniteError, match="number 1"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.last_step.skipped
    assert optimizer.state_dict()["state"] == {}
    params[1].grad[2] = 0.0
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [1.0] * len(params)


def test_refused_group_leaves_the_optimizer_as_it_was() -> None:
    optimizer = AdamW(parameters())
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


def test_hooks_and_profiler_see_every_step() -> None:
    params = parameters()
    optimizer = AdamW(params)
    give_gradients(params, params, seed=0)
    calls: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global")),
    ]
    assert optimizer.step(lambda: 3.0) == 3.0
    assert calls == ["before", "after", "global"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(calls) == 3
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert [event.count for event in profile.key_averages() if event.key == "Optimizer.step#AdamW.step"] == [1]
