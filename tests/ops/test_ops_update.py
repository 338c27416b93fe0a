"""update_: the core and the PyTorch reference give the same bits, for every rule, format, target and thread."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from pyft.ops import rounding, update_
from pyft.ops.rules import NEVER_NEGATIVE, RULES
from pyft.ops.update import Step, update_reference_

ON_CORE = sorted(name for name, rule in RULES.items() if not rule.factored)
HYPER = {
    "lr": 0.01,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "momentum": 0.8,
    "dampening": 0.25,
    "alpha": 0.95,
    "lr_decay": 0.1,
}
SIZES = [0, 1, 7, 255, 256, 257, 8191, 8192, 8449, 16385, 70_001]


def hyper_of(rule: str) -> dict[str, float]:
    return {name: HYPER[name] for name in RULES[rule].hyper if name in HYPER}


def moments_of(rule: str, size: Any, dtype: str, generator: torch.Generator) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name in RULES[rule].kept:
        value = torch.randn(size, generator=generator) * 0.1
        value = value.square() if name in NEVER_NEGATIVE else value
        if dtype == "int8":
            flat = value.reshape(-1)
            half = torch.full((flat.numel(),), 1 << 31)
            codes, state[f"{name}_scale"] = rounding.encode_int8(flat, half, name not in NEVER_NEGATIVE)
            state[f"{name}_q8"] = codes.view(value.shape)
        else:
            state[name] = value.to(getattr(torch, dtype))
    return state


def make(
    rule: str,
    size: Any,
    *,
    param: torch.dtype = torch.float32,
    grad: torch.dtype = torch.float32,
    moments: str = "float32",
    weights: str = "plain",
    init: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(len(rule) + (size if isinstance(size, int) else 1))
    p, g = (torch.randn(size, generator=generator) for _ in range(2))
    state = moments_of(rule, size, moments, generator)
    state["step"] = torch.tensor(3.0)
    if weights == "split32":
        state["remainder"] = torch.randint(-(2**15), 2**15, p.shape, generator=generator).to(torch.int16)
    if weights == "kahan":
        state["compensation"] = (torch.randn(size, generator=generator) * 1e-3).to(torch.bfloat16)
    if init is not None:
        state["init"] = (p + torch.randn(size, generator=generator)).to(init)
    return p.to(param), g.to(grad), state


def both(rule: str, p: Tensor, g: Tensor, state: dict[str, Tensor], **options: Any) -> None:
    """Runs the op on one copy and the reference on another; every tensor has the same bits."""
    q, other = p.clone(), {key: value.clone() for key, value in state.items()}
    before = p.clone()
    listed = {key: [value] for key, value in state.items()}
    coef = torch.tensor(0.37)
    update_(rule, [p], [g], listed, hyper_of(rule), coef, **options)
    numbers = [hyper_of(rule).get(name, 0.0) for name in RULES[rule].hyper]
    step = Step(RULES[rule], numbers, scale=coef, **options)
    update_reference_(q, g, other, step)
    assert same_bits(p, q), (p.double() - q.double()).abs().max()
    for key, value in state.items():
        assert same_bits(value, other[key]), key
    if p.numel() > 100:
        assert (p != before).float().mean() > 0.2


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Of what is not NaN; NaN are at the same places."""
    if a.dtype.is_floating_point:
        nan = a.isnan()
        if not torch.equal(nan, b.isnan()):
            return False
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        a, b = (x.masked_fill(nan, 0.0).view(kind) for x in (a, b))
    return torch.equal(a, b)


@pytest.mark.parametrize("rule", ON_CORE)
@pytest.mark.parametrize("size", SIZES)
def test_core_has_the_bits_of_the_reference(cpu_target: str, rule: str, size: int) -> None:
    both(rule, *make(rule, size))


@pytest.mark.parametrize("rule", ON_CORE)
@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
@pytest.mark.parametrize("size", [1, 255, 257, 8449, 16385])
def test_narrow_moments_have_the_bits_of_the_reference(cpu_target: str, rule: str, moments: str, size: int) -> None:
    both(rule, *make(rule, size, moments=moments), seed=5)


@pytest.mark.parametrize("weights", ["plain", "split32", "kahan", "stochastic"])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["adamw", "sgd_momentum", "lion"])
def test_bf16_weights_have_the_bits_of_the_reference(
    cpu_target: str, weights: str, grad: torch.dtype, rule: str
) -> None:
    tensors = make(rule, 8449, param=torch.bfloat16, grad=grad, weights=weights)
    both(rule, *tensors, weights=weights, seed=-3)


# Adam has loops of its own for these, of whole blocks.
MIXTURES = [
    (weights, moments)
    for weights in ("fp32", "plain", "split32", "kahan", "stochastic")
    for moments in ("float32", "bfloat16", "int8")
]


def mixture(rule: str, size: int, weights: str, moments: str) -> tuple[tuple[Tensor, Tensor, dict[str, Tensor]], str]:
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    mode = "plain" if weights == "fp32" else weights
    return make(rule, size, param=dtype, grad=dtype, moments=moments, weights=mode), mode


@pytest.mark.parametrize("rule", ["adamw", "adam"])
@pytest.mark.parametrize(("weights", "moments"), MIXTURES)
@pytest.mark.parametrize("size", [256, 511, 33_001])
def test_adam_in_every_mixture_of_formats(cpu_target: str, rule: str, weights: str, moments: str, size: int) -> None:
    tensors, mode = mixture(rule, size, weights, moments)
    both(rule, *tensors, weights=mode, seed=11)


@pytest.mark.parametrize("rule", ["adamw", "adam"])
@pytest.mark.parametrize(("weights", "moments"), MIXTURES)
def test_what_is_not_finite_stays_in_its_block(cpu_target: str, rule: str, weights: str, moments: str) -> None:
    """NaN with all bits of the fraction, as a GPU makes them, inf, the largest and the smallest numbers, and -0."""
    (p, g, state), mode = mixture(rule, 2048, weights, moments)
    kind, top = (torch.int32, 16) if g.dtype == torch.float32 else (torch.int16, 0)
    for block, bits in enumerate([0x7FFF, 0xFFFF, 0x7F81, 0x7F80, 0xFF80, 0x7F7F, 0x0001, 0x8000]):
        number = torch.tensor(bits << top | (1 << top) - 1).to(kind).view(g.dtype)
        g[286 * block] = number
        p[256 * block + 3] = number
        if moments != "int8":
            state["exp_avg"][256 * block + 250] = number.to(state["exp_avg"].dtype)
    both(rule, p, g, state, weights=mode, seed=12)


@pytest.mark.parametrize("param", [torch.float32, torch.float16])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_and_gradients_of_different_formats(cpu_target: str, param: torch.dtype, grad: torch.dtype) -> None:
    both("adamw", *make("adamw", 8449, param=param, grad=grad))


@pytest.mark.parametrize("rule", ON_CORE)
@pytest.mark.parametrize("init", [torch.float32, torch.bfloat16])
def test_pull_to_the_first_value(cpu_target: str, rule: str, init: torch.dtype) -> None:
    both(rule, *make(rule, 8449, init=init), decay_to_init=0.3)


@pytest.mark.parametrize("rule", ["adamw", "adam_amsgrad"])
def test_corrections_of_any_count(core, rule: str) -> None:
    """A GPU raises the decay rates to the power of the count by other means than the host."""
    generator = torch.Generator().manual_seed(1)
    counts = [1, 2, 9, 10, 100, 999, 1000, 4095, 12345, 1 << 20, (1 << 24) - 1, 1 << 24]
    for count in counts + torch.randint(1, 50_000, (40,), generator=generator).tolist():
        p, g, state = make(rule, 300)
        state["step"] = torch.tensor(float(count))
        both(rule, p, g, state)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_blocks_are_runs_of_memory(core, layout: str, moments: str) -> None:
    p, g, state = make("adamw", (5, 6, 7, 8), moments=moments)

    def lay(x: Tensor) -> Tensor:
        if x.ndim != 4:
            return x
        if layout == "channels_last":
            return x.to(memory_format=torch.channels_last)
        return x.transpose(0, 3).contiguous().transpose(0, 3)

    both("adamw", lay(p), lay(g), {key: lay(value) for key, value in state.items()})


def test_threads_change_nothing(core, one_thread_then_two: list[int]) -> None:
    def run() -> list[Tensor]:
        made = [make("adamw", size, moments="int8", param=torch.bfloat16) for size in (3, 70_001, 600_000)]
        state = {key: [one[2][key] for one in made] for key in made[0][2]}
        params = [one[0] for one in made]
        update_("adamw", params, [one[1] for one in made], state, hyper_of("adamw"), weights="stochastic", seed=9)
        return [*params, *[value for values in state.values() for value in values]]

    runs = []
    for threads in one_thread_then_two:
        torch.set_num_threads(threads)
        runs.append(run())
    for other in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(runs[0], other, strict=True))


def test_all_half_precision_numbers_are_converted_exactly(cpu_target: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        g = every.view(dtype)
        g = g[g.isfinite()]
        p = torch.zeros(g.numel())
        update_("sgd", [p], [g], {}, {"lr": -1.0})
        assert torch.equal(p, g.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_half_precision_is_torch_s(cpu_target: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    near = torch.randn(100_000, generator=generator) * 2.0 ** torch.randint(-26, 18, (100_000,), generator=generator)
    ties = (torch.arange(65536, dtype=torch.int32) << 15).view(torch.float32)
    x = torch.cat([bits.view(torch.float32), near, ties, torch.tensor([65504.0, 65519.99, 65520.0, 1e9, 6e-8, 2e-8])])
    x = x[x.isfinite()]
    p = torch.zeros(x.numel(), dtype=dtype)
    update_("sgd", [p], [-x], {}, {"lr": 1.0})
    assert same_bits(p.abs(), x.to(dtype).abs())


def test_writes_nothing_outside_a_view(cpu_target: str) -> None:
    for offset in (1, 5, 13):
        p, g, state = make("adamw", 8500, moments="bfloat16", param=torch.bfloat16, grad=torch.float16)
        tensors = {"p": p, "g": g, **{k: v for k, v in state.items() if v.ndim}}
        holders = {key: torch.full((9000,), 77.0).to(value.dtype) for key, value in tensors.items()}
        views = {key: holders[key][offset : offset + 8500].copy_(value) for key, value in tensors.items()}
        moments = {key: [views[key]] for key in ("exp_avg", "exp_avg_sq")}
        update_("adamw", [views["p"]], [views["g"]], {**moments, "step": [state["step"]]}, hyper_of("adamw"))
        for holder in holders.values():
            assert (holder[:offset] == 77.0).all()
            assert (holder[offset + 8500 :] == 77.0).all()
        assert not torch.equal(views["p"], p)


@pytest.mark.parametrize(("weights", "moments"), MIXTURES)
def test_adam_on_views_at_odd_places(cpu_target: str, weights: str, moments: str) -> None:
    (p, g, state), mode = mixture("adamw", 1000, weights, moments)
    tensors = {"p": p, "g": g, **state}
    holders = {key: torch.full((1010,), 77).to(x.dtype) for key, x in tensors.items() if x.numel() == 1000}
    views = {key: holders[key][3:1003].copy_(tensors[key]) for key in holders}
    both("adamw", views.pop("p"), views.pop("g"), {**state, **views}, weights=mode, seed=4)
    for holder in holders.values():
        assert (holder[:3] == 77).all()
        assert (holder[1003:] == 77).all()


def test_stochastic_rounding_is_unbiased(backend: str) -> None:
    p = torch.full((200_000,), 1.0, dtype=torch.bfloat16)
    g = torch.full((200_000,), -1.0)
    update_("sgd", [p], [g], {}, {"lr": 2.0**-10}, weights="stochastic")
    # A quarter of the distance to the next bf16 number: up in a quarter of the cases.
    assert float((p > 1.0).double().mean()) == pytest.approx(2.0**-10 / 2.0**-7, abs=5 * math.sqrt(0.125 / 200_000))


# The two largest codes are for what is rounded up.
@pytest.mark.parametrize(("dtype", "codes"), [(torch.int8, range(-125, 126)), (torch.uint8, range(254))])
def test_codes_survive_a_round_trip(dtype: torch.dtype, codes: range) -> None:
    given = torch.tensor(codes, dtype=dtype)
    x = rounding.decode_int8(given, torch.tensor([4.0]))
    assert float(x.abs().max()) == pytest.approx(6.5, rel=1e-4)
    assert bool((x.diff() > 0).all())
    again, scale = rounding.encode_int8(x, torch.full((x.numel(),), 1 << 31), dtype == torch.int8)
    assert torch.equal(again, given)
    assert float(scale) == 4.0


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("largest", [0.0, 1e-45, 2e-38, 1e-30, 1.0, 1.74, 1.76, 1.99, 3e38])
def test_codes_of_the_largest_never_wrap(largest: float, signed: bool) -> None:
    x = torch.tensor([largest, largest * 0.99, largest * 1e-3, 0.0])
    for random in (0, 1 << 31, (1 << 32) - 1):
        codes, scale = rounding.encode_int8(x, torch.full((4,), random), signed)
        kept = rounding.decode_int8(codes, scale)
        assert bool(kept.isfinite().all()) or largest > 2.9e38
        assert bool(((kept - x).abs() <= x / 8 + largest * 1e-5 + 1e-38).all()) or largest > 2.9e38
        assert not signed or float(kept[3]) == 0.0


def test_codes_keep_the_mean() -> None:
    """Rounding of codes is unbiased: within the step of the map, the mean over many random bits is the value."""
    values = torch.tensor([1.0, 0.9, 0.31, 0.02, 4e-4, 3e-5, -0.5, -2e-5])
    for value in values.tolist():
        x = torch.full((256,), value)
        x[0] = 1.0
        total = torch.zeros(256, dtype=torch.float64)
        for step in range(400):
            random = rounding.block_random_bits(rounding.random_key(0, 0, step), 0, 256, torch.device("cpu"))
            codes, scale = rounding.encode_int8(x, random, True)
            total += rounding.decode_int8(codes, scale).double()
        mean = float(total[1:].mean() / 400)
        assert mean == pytest.approx(value, rel=0.02)


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("rule", {"rule": "adamx"}, ValueError, "rule must be one of adamw.*got 'adamx'"),
    ("weights", {"weights": "split"}, ValueError, "weights must be one of plain"),
    ("hyper", {"hyper": {"lr": 1.0, "beta3": 1.0}}, ValueError, "hyper of adamw takes lr, beta1"),
    ("missing", {"state": {"exp_avg": [torch.ones(2)]}}, ValueError, "needs exp_avg, exp_avg_sq, got exp_avg"),
    ("unknown", {"state": {"exp_avg": [torch.ones(2)], "exp_avg_sq": [torch.ones(2)], "sum": []}}, ValueError, "sum"),
]


@pytest.mark.parametrize(("changed", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_bad_input_is_named(backend: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    p = torch.ones(2)
    call: dict[str, Any] = {"rule": "adamw", "params": [p], "grads": [torch.ones(2)], "hyper": {"lr": 1.0}}
    call["state"] = {"exp_avg": [torch.ones(2)], "exp_avg_sq": [torch.ones(2)], "step": [torch.tensor(1.0)]}
    with pytest.raises(error, match=message):
        update_(**{**call, **changed})
    assert torch.equal(p, torch.ones(2))


def raw(p: Tensor, g: Tensor, state: dict[str, Tensor]) -> None:
    torch.ops.pyft.update_(
        "adamw", [p], [g], ["first", "second"], [state["exp_avg"], state["exp_avg_sq"]], [state["step"]],
        None, [0.1, 0.9, 0.99, 1e-8, 0.0, 0.0], 0.0, "plain", 0, False,
    )  # fmt: skip


def test_raw_op_says_what_does_not_fit(core) -> None:
    p, g, state = make("adamw", (6, 5))
    with pytest.raises(RuntimeError, match=r"grads\[0\] has sizes \(6, 5\) and strides \(1, 6\)"):
        raw(p, g.t().contiguous().t(), state)
    with pytest.raises(RuntimeError, match=r"first\[0\] has a dtype or size"):
        raw(p, g, {**state, "exp_avg": state["exp_avg"].double()})
    with pytest.raises(RuntimeError, match=r"params\[0\] must be a dense float32, bfloat16 or float16"):
        raw(p.double(), g, state)


def opcheck_arguments() -> tuple[Any, ...]:
    p, g, state = make("adamw", 300, moments="int8", param=torch.bfloat16)
    keys = ["first", "second", "first_scale", "second_scale"]
    names = ["exp_avg_q8", "exp_avg_sq_q8", "exp_avg_scale", "exp_avg_sq_scale"]
    tensors = [state[name] for name in names]
    hyper = [0.1, 0.9, 0.99, 1e-8, 0.0, 0.0]
    return ("adamw", [p], [g], keys, tensors, [state["step"]], torch.tensor(0.5), hyper, 0.0, "plain", 0, False)


def test_opcheck_with_core(core) -> None:
    torch.library.opcheck(torch.ops.pyft.update_.default, opcheck_arguments())


def test_opcheck_without_core() -> None:
    """In a process of its own, since a loaded core stays loaded."""
    code = (
        "import torch, pyft.ops\n"
        "t = lambda: torch.rand(40)\n"
        "torch.library.opcheck(torch.ops.pyft.update_.default, ('adamw', [t()], [t()], ['first', 'second'],"
        " [t(), t()], [torch.tensor(1.0)], None, [.1, .9, .99, 1e-8, .1, 0.], 0., 'plain', 0, False))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYFT_CORE": "off"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_compiled_graph_does_not_break(backend: str) -> None:
    p, g, state = make("lion", 64)
    q, other = p.clone(), {key: value.clone() for key, value in state.items()}

    def step(p: Tensor, g: Tensor, exp_avg: Tensor) -> Tensor:
        update_("lion", [p], [g], {"exp_avg": [exp_avg]}, hyper_of("lion"))
        return p * 1.0

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(p, g, state["exp_avg"])
    update_("lion", [q], [g], {"exp_avg": [other["exp_avg"]]}, hyper_of("lion"))
    assert torch.equal(got, q)
    assert torch.equal(p, q)
