"""state_dicts go both ways in mid-training; a resumed run is the uninterrupted one, to the bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from family_float64 import CASE_IDS, CASES, ELEMENTWISE, NAMES

from pyft import optim

IN_TORCH = [case for case in CASES if hasattr(torch.optim, case[0])]
SHAPES = [(30, 20), (7,), (4, 3, 3, 3), (), (257,)]


def through_file(state_dict: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("first", ["pyft", "torch"])
@pytest.mark.parametrize(("name", "options"), IN_TORCH)
def test_goes_both_ways_in_mid_training(
    backend: str, name: str, options: dict, first: str, make_params: Any, give_grads: Any, assert_near: Any
) -> None:
    makers = {"pyft": getattr(optim, name), "torch": getattr(torch.optim, name)}
    ours, theirs = make_params(shapes=SHAPES), make_params(shapes=SHAPES)
    a, b = makers[first](ours, **options), makers["torch"](theirs, **options)
    for step in range(6):
        give_grads(ours, theirs, seed=step)
        if step < 3:  # a parameter whose state is younger than that of the others
            ours[1].grad = theirs[1].grad = None
        a.step()
        b.step()
    # Built with other hyperparameters: those of the file count.
    second = makers["torch" if first == "pyft" else "pyft"](ours, lr=0.77)
    second.load_state_dict(through_file(a.state_dict()))
    for step in range(6, 12):
        give_grads(ours, theirs, seed=step)
        second.step()
        b.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other, 24)
        for key, value in b.state[other].items():
            if isinstance(value, torch.Tensor):
                assert_near(second.state[mine][key], value, 24)
    for key, value in b.param_groups[0].items():
        assert key == "params" or second.param_groups[0][key] == value, key


@pytest.mark.parametrize("option", [{"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Adagrad", "RMSprop", "Adafactor"])
def test_loads_state_of_torch_s_other_paths(
    backend: str, name: str, option: dict, make_params: Any, give_grads: Any, assert_near: Any
) -> None:
    if "fused" in option and name in ("RMSprop", "Adafactor"):
        pytest.skip("torch has no fused form")
    momentum = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    ours, theirs = make_params(shapes=SHAPES), make_params(shapes=SHAPES)
    b = getattr(torch.optim, name)(theirs, **momentum, **option)
    for step in range(3):
        give_grads(theirs, seed=step)
        b.step()
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            mine.copy_(other)
    a = getattr(optim, name)(ours)
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    for step in range(3, 6):
        give_grads(ours, theirs, seed=step)
        a.step()
        b.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other, 12)


def test_sgd_buffer_of_none_is_no_buffer_yet(backend: str, make_params: Any, give_grads: Any, assert_near: Any) -> None:
    """torch stores momentum_buffer None where momentum was 0."""
    ours, theirs = make_params(shapes=SHAPES), make_params(shapes=SHAPES)
    state = {number: {"momentum_buffer": None} for number in range(len(SHAPES))}
    both = [optim.SGD(ours, lr=0.1, momentum=0.9), torch.optim.SGD(theirs, lr=0.1, momentum=0.9)]
    for optimizer in both:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for step in range(3):
        give_grads(ours, theirs, seed=step)
        for optimizer in both:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other, 6)


def test_state_dict_from_before_the_first_step(backend: str, make_params: Any, give_grads: Any) -> None:
    for name, options in IN_TORCH:
        params = make_params(shapes=SHAPES)
        for source, target in ((torch.optim, optim), (optim, torch.optim)):
            fresh = getattr(source, name)(params, **options)
            second = getattr(target, name)(params)
            second.load_state_dict(through_file(fresh.state_dict()))
            give_grads(params, seed=0)
            second.step()
            assert all(bool(torch.isfinite(p).all()) for p in params)


STATE_DTYPES = ["float32", "bfloat16", "int8"]
WEIGHTS = ["plain", "split32", "kahan", "stochastic"]
EXTRAS: list[tuple[torch.dtype, dict[str, Any]]] = [
    *[(torch.float32, {"state_dtype": s}) for s in STATE_DTYPES],
    *[(torch.bfloat16, {"weights": w}) for w in WEIGHTS],
    *[(torch.bfloat16, {"weights": w, "state_dtype": "int8"}) for w in ("split32", "stochastic")],
    (torch.float16, {}),
    (torch.float64, {"state_dtype": "int8"}),
    (torch.float32, {"decay_to_init": 0.1, "init_dtype": "float32", "clip_norm": {"agc": 0.1, "global": 1.0}}),
    (torch.float32, {"decay_to_init": 0.1, "init_dtype": "bfloat16", "clip_value": 0.7}),
]


@pytest.mark.parametrize(("dtype", "extra"), EXTRAS, ids=lambda x: str(x).replace("torch.", ""))
@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_is_the_uninterrupted_one(
    backend: str,
    name: str,
    dtype: torch.dtype,
    extra: dict,
    make_params: Any,
    give_grads: Any,
    assert_equal: Any,
    state_tensors: Any,
) -> None:
    if name == "Adafactor" and extra.get("state_dtype", "float32") != "float32":
        pytest.skip("its moments are small, and float32")
    full = {
        "Adam": {"amsgrad": True},
        "SGD": {"momentum": 0.9},
        "RMSprop": {"momentum": 0.5, "centered": True},
        "Adagrad": {"lr_decay": 0.1},
    }.get(name, {})
    straight, stopped = make_params(dtype=dtype), make_params(dtype=dtype)
    a, b = (getattr(optim, name)(params, **full, **extra, seed=3) for params in (straight, stopped))
    for step in range(8):
        if step == 4:
            saved = through_file({"weights": [p.detach() for p in stopped], "optimizer": b.state_dict()})
            stopped = [torch.nn.Parameter(weight) for weight in saved["weights"]]
            b = getattr(optim, name)(stopped, **full, **extra, seed=3)
            b.load_state_dict(saved["optimizer"])
            left, right = state_tensors(a), state_tensors(b)
            assert list(left) == list(right)
            assert_equal(left.values(), right.values())
        give_grads(straight, stopped, seed=step)
        if step == 2:
            straight[0].grad = stopped[0].grad = None
        a.step()
        b.step()
    assert_equal(straight, stopped)
    assert_equal(state_tensors(a).values(), state_tensors(b).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_moments_of_narrow_parameters_stay_fp32(
    backend: str, name: str, dtype: torch.dtype, make_params: Any, give_grads: Any
) -> None:
    """torch's load_state_dict rounds every floating state to the parameter's dtype."""
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    params = make_params(dtype=dtype)
    optimizer = getattr(optim, name)(params, **options)
    for step in range(3):
        give_grads(params, seed=step)
        optimizer.step()
    second = getattr(optim, name)(params, **options)
    second.load_state_dict(through_file(optimizer.state_dict()))
    beyond = 0
    for param in params:
        for key, value in optimizer.state[param].items():
            loaded = second.state[param][key]
            assert value.dtype == loaded.dtype == torch.float32, key
            assert torch.equal(value, loaded), key
            beyond += int((value != value.to(dtype).float()).sum())
    # The moments do hold what the narrow dtype cannot.
    assert beyond > (100 if name == "Adafactor" else 500)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_fp32_state_loads_into_int8_and_back(
    backend: str, name: str, make_params: Any, give_grads: Any, array: Any
) -> None:
    options = {
        "SGD": {"momentum": 0.9},
        "RMSprop": {"momentum": 0.5, "centered": True},
        "Adam": {"amsgrad": True},
    }.get(name, {})
    params = make_params()
    wide = getattr(optim, name)(params, **options)
    for step in range(4):
        give_grads(params, seed=step)
        wide.step()
    narrow = getattr(optim, name)(params, state_dtype="int8", **options)
    narrow.load_state_dict(through_file(wide.state_dict()))
    again = getattr(optim, name)(params, state_dtype="float32", **options)
    again.load_state_dict(through_file(narrow.state_dict()))
    converted = 0
    for param in params:
        assert float(again.state[param].get("step", 4.0)) == float(narrow.state[param].get("step", 4.0)) == 4.0
        assert set(again.state[param]) == set(wide.state[param])
        for key, value in wide.state[param].items():
            back = again.state[param][key]
            assert back.dtype == torch.float32
            if f"{key}_q8" in narrow.state[param]:
                converted += 1
                assert key not in narrow.state[param]
                largest = np.abs(array(value)).max(initial=0.0)
                # Half a code.
                error = np.abs(array(back) - array(value))
                assert np.all(error <= np.abs(array(value)) / 16 + 1e-5 * largest)
            else:
                assert torch.equal(back, value)
    assert converted >= len(params)
    for optimizer in (narrow, again):
        give_grads(params, seed=9)
        optimizer.step()
        assert all(bool(torch.isfinite(p).all()) for p in params)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "RMSprop", "Adagrad"])
def test_torch_refuses_int8_state_aloud(backend: str, name: str, make_params: Any, give_grads: Any) -> None:
    params = make_params(shapes=SHAPES)
    optimizer = getattr(optim, name)(params, state_dtype="int8")
    give_grads(params, seed=0)
    optimizer.step()
    theirs = getattr(torch.optim, name)(params)
    theirs.load_state_dict(through_file(optimizer.state_dict()))
    before = [p.detach().clone() for p in params]
    with pytest.raises(KeyError, match=r"exp_avg|square_avg|sum"):
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize(("saved_as", "loaded_as"), [("last", "first"), ("first", "last"), ("last", "gaps")])
def test_state_saved_in_another_memory_layout(
    backend: str, state_dtype: str, saved_as: str, loaded_as: str, array: Any
) -> None:
    """8-bit blocks follow memory: the state of a channels-last model must be put in the order of this one."""
    layouts = {
        "last": lambda x: x.clone(memory_format=torch.channels_last),
        "first": lambda x: x.clone(memory_format=torch.contiguous_format),
        "gaps": lambda x: torch.stack([x, x], -1)[..., 1],
    }
    generator = torch.Generator().manual_seed(0)
    value, grad = (torch.randn(8, 16, 5, 7, generator=generator) for _ in range(2))
    # Channels of very different size: a scale of the wrong block is far off.
    grad *= 10.0 ** torch.arange(-8.0, 8.0).reshape(1, 16, 1, 1).clamp(-2, 2)
    source = torch.nn.Parameter(layouts[saved_as](value))
    a = optim.AdamW([source], state_dtype=state_dtype)
    source.grad = grad.clone()
    a.step()
    target = torch.nn.Parameter(layouts[loaded_as](value))
    b = optim.AdamW([target], state_dtype=state_dtype)
    b.load_state_dict(through_file(a.state_dict()))
    read = optim.AdamW([torch.nn.Parameter(layouts["first"](value))])
    read.load_state_dict(through_file(b.state_dict()))
    moment = next(iter(read.state.values()))["exp_avg"]
    exact = 0.1 * np.abs(array(grad))
    error = np.abs(array(moment) - 0.1 * array(grad))
    # Two roundings, the second to the nearest: a code and a half.
    relative = {"float32": 1e-6, "bfloat16": 0.008, "int8": 0.19}[state_dtype]
    assert np.all(error <= relative * exact + (1e-5 * exact.max() if state_dtype == "int8" else 1e-9))
    target.grad = layouts["first"](grad)
    b.step()
    assert bool(torch.isfinite(target).all())


def test_loaded_state_is_not_shared_with_the_file(backend: str, make_params: Any, give_grads: Any) -> None:
    """A checkpoint kept in memory must be the same after training went on from it."""
    for state_dtype in STATE_DTYPES:
        params = make_params()
        optimizer = optim.AdamW(params, state_dtype=state_dtype)
        give_grads(params, seed=0)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        kept = copy.deepcopy(saved)
        optimizer.load_state_dict(saved)
        give_grads(params, seed=1)
        optimizer.step()
        for number, state in saved["state"].items():
            assert all(torch.equal(value, kept["state"][number][key]) for key, value in state.items())


def test_wrong_shape_of_state_is_refused_by_name(backend: str, make_params: Any, give_grads: Any) -> None:
    for state_dtype in STATE_DTYPES:
        small, large = make_params(shapes=[(4, 3)]), make_params(shapes=[(6, 3)])
        a = optim.AdamW(small, state_dtype=state_dtype)
        give_grads(small, seed=0)
        a.step()
        with pytest.raises(ValueError, match=r"exp_avg.*\(4, 3\).*\(6, 3\)"):
            optim.AdamW(large, state_dtype=state_dtype).load_state_dict(a.state_dict())


@pytest.mark.parametrize(("source", "target"), [("Adam", "AdamW"), ("AdamW", "Adam")])
@pytest.mark.parametrize("of", ["pyft", "torch"])
def test_adam_and_adamw_load_each_other_as_in_torch(
    backend: str, source: str, target: str, of: str, make_params: Any, give_grads: Any, assert_near: Any
) -> None:
    """Whether decay is decoupled then is what torch makes of it."""
    ours, theirs = make_params(shapes=SHAPES), make_params(shapes=SHAPES)
    a = getattr(optim if of == "pyft" else torch.optim, source)(ours, lr=0.01, weight_decay=0.5)
    b = getattr(torch.optim, source)(theirs, lr=0.01, weight_decay=0.5)
    give_grads(ours, theirs, seed=0)
    a.step()
    b.step()
    a2, b2 = getattr(optim, target)(ours), getattr(torch.optim, target)(theirs)
    a2.load_state_dict(through_file(a.state_dict()))
    b2.load_state_dict(through_file(b.state_dict()))
    for step in range(1, 6):
        give_grads(ours, theirs, seed=step)
        a2.step()
        b2.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other, 12)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("SGD", "AdamW"),
        ("Lion", "AdamW"),
        ("AdamW", "Lion"),
        ("Adagrad", "RMSprop"),
        ("RMSprop", "Adagrad"),
        ("Adam", "SGD"),
    ],
)
def test_state_of_another_class_is_refused(
    backend: str, source: str, target: str, make_params: Any, give_grads: Any, snapshot: Any, assert_untouched: Any
) -> None:
    """Moments that are missing would be zeros beside a high step counter; torch raises KeyError for such a file."""
    params = make_params()
    momentum = {"momentum": 0.9} if source == "SGD" else {}
    a = getattr(optim, source)(params, **momentum)
    b = getattr(optim, target)(params)
    give_grads(params, seed=0)
    a.step()
    b.step()
    before = snapshot(params, b)
    with pytest.raises((KeyError, ValueError)):
        b.load_state_dict(through_file(a.state_dict()))
    assert_untouched(params, b, before)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_refused_state_leaves_the_optimizer_as_it_was(
    backend: str, state_dtype: str, make_params: Any, give_grads: Any, snapshot: Any, assert_untouched: Any
) -> None:
    small, large = make_params(shapes=[(9,), (4, 3)]), make_params(shapes=[(9,), (6, 3)])
    a, b = (optim.AdamW(params, state_dtype=state_dtype) for params in (small, large))
    for params, optimizer in ((small, a), (large, b)):
        give_grads(params, seed=0)
        optimizer.step()
    before = snapshot(large, b)
    with pytest.raises(ValueError, match="exp_avg"):
        b.load_state_dict(a.state_dict())
    assert_untouched(large, b, before)
    b.step()  # and it goes on


@pytest.mark.parametrize(("dtype", "weights"), [(torch.bfloat16, "split32"), (torch.bfloat16, "kahan")])
def test_state_of_plain_weights_loads_into_other_modes(
    backend: str, dtype: torch.dtype, weights: str, make_params: Any, give_grads: Any
) -> None:
    """A run begun in plain bf16 may go on with a remainder that starts at 0, and back."""
    params = make_params(dtype=dtype)
    plain = optim.AdamW(params)
    give_grads(params, seed=0)
    plain.step()
    other = optim.AdamW(params, weights=weights)
    other.load_state_dict(through_file(plain.state_dict()))
    give_grads(params, seed=1)
    other.step()
    back = optim.AdamW(params)
    with pytest.warns(UserWarning, match="low bits"):
        back.load_state_dict(through_file(other.state_dict()))
    give_grads(params, seed=2)
    back.step()
    assert all(bool(torch.isfinite(p).all()) for p in params)
    assert float(back.state[params[0]]["step"]) == 3.0


def test_options_of_the_constructor_outlive_a_torch_state_dict(backend: str, make_params: Any, give_grads: Any) -> None:
    """A file of torch knows nothing of decay_to_init, clipping or state_dtype."""
    params = make_params(shapes=SHAPES)
    theirs = torch.optim.AdamW(params)
    give_grads(params, seed=0)
    theirs.step()
    ours = optim.AdamW(params, clip_norm=1.0, decay_to_init=0.1, state_dtype="bfloat16")
    ours.load_state_dict(through_file(theirs.state_dict()))
    give_grads(params, seed=1)
    ours.step()
    assert ours.last_step.total_norm > 1.0
    assert ours.last_step.clip_coef < 1.0
    assert ours.state[params[0]]["exp_avg"].dtype == torch.bfloat16
    assert ours.state[params[0]]["init"].dtype == torch.float32
    assert ours.param_groups[0]["decay_to_init"] == 0.1


@pytest.mark.parametrize(("name", "options"), CASES, ids=CASE_IDS)
def test_state_keys_and_counters(backend: str, name: str, options: dict, make_params: Any, give_grads: Any) -> None:
    params = make_params()
    optimizer = getattr(optim, name)(params, **options)
    for step in range(2):
        give_grads(params, seed=step)
        optimizer.step()
    keys = {
        "AdamW": {"exp_avg", "exp_avg_sq"},
        "Adam": {"exp_avg", "exp_avg_sq"},
        "SGD": {"momentum_buffer"} if options.get("momentum") else set(),
        "RMSprop": {"square_avg"},
        "Adagrad": {"sum"},
        "Lion": {"exp_avg"},
    }.get(name)
    if options.get("amsgrad"):
        keys |= {"max_exp_avg_sq"}
    if name == "RMSprop":
        keys |= ({"grad_avg"} if options.get("centered") else set()) | (
            {"momentum_buffer"} if options.get("momentum") else set()
        )
    for param in params:
        state = optimizer.state[param]
        wanted = keys if name != "Adafactor" else ({"row_var", "col_var"} if param.ndim > 1 else {"variance"})
        assert set(state) - {"step"} == wanted
        if name != "SGD":  # torch's keeps none
            assert state["step"].dtype == torch.float32
            assert state["step"].shape == ()
            assert float(state["step"]) == 2.0
