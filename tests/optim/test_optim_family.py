"""Every class of pyft.optim against its float64 oracle and against torch.optim: options, sizes, layouts, threads."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from family_float64 import CASE_IDS, CASES, ELEMENTWISE, NAMES, follow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyft import optim

STEPS = 20
IN_TORCH = [name for name in NAMES if hasattr(torch.optim, name)]


def options_of(name: str) -> dict[str, Any]:
    """Options under which a class keeps all the state it can have."""
    return {
        "SGD": {"momentum": 0.9, "lr": 0.01},
        "RMSprop": {"momentum": 0.9, "centered": True},
        "Adam": {"amsgrad": True},
        "Lion": {"lr": 1e-3},
    }.get(name, {})


@pytest.mark.parametrize(("name", "options"), CASES, ids=CASE_IDS)
def test_follows_float64(
    backend: str, name: str, options: dict, make_params: Any, give_grads: Any, assert_near: Any, array: Any
) -> None:
    params = make_params()
    optimizer = getattr(optim, name)(params, **options)
    start = [array(p) for p in params]
    history: list[list[np.ndarray | None]] = [[] for _ in params]
    for step in range(STEPS):
        give_grads(params, seed=step)
        if step % 3 == 1:
            params[1].grad = None
        for seen, param in zip(history, params, strict=True):
            seen.append(None if param.grad is None else array(param.grad))
        optimizer.step()
    for param, first, seen in zip(params, start, history, strict=True):
        theta, state = follow(name, first, seen, **options)
        assert_near(param, theta, STEPS)
        for key, value in optimizer.state[param].items():
            if isinstance(value, torch.Tensor) and key in state:
                assert_near(value, state[key], STEPS)
        assert float(optimizer.state[param].get("step", state["step"])) == state["step"]
        # Far beyond the tolerance: an optimizer that does nothing fails here.
        assert param.numel() == 0 or np.abs(theta - first).max() > 40 * 4 * 2.0**-24 * STEPS


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] in IN_TORCH])
@pytest.mark.parametrize("clip", ["none", "norm", "value"])
def test_follows_torch(
    backend: str, name: str, options: dict, clip: str, make_params: Any, give_grads: Any, assert_near: Any
) -> None:
    # torch's Adafactor divides by the number of elements.
    shapes = [(30, 20), (7,), (4, 3, 3, 3), (), (257,)]
    ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)
    clipping = {"norm": {"clip_norm": 0.5}, "value": {"clip_value": 0.3}}.get(clip, {})
    a, b = getattr(optim, name)(ours, **options, **clipping), getattr(torch.optim, name)(theirs, **options)
    for step in range(STEPS):
        give_grads(ours, theirs, seed=step)
        if clip == "norm":
            torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        elif clip == "value":
            torch.nn.utils.clip_grad_value_(theirs, 0.3)
        a.step()
        b.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other, 2 * STEPS)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_at_odd_offsets_write_nothing_outside(backend: str, name: str, assert_near: Any, array: Any) -> None:
    sentinel = 12345.0
    for size in [0, 1, 2, 7, 8, 9, 15, 16, 17, 255, 256, 257, 511, 513, 16383, 16384, 16385, 131_073]:
        holder = torch.full((size + 64,), sentinel)
        offset = 1 + size % 13
        generator = torch.Generator().manual_seed(size)
        with torch.no_grad():
            holder[offset : offset + size].copy_(torch.randn(size, generator=generator))
        param = torch.nn.Parameter(holder[offset : offset + size])
        assert param.data_ptr() == holder.data_ptr() + 4 * offset or size == 0
        grad_holder = torch.full((size + 64,), sentinel)
        start, history = array(param).copy(), []
        optimizer = getattr(optim, name)([param], clip_norm=1e9, **options_of(name))
        for _ in range(2):
            grad_holder[offset + 2 : offset + 2 + size] = torch.randn(size, generator=generator)
            param.grad = grad_holder[offset + 2 : offset + 2 + size]
            history.append(array(param.grad).copy())
            optimizer.step()
        assert_near(param, follow(name, start, history, **options_of(name))[0], 2)
        assert size == 0 or np.abs(array(param) - start).max() > 1e-4
        assert (holder[:offset] == sentinel).all()
        assert (holder[offset + size :] == sentinel).all()
        assert (grad_holder[: offset + 2] == sentinel).all()
        assert (grad_holder[offset + 2 + size :] == sentinel).all()


LAYOUTS = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "gaps": lambda x: torch.stack([x, x], -1)[..., 1],
    "a slice": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_any_layout_of_parameter_and_gradient(
    backend: str, name: str, param_layout: str, state_dtype: str, assert_equal: Any
) -> None:
    def trained(layout: str, grad_layout: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(LAYOUTS[layout](torch.randn(6, 5, 4, 3, generator=generator)))
        assert param.stride() == LAYOUTS[layout](param.detach()).stride()
        optimizer = getattr(optim, name)([param], state_dtype=state_dtype, **options_of(name))
        for _ in range(3):
            param.grad = LAYOUTS[grad_layout](torch.randn(6, 5, 4, 3, generator=generator))
            optimizer.step()
        return param.detach()

    if name == "Adafactor" and state_dtype != "float32":
        pytest.skip("its moments are small, and float32")
    start = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    want = trained("contiguous", "contiguous")
    for grad_layout in LAYOUTS:
        got = trained(param_layout, grad_layout)
        if name == "Adafactor":  # its means may be taken in the order of memory
            torch.testing.assert_close(got, want, rtol=3e-6, atol=1e-6)
        elif state_dtype != "float32" and param_layout in ("channels_last", "transposed"):
            # Random bits belong to places in memory, so moments differ by their rounding.
            share = 0.01 if state_dtype == "bfloat16" else 0.05
            assert float((got - want).abs().mean()) < share * float((want - start).abs().mean())
        else:
            assert_equal([got], [want])


def test_gaps_of_a_parameter_are_not_written(backend: str) -> None:
    for name in NAMES:
        whole = torch.full((6, 10), 12345.0)
        param = torch.nn.Parameter(whole[1:5, 2:8:2])
        with torch.no_grad():
            param.fill_(1.0)
        optimizer = getattr(optim, name)([param], **options_of(name))
        param.grad = torch.ones(4, 3)
        optimizer.step()
        assert bool((param != 1.0).all())
        assert int((whole == 12345.0).sum()) == 60 - 12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_same_bits_for_threads_and_targets(
    core: Any, name: str, state_dtype: str, thread_counts: list[int], assert_equal: Any
) -> None:
    if name == "Adafactor" and state_dtype != "float32":
        pytest.skip("its moments are small, and float32")
    sizes = [3, 1000, 20_000, 0, 70_001, 1, 600_000]
    starts, grads = ([torch.randn(n, generator=torch.Generator().manual_seed(n + k)) for n in sizes] for k in (0, 1))

    def trained() -> list[torch.Tensor]:
        params = [torch.nn.Parameter(start.clone()) for start in starts]
        optimizer = getattr(optim, name)(params, clip_norm=0.5, state_dtype=state_dtype, **options_of(name))
        for factor in (1.0, -0.3):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad * factor
            optimizer.step()
        return [p.detach() for p in params]

    torch.set_num_threads(1)
    want = trained()
    try:
        for target in core.build_info()["cpu_targets"]:
            core.set_cpu_target(target)
            for threads in thread_counts:
                torch.set_num_threads(threads)
                assert_equal(trained(), want)
    finally:
        core.set_cpu_target("auto")


FORMATS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.float32, {"state_dtype": "bfloat16", "clip_value": 0.8}),
    (torch.float32, {"state_dtype": "int8", "decay_to_init": 0.5}),
    (torch.bfloat16, {"weights": "plain", "decay_to_init": 0.5, "init_dtype": "bfloat16"}),
    (torch.bfloat16, {"weights": "split32", "state_dtype": "bfloat16"}),
    (torch.bfloat16, {"weights": "kahan", "clip_value": 0.8}),
    (torch.bfloat16, {"weights": "stochastic", "state_dtype": "int8", "seed": 2**40 + 3}),
    (torch.float16, {"state_dtype": "int8"}),
]


@pytest.mark.parametrize(("dtype", "extra"), FORMATS)
@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] in ELEMENTWISE])
def test_reference_gives_the_bits_of_the_core(
    core: Any,
    monkeypatch: Any,
    name: str,
    options: dict,
    dtype: torch.dtype,
    extra: dict,
    make_params: Any,
    give_grads: Any,
    assert_equal: Any,
    state_tensors: Any,
) -> None:
    results = []
    for without_core in (False, True):
        with monkeypatch.context() as patch:
            if without_core:
                patch_out_the_core(patch)
            params = make_params(dtype=dtype)
            optimizer = getattr(optim, name)(params, **extra, **options)
            for step in range(5):
                give_grads(params, seed=step)
                optimizer.step()
            results.append([*[p.detach() for p in params], *state_tensors(optimizer).values()])
    assert_equal(*results)


def patch_out_the_core(patch: Any) -> None:
    from pyft.core import loader
    from pyft.optim import step_plan

    for module in (loader, step_plan):
        patch.setattr(module, "load_core", lambda: None)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(ELEMENTWISE),
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
)
def test_cutting_tensors_up_changes_no_bit(core: Any, name: str, sizes: list[int], order: Any) -> None:
    """The update of an element knows neither its neighbours nor where it is in memory, nor the order of tensors."""
    total = sum(sizes)
    generator = torch.Generator().manual_seed(total)
    values, grads = torch.randn(total, generator=generator), torch.randn(3, total, generator=generator)
    whole = torch.nn.Parameter(values.clone())
    pieces = [torch.nn.Parameter(piece.clone()) for piece in values.split(sizes)]
    shuffled = list(pieces)
    order.shuffle(shuffled)
    optimizers = [getattr(optim, name)(p, **options_of(name)) for p in ([whole], shuffled)]
    for grad in grads:
        whole.grad = grad.clone()
        for piece, part in zip(pieces, grad.split(sizes), strict=True):
            piece.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.cat([p.detach() for p in pieces]), whole.detach())


@pytest.mark.parametrize("name", NAMES)
def test_groups_have_hyperparameters_of_their_own(
    backend: str, name: str, make_params: Any, give_grads: Any, assert_near: Any, array: Any
) -> None:
    own = {
        "AdamW": {"betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.5, "amsgrad": True},
        "Adam": {"betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.5, "decoupled_weight_decay": True},
        "SGD": {"momentum": 0.5, "dampening": 0.2, "weight_decay": 0.3},
        "RMSprop": {"alpha": 0.5, "momentum": 0.7, "centered": True, "eps": 1e-3},
        "Adagrad": {"lr_decay": 0.5, "eps": 1e-2, "weight_decay": 0.1},
        "Lion": {"betas": (0.3, 0.4), "weight_decay": 0.3},
        "Adafactor": {"beta2_decay": -0.3, "eps": (1e-2, 1e-1), "d": 3.0, "weight_decay": 0.2},
    }[name]
    shared = {"lr": 0.01}
    per_group = [{}, {"lr": 0.1, **own}, {"lr": 0.003, "maximize": True}]
    params = make_params()
    start, history = [array(p) for p in params], [[] for _ in params]
    groups = [{"params": params[2 * n : 2 * n + 2], **extra} for n, extra in enumerate(per_group)]
    optimizer = getattr(optim, name)(groups, **shared)
    for step in range(STEPS):
        give_grads(params, seed=step)
        for seen, param in zip(history, params, strict=True):
            seen.append(array(param.grad))
        optimizer.step()
    for number, param in enumerate(params):
        options = {**shared, **per_group[number // 2]}
        assert_near(param, follow(name, start[number], history[number], **options)[0], STEPS)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_added_later_starts_at_its_own_step_one(
    backend: str, name: str, make_params: Any, give_grads: Any, assert_near: Any, array: Any
) -> None:
    options = options_of(name)
    params = make_params()
    start, history = [array(p) for p in params], [[] for _ in params]
    optimizer = getattr(optim, name)(params[:2], **options)
    for step in range(12):
        if step == 5:
            optimizer.add_param_group({"params": params[2:], "lr": 0.05})
        give_grads(params, seed=step)
        for number, param in enumerate(params):
            if number < 2 or step >= 5:
                history[number].append(array(param.grad))
        optimizer.step()
    for number, param in enumerate(params):
        lr = {"lr": 0.05} if number >= 2 else {}
        assert_near(param, follow(name, start[number], history[number], **{**options, **lr})[0], 12)


def test_hyperparameters_changed_between_steps_are_seen(
    backend: str, make_params: Any, give_grads: Any, assert_near: Any
) -> None:
    for name in IN_TORCH:
        shapes = [(30, 20), (7,)]
        ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)
        both = getattr(optim, name)(ours), getattr(torch.optim, name)(theirs)
        for step in range(6):
            for optimizer in both:
                group = optimizer.param_groups[0]
                group["lr"] = 0.01 / (1 + step)
                group["weight_decay"] = 0.1 * step
                if "betas" in group:
                    group["betas"] = (0.9 - 0.1 * step, 0.99 - 0.1 * step)
                if name == "SGD":  # the buffer begins with the third gradient, undampened
                    group["momentum"], group["dampening"] = (0.0, 0.0) if step < 2 else (0.8, 0.3)
                group["maximize"] = step == 4
            give_grads(ours, theirs, seed=step)
            for optimizer in both:
                optimizer.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert_near(mine, other, 12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zero_gradients_move_nothing(backend: str, name: str, value: float, assert_equal: Any) -> None:
    """Rows of an embedding that were not looked up stay where they are; Lion's sign of 0 is 0."""
    param = torch.nn.Parameter(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)))
    optimizer = getattr(optim, name)([param], **{"weight_decay": 0.0, **options_of(name)})
    before = param.detach().clone()
    for _ in range(3):
        param.grad = torch.full((9, 5), value)
        param.grad[4] = 1.0
        optimizer.step()
    assert_equal([param.detach()[:4], param.detach()[5:]], [before[:4], before[5:]])
    assert bool((param.detach()[4] != before[4]).all())
    for moment in optimizer.state[param].values():
        assert bool(torch.isfinite(moment).all())


def test_all_gradients_zero_is_finite_even_without_eps(backend: str) -> None:
    for name in NAMES:
        param = torch.nn.Parameter(torch.ones(5, 4))
        optimizer = getattr(optim, name)([param], clip_norm=1.0, **{"weight_decay": 0.0, **options_of(name)})
        for _ in range(3):
            param.grad = torch.zeros(5, 4)
            optimizer.step()
        assert bool((param == 1.0).all()), name
        assert optimizer.last_step.total_norm == 0.0
        assert optimizer.last_step.clip_coef == 1.0


def test_centered_variance_is_never_negative(backend: str) -> None:
    """A constant gradient has no variance; rounding may make it negative, and torch's RMSprop NaN."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(2000, generator=generator)
    param = torch.nn.Parameter(torch.zeros(2000))
    optimizer = optim.RMSprop([param], centered=True, alpha=0.5)
    for _ in range(60):
        param.grad = grad.clone()
        optimizer.step()
        assert bool(torch.isfinite(param).all())
    assert bool((param.sign() == -grad.sign()).all())


@pytest.mark.parametrize("name", NAMES)
def test_learning_rate_zero_writes_moments_only(backend: str, name: str, make_params: Any, give_grads: Any) -> None:
    params = make_params()
    before = [p.detach().clone() for p in params]
    optimizer = getattr(optim, name)(params, **{**options_of(name), "lr": 0.0})
    give_grads(params, seed=0)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "options"), CASES, ids=CASE_IDS)
def test_other_dtypes_one_step(
    backend: str, name: str, options: dict, dtype: torch.dtype, make_params: Any, give_grads: Any, array: Any
) -> None:
    """One step is the exact one, rounded once to the dtype."""
    params = make_params(dtype=dtype)
    optimizer = getattr(optim, name)(params, **options)
    start = [array(p) for p in params]
    give_grads(params, seed=1)
    optimizer.step()
    spacing = torch.finfo(dtype).eps
    for param, first in zip(params, start, strict=True):
        machine = {"machine_eps": spacing} if name == "Adafactor" else {}
        theta, _ = follow(name, first, [array(param.grad)], **options, **machine)
        error = np.abs(array(param) - theta)
        if dtype == torch.float64:  # no hyperparameter has passed through fp32
            assert np.all(error <= 8 * spacing * (np.abs(theta) + 1.0)), error.max()
        else:  # half of a spacing, and what fp32 adds before it
            assert np.all(error <= 0.505 * spacing * np.maximum(np.abs(theta), 2.0**-14) + 3e-7), error.max()
    assert all(p.dtype == dtype for p in params)


@pytest.mark.parametrize("name", IN_TORCH)
def test_constructor_is_torch_s(name: str) -> None:
    ours = inspect.signature(getattr(optim, name).__init__).parameters
    theirs = inspect.signature(getattr(torch.optim, name).__init__).parameters

    def positional(parameters: Any) -> list[str]:
        return [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(ours)[: len(positional(theirs))] == positional(theirs)
    for key, parameter in theirs.items():
        assert key in ours, key
        assert ours[key].default == parameter.default, key


OUT_OF_RANGE = [
    *[(name, {"lr": -1.0}, "lr") for name in NAMES],
    *[(name, {"lr": float("nan")}, "lr") for name in NAMES],
    *[(name, {"weight_decay": -0.1}, "weight_decay") for name in NAMES],
    *[(name, {"betas": (1.0, 0.9)}, "betas") for name in ("AdamW", "Adam", "Lion")],
    *[(name, {"eps": -1e-8}, "eps") for name in ("AdamW", "Adam", "RMSprop", "Adagrad")],
    ("SGD", {"momentum": -0.1}, "momentum"),
    ("SGD", {"nesterov": True}, "nesterov"),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov"),
    ("RMSprop", {"alpha": -0.1}, "alpha"),
    ("RMSprop", {"momentum": -0.1}, "momentum"),
    ("Adagrad", {"lr_decay": -0.1}, "lr_decay"),
    ("Adagrad", {"initial_accumulator_value": -0.1}, "initial_accumulator_value"),
    ("Adafactor", {"beta2_decay": 0.1}, "beta2_decay"),
    ("Adafactor", {"eps": (-0.1, 1e-3)}, "eps"),
    ("Adafactor", {"eps": (None, -1e-3)}, "eps"),
    ("Adafactor", {"d": 0.5}, "d must"),
    ("Adafactor", {"state_dtype": "int8"}, "state_dtype of Adafactor"),
    *[("AdamW", {key: "wrong"}, key) for key in ("clip_mode", "on_nonfinite", "init_dtype", "grads")],
    *[("AdamW", {key: "wrong"}, key) for key in ("state_dtype", "weights")],
    ("AdamW", {"decay_to_init": -0.1}, "decay_to_init"),
    ("AdamW", {"clip_value": -1.0}, "clip_value"),
    ("AdamW", {"clip_value": float("nan")}, "clip_value"),
    ("AdamW", {"clip_norm": float("nan")}, "clip_norm"),
    ("AdamW", {"clip_norm": {"global": 0.0}}, "clip_norm"),
    ("AdamW", {"clip_norm": {"everything": 1.0}}, "clip_norm"),
    ("AdamW", {"clip_norm": {"tensor": 1.0, "agc": 0.1}}, "clip_norm"),
    ("AdamW", {"clip_norm": {"group": 1.0, "global": 1.0}}, "clip_norm"),
]


@pytest.mark.parametrize(("name", "options", "named"), OUT_OF_RANGE)
def test_bad_option_is_named(name: str, options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        getattr(optim, name)([torch.nn.Parameter(torch.ones(3))], **options)


def test_unknown_option_is_named() -> None:
    for name in NAMES:
        with pytest.raises(TypeError, match="weight_decoy"):
            getattr(optim, name)([torch.nn.Parameter(torch.ones(3))], weight_decoy=0.1)
