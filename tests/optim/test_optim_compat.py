"""In anybody's loop: copies, files, schedulers, scalers, hooks, closures, keywords of torch, torch.compile."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from family_float64 import NAMES
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyft import optim

IN_TORCH = [name for name in NAMES if hasattr(torch.optim, name)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"clip_norm": {"agc": 0.1, "global": 1.0}, "clip_value": 0.5, "on_nonfinite": "skip"},
    {"decay_to_init": 0.1, "init_dtype": "bfloat16", "grads": "free"},
    {"state_dtype": "int8"},
    {"state_dtype": "bfloat16", "seed": 7},
    {"weights": "split32"},
]


def two_layers(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def backward(model: torch.nn.Module, seed: int) -> torch.Tensor:
    batch = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
    loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
    loss.backward()
    return loss


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_goes_its_own_way(backend: str, name: str, options: dict, assert_equal: Any) -> None:
    if name == "Adafactor" and "state_dtype" in options:
        pytest.skip("its moments are small, and float32")
    model = two_layers()
    optimizer = getattr(optim, name)(model.parameters(), lr=0.01, **options)
    backward(model, 0)
    optimizer.step()
    other_model, other = copy.deepcopy((model, optimizer))
    kept = [p.detach().clone() for p in model.parameters()]
    for step in range(1, 3):
        other.zero_grad()
        backward(other_model, step)
        other.step()
    assert_equal(model.parameters(), kept)
    assert not any(torch.equal(p, q) for p, q in zip(other_model.parameters(), kept, strict=True))
    for step in range(1, 3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    assert_equal(model.parameters(), other_model.parameters())
    assert (optimizer.last_step is None) == (other.last_step is None)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_state_dict_is_plain_data(backend: str, name: str, options: dict) -> None:
    if name == "Adafactor" and "state_dtype" in options:
        pytest.skip("its moments are small, and float32")
    model = two_layers()
    optimizer = getattr(optim, name)(model.parameters(), **options)
    backward(model, 0)
    optimizer.step()
    state_dict = optimizer.state_dict()
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    for copied in (pickle.loads(pickle.dumps(state_dict)), torch.load(buffer, weights_only=True)):
        assert copied["param_groups"] == state_dict["param_groups"]
        for number, state in state_dict["state"].items():
            assert list(copied["state"][number]) == list(state)
            assert all(torch.equal(copied["state"][number][key], value) for key, value in state.items())
    kinds = (int, float, str, bool, type(None), list, tuple, dict)
    assert all(isinstance(value, kinds) for group in state_dict["param_groups"] for value in group.values())


@pytest.mark.parametrize("name", NAMES)
def test_whole_optimizer_is_pickled(backend: str, name: str, assert_equal: Any) -> None:
    model = two_layers()
    optimizer = getattr(optim, name)(model.parameters(), clip_norm=1.0, weights="split32")
    backward(model, 0)
    optimizer.step()
    other_model, other = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), (other_model, other)):
        o.zero_grad()
        backward(m, 1)
        o.step()
    assert_equal(model.parameters(), other_model.parameters())


@pytest.mark.parametrize("keyword", ["foreach", "fused"])
@pytest.mark.parametrize("name", IN_TORCH)
def test_paths_of_torch_are_ignored_with_a_note(name: str, keyword: str) -> None:
    if keyword == "fused" and name in ("RMSprop", "Adafactor"):
        pytest.skip("torch has no such keyword here")
    cls = getattr(optim, name)
    with pytest.warns(UserWarning, match=f"ignored.*{keyword}|{keyword}.*ignored") as caught:
        cls(two_layers().parameters(), **{keyword: True})
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls(two_layers().parameters(), **{keyword: False})
        cls(two_layers().parameters(), **{keyword: None})


@pytest.mark.parametrize("keyword", ["capturable", "differentiable"])
@pytest.mark.parametrize("name", IN_TORCH)
def test_what_cannot_be_done_is_refused(name: str, keyword: str) -> None:
    import inspect

    cls = getattr(optim, name)
    if keyword not in inspect.signature(getattr(torch.optim, name).__init__).parameters:
        pytest.skip("torch has no such keyword here")
    with pytest.raises(ValueError, match=keyword):
        cls(two_layers().parameters(), **{keyword: True})
    cls(two_layers().parameters(), **{keyword: False})


@pytest.mark.parametrize("name", NAMES)
def test_sparse_gradient_is_refused_by_name(backend: str, name: str) -> None:
    table = torch.nn.Embedding(5, 3, sparse=True)
    other = torch.nn.Parameter(torch.ones(3))
    before = table.weight.detach().clone()
    for options in ({}, {"clip_norm": 1.0}, {"on_nonfinite": "skip"}):
        optimizer = getattr(optim, name)([other, table.weight], **options)
        optimizer.zero_grad()
        (table(torch.tensor([1])) * other).sum().backward()
        with pytest.raises(TypeError, match=r"\(5, 3\).*sparse"):
            optimizer.step()
        assert torch.equal(table.weight, before)
        assert bool((other == 1.0).all())


def test_parameters_that_cannot_be_updated_are_refused() -> None:
    for name in NAMES:
        with pytest.raises(ValueError, match=r"params\[1\].*share memory"):
            getattr(optim, name)([torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1).expand(4))])
        with pytest.raises(TypeError, match="complex64"):
            getattr(optim, name)([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clip_norm", [None, 1e9])
def test_gradient_of_another_size_is_refused(backend: str, name: str, clip_norm: float | None) -> None:
    """Reached by way of .data; reading on past its end would train on whatever is there."""
    for fresh in (True, False):
        for change in ("gradient", "parameter"):
            param = torch.nn.Parameter(torch.ones(40))
            optimizer = getattr(optim, name)([param], clip_norm=clip_norm)
            param.grad = torch.ones(40)
            if not fresh:
                optimizer.step()
            if change == "gradient":
                param.grad.data = torch.ones(10)
            else:
                param.data = torch.ones(90)
                for moment in optimizer.state[param].values() if param in optimizer.state else ():
                    if moment.ndim > 0:
                        moment.data = torch.zeros(90)
            before = param.detach().clone()
            with pytest.raises((ValueError, RuntimeError), match=r"size|shape"):
                optimizer.step()
            assert torch.equal(param, before)


def test_options_that_are_not_for_groups_are_refused_there() -> None:
    """Else a group's clip_norm would be, in silence, not done."""
    for key, value in (("clip_norm", 1.0), ("clip_value", 1.0), ("state_dtype", "int8"), ("on_nonfinite", "skip")):
        with pytest.raises((TypeError, ValueError), match=key):
            optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(3))], key: value}])


def test_refused_group_leaves_the_optimizer_as_it_was() -> None:
    for name in NAMES:
        optimizer = getattr(optim, name)(two_layers().parameters())
        for group in ({"lr": -1.0}, {"decay_to_init": -1.0}):
            with pytest.raises(ValueError, match=next(iter(group))):
                optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], **group})
        assert len(optimizer.param_groups) == 1


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1.0 / (1 + epoch)),
    "Cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "OneCycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.05, 3),
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, "ReduceLROnPlateau"])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_any_scheduler(backend: str, name: str, scheduler: str, tensor_lr: bool, assert_near: Any) -> None:
    if tensor_lr and scheduler == "ReduceLROnPlateau":
        pytest.skip("torch's compares the rate with a float")
    momentum = {"momentum": 0.9} if name != "AdamW" else {}
    models = two_layers(), two_layers()
    both = []
    for cls, model in zip((getattr(optim, name), getattr(torch.optim, name)), models, strict=True):
        both.append(cls(model.parameters(), lr=torch.tensor(0.01) if tensor_lr else 0.01, **momentum))
    if scheduler == "ReduceLROnPlateau":
        plans = [lr_scheduler.ReduceLROnPlateau(o, patience=0) for o in both]
    else:
        plans = [SCHEDULERS[scheduler](o) for o in both]
    for _ in range(9):
        for model, optimizer, plan in zip(models, both, plans, strict=True):
            optimizer.zero_grad()
            backward(model, 0)
            optimizer.step()
            if scheduler == "ReduceLROnPlateau":
                plan.step(1.0)
            else:
                plan.step()
        assert float(both[0].param_groups[0]["lr"]) == float(both[1].param_groups[0]["lr"])
        assert both[0].param_groups[0].get("betas") == both[1].param_groups[0].get("betas")
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_near(mine, other, 60)


def test_tensor_rate_changed_in_place(backend: str) -> None:
    for name in NAMES:
        lr = torch.tensor(0.1)
        param = torch.nn.Parameter(torch.full((4,), 10.0))
        optimizer = getattr(optim, name)([param], lr=lr)
        param.grad = torch.ones(4)
        optimizer.step()
        lr.zero_()
        before = param.detach().clone()
        optimizer.step()
        assert torch.equal(param, before), name
        assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("name", NAMES)
def test_closure(backend: str, name: str) -> None:
    for options in ({}, {"grads": "free", "clip_norm": 1.0}):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = getattr(optim, name)([param], lr=0.1, **options)
        calls: list[bool] = []

        def closure(param: Any = param, optimizer: Any = optimizer, calls: Any = calls) -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = param.square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 3.0
        assert calls == [True]
        assert bool((param < 1.0).all())


@pytest.mark.parametrize("name", NAMES)
def test_hooks_and_profiler_see_every_step(name: str) -> None:
    model = two_layers()
    optimizer = getattr(optim, name)(model.parameters(), on_nonfinite="skip")
    backward(model, 0)
    calls: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global")),
    ]
    optimizer.step()
    next(model.parameters()).grad.fill_(float("nan"))
    optimizer.step()
    assert calls == ["before", "after", "global"] * 2
    for handle in handles:
        handle.remove()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert [e.count for e in profile.key_averages() if e.key == f"Optimizer.step#{name}.step"] == [1]


def test_hooks_of_state_dicts(backend: str) -> None:
    model = two_layers()
    optimizer = optim.Lion(model.parameters())
    seen: list[str] = []
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saved", "loading", "loaded"]


@pytest.mark.parametrize("name", NAMES)
def test_named_parameters(backend: str, name: str) -> None:
    model = two_layers()
    groups = [{"params": list(model.named_parameters())[:2]}, {"params": list(model.named_parameters())[2:], "lr": 0.5}]
    optimizer = getattr(optim, name)(groups)
    backward(model, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["0.weight", "0.bias"]
    assert saved["param_groups"][1]["param_names"] == ["2.weight", "2.bias"]
    second = getattr(optim, name)(model.parameters())
    with pytest.raises(ValueError, match="group"):
        second.load_state_dict(saved)


@pytest.mark.parametrize("name", NAMES)
def test_grad_scaler(backend: str, name: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = getattr(optim, name)([param], lr=0.01, clip_norm=1.0)
    norms = []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        norms.append(optimizer.last_step.total_norm)
    assert norms == [pytest.approx(3**0.5, rel=1e-6)] * 3  # the second step was the scaler's to skip
    assert float(optimizer.state[param].get("step", 2.0)) == 2.0
    assert scaler.get_scale() == 512.0
    assert bool(torch.isfinite(param).all())


@pytest.mark.parametrize("name", NAMES)
def test_autograd_notices_a_stale_value(backend: str, name: str) -> None:
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"weights": "split32"})):
        param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        loss = (param * param).sum()
        param.grad = torch.ones(3, dtype=dtype)
        getattr(optim, name)([param], **options).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("name", NAMES)
def test_compiled_training_step(backend: str, name: str) -> None:
    results = []
    for compiled in (False, True):
        model = two_layers()
        optimizer = getattr(optim, name)(model.parameters(), lr=0.01, clip_norm=1.0)

        def train(seed: int, model: Any = model, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = backward(model, seed)
            optimizer.step()
            return loss

        run = torch.compile(train, backend="eager") if compiled else train
        for step in range(3):
            run(step)
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert all(not torch.equal(a, b) for a, b in zip(results[1], two_layers().parameters(), strict=True))


def test_parameters_no_longer_trained(backend: str) -> None:
    """Freezing in mid-training: a parameter without requires_grad keeps what it has, as its gradient is None."""
    for name in NAMES:
        model = two_layers()
        optimizer = getattr(optim, name)(model.parameters(), weight_decay=0.1)
        backward(model, 0)
        optimizer.step()
        model[0].requires_grad_(False)
        optimizer.zero_grad()
        kept = [p.detach().clone() for p in model[0].parameters()]
        backward(model, 1)
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), kept, strict=True))


def test_state_moved_or_replaced_by_hand_is_seen(backend: str, make_params: Any, give_grads: Any) -> None:
    for name, key, options in (
        ("SGD", "momentum_buffer", {"momentum": 0.9}),
        ("RMSprop", "square_avg", {}),
        ("Adagrad", "sum", {}),
        ("Adam", "exp_avg_sq", {}),
    ):
        ours, theirs = make_params(), make_params()
        a, b = getattr(optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
        for step in range(4):
            give_grads(ours, theirs, seed=step)
            if step == 2:
                for optimizer, params in ((a, ours), (b, theirs)):
                    optimizer.state[params[0]][key] = torch.ones_like(params[0])
                    moment = optimizer.state[params[2]][key]
                    moment.data = moment.data.to(memory_format=torch.channels_last) * 2.0
            a.step()
            b.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.detach(), other.detach(), rtol=1e-5, atol=1e-6)


def test_no_gradients_at_all(backend: str) -> None:
    for name in NAMES:
        model = two_layers()
        optimizer = getattr(optim, name)(model.parameters(), clip_norm=1.0, on_nonfinite="skip")
        kept = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert optimizer.last_step.total_norm is None
        assert optimizer.last_step.clip_coef == 1.0
        assert not optimizer.last_step.skipped
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), kept, strict=True))


def test_repr_shows_the_options() -> None:
    for name in NAMES:
        text = repr(getattr(optim, name)(two_layers().parameters(), lr=0.125))
        assert text.startswith(f"{name} (")
        assert "lr: 0.125" in text


def test_last_step_is_a_plain_record(backend: str) -> None:
    import dataclasses

    model = two_layers()
    optimizer = optim.AdamW(model.parameters(), clip_norm=0.1)
    backward(model, 0)
    optimizer.step()
    record = dataclasses.asdict(optimizer.last_step)
    assert list(record) == ["total_norm", "clip_coef", "skipped", "first_bad", "skipped_steps"]
    assert isinstance(record["total_norm"], float)
    assert isinstance(record["clip_coef"], float)
    assert record["clip_coef"] == pytest.approx(0.1 / record["total_norm"], rel=1e-4)
    assert (record["skipped"], record["first_bad"], record["skipped_steps"]) == (False, None, 0)
