"""Clipping for other people's optimizers: as torch's, except where torch destroys gradients."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyft.optim.clip import clip_coefficient, clip_grad_agc_, clip_grad_norm_, clip_grad_value_, grad_norm

_spec = importlib.util.spec_from_file_location(
    "clip_float64", Path(__file__).resolve().parents[1] / "reference" / "clip_float64.py"
)
assert _spec is not None
assert _spec.loader is not None
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

SHAPES = [(50, 3), (7,), (2, 3, 4, 4), (0,), ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ORDERS = [2.0, 1.0, 3.5, 0.5, math.inf]
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 2.0**-52}
CLIPS: dict[str, Callable[..., object]] = {
    "norm": lambda params: clip_grad_norm_(params, 0.1),
    "value": lambda params: clip_grad_value_(params, 0.1),
    "agc": lambda params: clip_grad_agc_(params, 0.01),
}


def parameters(dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(dtype)
    return params


def grads_of(params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    grads = [param.grad for param in params]
    assert all(grad is not None for grad in grads)
    return grads  # type: ignore[return-value]


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64, copy=True).numpy()


@pytest.mark.parametrize("norm_type", ORDERS)
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 5.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norm_equals_torch(backend: str, norm_type: float, max_norm: float, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    norm = clip_grad_norm_(ours, max_norm, norm_type)
    # torch's inf-norm raises on an empty tensor.
    want = torch.nn.utils.clip_grad_norm_([p for p in theirs if p.numel()], max_norm, norm_type)
    assert norm.dtype == want.dtype
    assert float(norm) == pytest.approx(float(want), rel=8 * ULP[dtype])
    for a, b in zip(grads_of(ours), grads_of(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=12 * ULP[dtype], atol=0)


@pytest.mark.parametrize("norm_type", ORDERS)
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 5.0, 1e9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_equals_float64(backend: str, norm_type: float, max_norm: float, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    before = [wide(grad) for grad in grads_of(params)]
    want = oracle.total_norm(before, norm_type)
    norm = clip_grad_norm_(params, max_norm, norm_type)
    assert float(norm) == pytest.approx(want, rel=2.0**-23)
    factor = oracle.norm_factor(want, max_norm)
    for grad, old in zip(grads_of(params), before, strict=True):
        # Four roundings of fp32 in torch's factor, one of the dtype; far below what clipping takes away.
        bound = (0.51 * ULP[dtype] + 4 * 2.0**-24) * np.abs(old * factor) + (2.0**-25 if dtype == torch.float16 else 0)
        assert np.all(np.abs(wide(grad) - old * factor) <= bound)
    assert factor < 1.0 or max_norm > 1.0


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    max_norm=st.floats(1e-3, 1e3),
    norm_type=st.sampled_from([1.0, 2.0, math.inf]),
)
def test_norm_after_clipping_is_at_most_the_limit(
    backend: str, numbers: list[float], max_norm: float, norm_type: float
) -> None:
    param = torch.nn.Parameter(torch.zeros(len(numbers)))
    param.grad = torch.tensor(numbers)
    before = param.grad.clone()
    norm = float(clip_grad_norm_([param], max_norm, norm_type))
    after = oracle.total_norm([wide(param.grad)], norm_type)
    assert norm == pytest.approx(oracle.total_norm([wide(before)], norm_type), rel=2.0**-23, abs=1e-45)
    # A factor below the normal fp32 numbers has few digits.
    assert after <= max_norm * (1 + (1e-6 if norm < 5e37 * max_norm else 1e-2))
    if norm < max_norm * (1 - 1e-6) - 2e-6:
        assert torch.equal(param.grad, before)


def test_coefficient_is_torch_s_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    norms = 10.0 ** (torch.rand(2000, generator=generator) * 12 - 6)
    limits = 10.0 ** (torch.rand(2000, generator=generator) * 6 - 3)
    for norm, limit in zip(norms.tolist(), limits.tolist(), strict=True):
        want = torch.clamp(limit / (torch.tensor(norm) + 1e-6), max=1.0)
        assert clip_coefficient(norm, limit) == float(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_are_torch_s_to_the_bit_where_the_norm_is(backend: str, dtype: torch.dtype) -> None:
    """One element: both have the very same norm, so factor and product must be the same bits."""
    for value in torch.linspace(1.1, 900.0, 50).tolist():
        ours, theirs = (torch.nn.Parameter(torch.zeros(1, dtype=dtype)) for _ in range(2))
        ours.grad, theirs.grad = (torch.tensor([value], dtype=dtype) for _ in range(2))
        clip_grad_norm_(ours, 0.7)
        total = torch.nn.utils.get_total_norm([theirs.grad.float() if dtype == torch.bfloat16 else theirs.grad])
        torch.nn.utils.clip_grads_with_norm_(theirs, 0.7, total)
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("clip_value", [0.0, 0.3, 1e9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_equals_torch(backend: str, clip_value: float, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    grads_of(ours)[0][3, 1] = grads_of(theirs)[0][3, 1] = math.nan
    grads_of(ours)[1][6] = grads_of(theirs)[1][6] = -math.inf
    before = [wide(grad) for grad in grads_of(ours)]
    assert clip_grad_value_(ours, clip_value, foreach=None) is None
    # torch refuses a limit that float16 cannot hold.
    if not (dtype == torch.float16 and clip_value > 65504):
        torch.nn.utils.clip_grad_value_([p for p in theirs if p.numel()], clip_value)
        for a, b in zip(grads_of(ours), grads_of(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    for grad, old in zip(grads_of(ours), before, strict=True):
        want = torch.from_numpy(np.asarray(oracle.clamped(old, clip_value))).to(dtype).reshape(grad.shape)
        torch.testing.assert_close(grad, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agc_equals_float64(backend: str, dtype: torch.dtype) -> None:
    params = parameters(dtype, scale=0.03)
    before = [wide(grad) for grad in grads_of(params)]
    weights = [wide(param) for param in params]
    assert clip_grad_agc_(params, clipping=0.02, eps=1e-3) is None
    changed = 0
    for param, grad, weight in zip(params, before, weights, strict=True):
        want = oracle.agc(grad, weight, 0.02, 1e-3)
        got = wide(param.grad)
        bound = (0.51 * ULP[dtype] + 2.0**-23) * np.abs(want) + (2.0**-25 if dtype == torch.float16 else 0)
        assert np.all(np.abs(got - want) <= bound)
        assert np.array_equal(wide(param), weight), "parameters are only read"
        changed += int((got != grad).sum())
    assert 0 < changed < sum(grad.size for grad in before), "some rows above the limit, some below"


def test_agc_of_one_layer_by_hand(backend: str) -> None:
    """Rows are the outputs: |W| = 5 and eps; |G| = 10 and 0.5."""
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        layer.bias.copy_(torch.tensor([6.0, 8.0]))
    layer.weight.grad = torch.tensor([[6.0, 8.0], [0.3, 0.4]])
    layer.bias.grad = torch.tensor([0.06, 0.08])
    clip_grad_agc_(layer.parameters(), clipping=0.1, eps=0.5)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.3, 0.4], [0.03, 0.04]]))
    assert torch.equal(layer.bias.grad, torch.tensor([0.06, 0.08])), "0.1 is below 0.1 * 10"


def test_total_norm_of_gradients_or_parameters(backend: str) -> None:
    params = parameters()
    grads = grads_of(params)
    want = torch.nn.utils.get_total_norm([g for g in grads if g.numel()])
    for given_ in (grads, params, iter(params), grads[:2] + params[2:]):
        assert float(grad_norm(given_)) == pytest.approx(float(want), rel=1e-6)
    leaf = torch.zeros(2, requires_grad=True)
    assert float(grad_norm([leaf, torch.nn.Parameter(torch.ones(3), requires_grad=False)])) == 0.0
    leaf.grad = torch.tensor([3.0, 4.0])
    assert float(grad_norm(leaf)) == 5.0
    assert float(grad_norm(leaf.grad)) == 5.0
    assert float(grad_norm(leaf * 2.0 + 1.0)) == pytest.approx(math.sqrt(2.0)), "a result is itself the gradient"
    for p in ORDERS:
        want = oracle.total_norm([wide(g) for g in grads], p)
        assert float(grad_norm(params, p)) == pytest.approx(want, rel=2.0**-23)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_of(parameters()), strict=True)), "nothing is changed"


def test_single_tensor_no_gradient_and_generator(backend: str) -> None:
    param = parameters()[0]
    before = param.grad.norm()
    assert float(clip_grad_norm_(param, 1.0)) == pytest.approx(float(before))
    assert float(param.grad.norm()) == pytest.approx(1.0, rel=1e-5)
    clip_grad_value_(param, 1e-3)
    assert float(param.grad.abs().max()) == pytest.approx(1e-3)
    clip_grad_agc_(param, 1e-6)
    assert float(param.grad.abs().max()) < 1e-4
    for without in ([torch.nn.Parameter(torch.ones(2))], []):
        assert float(clip_grad_norm_(without, 1.0)) == 0.0
        assert float(grad_norm(without)) == 0.0
        clip_grad_value_(without, 1.0)
        clip_grad_agc_(without)
    for clip in CLIPS.values():
        params = parameters()
        clip(param for param in params)
        assert not torch.equal(grads_of(params)[0], grads_of(parameters())[0])


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_is_accepted(backend: str, foreach: bool | None) -> None:
    params = parameters()
    clip_grad_norm_(params, 1.0, 2.0, False, foreach)
    clip_grad_value_(params, 0.1, foreach)
    assert float(grad_norm(params)) <= 1.0


def test_fp16_gradients_whose_norm_exceeds_65504_survive(backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(9000, dtype=torch.float16))
    for p, want in ((2.0, 1000 * math.sqrt(9000)), (1.0, 9e6), (0.5, 1000 * 9000.0**2)):
        param.grad = torch.full((9000,), 1000.0, dtype=torch.float16)
        assert float(clip_grad_norm_([param], want / 4, p)) == pytest.approx(want, rel=1e-6)
        assert (param.grad == 250.0).all()


def test_bf16_norm_is_not_rounded_to_bf16(backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(1001, dtype=torch.bfloat16))
    param.grad = torch.ones(1001, dtype=torch.bfloat16)
    norm = clip_grad_norm_([param], 1e9)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(math.sqrt(1001), rel=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm_type", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_norm_leaves_all_gradients(backend: str, bad: float, norm_type: float, dtype: torch.dtype) -> None:
    for place in (0, -1):
        params = parameters(dtype)
        grads_of(params)[1][place] = bad
        before = [grad.clone() for grad in grads_of(params)]
        norm = float(clip_grad_norm_(params, 1.0, norm_type))
        assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
        with pytest.raises(RuntimeError, match=r"total norm of order .* cannot be clipped.*error_if_nonfinite=False"):
            clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)
        for grad, old in zip(grads_of(params), before, strict=True):
            torch.testing.assert_close(grad, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5])
def test_large_finite_gradients_are_clipped_not_zeroed(backend: str, norm_type: float) -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.full((4,), 2e38)
    norm = clip_grad_norm_([param], 1.0, norm_type)
    assert float(norm) == pytest.approx(2e38 * 4 ** (1 / norm_type), rel=1e-6)
    torch.testing.assert_close(param.grad, torch.full((4,), 4 ** (-1 / norm_type)), rtol=1e-5, atol=0)
    # Where the norm fits float32 it has that dtype.
    param.grad = torch.full((4,), 1e38)
    assert clip_grad_norm_([param], 1.0, 2.0).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous_gradients(backend: str, dtype: torch.dtype) -> None:
    whole = torch.randn(20, 60, generator=torch.Generator().manual_seed(1)).to(dtype)
    for clip in CLIPS.values():
        data = whole.clone()
        param = torch.nn.Parameter(torch.full((30, 20), 0.5, dtype=dtype))
        plain = torch.nn.Parameter(torch.full((30, 20), 0.5, dtype=dtype))
        plain.grad = data[:, ::2].t().contiguous()
        param.grad = data[:, ::2].t()
        clip([param])
        clip([plain])
        torch.testing.assert_close(param.grad, plain.grad, rtol=4 * ULP[dtype], atol=0)
        assert torch.equal(data[:, 1::2], whole[:, 1::2]), "between the gradient's elements nothing is written"
        assert not torch.equal(data[:, ::2], whole[:, ::2])


def test_mixed_dtypes(backend: str) -> None:
    for made in itertools.permutations([parameters(dtype, seed=i)[0] for i, dtype in enumerate(DTYPES)], 3):
        params = [torch.nn.Parameter(param.detach().clone()) for param in made]
        for param, source in zip(params, made, strict=True):
            param.grad = source.grad.clone()
        before = [wide(grad) for grad in grads_of(params)]
        norm = clip_grad_norm_(params, 0.25)
        want = oracle.total_norm(before, 2.0)
        assert float(norm) == pytest.approx(want, rel=2.0**-23)
        for grad, old in zip(grads_of(params), before, strict=True):
            np.testing.assert_allclose(wide(grad), old * 0.25 / want, rtol=ULP[grad.dtype] + 1e-6, atol=2.0**-24)


@pytest.mark.parametrize("norm_type", ORDERS)
def test_same_bits_for_any_thread_count_and_order(core, thread_counts: list[int], norm_type: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, generator=generator) * 10.0 ** (n % 5) for n in [1, 70_000, 3, 1000, 16_385, 900]]
    grads += [grad.bfloat16() for grad in grads] + [grad.half() for grad in grads[:3]]
    results = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        norm = clip_grad_norm_(random.Random(threads).sample(params, len(params)), 0.5, norm_type)
        results.append([norm, *grads_of(params)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_parameter_given_twice_counts_once(backend: str) -> None:
    for name, clip in CLIPS.items():
        once, twice = parameters(), parameters()
        clip(once)
        clip([*twice, *twice[::-1]])
        assert all(torch.equal(a, b) for a, b in zip(grads_of(once), grads_of(twice), strict=True)), name
    assert float(clip_grad_norm_([*once, *once], 9.0)) == float(clip_grad_norm_(once, 9.0))


def test_clipped_in_place_and_seen_by_autograd(backend: str) -> None:
    for clip in CLIPS.values():
        params = parameters()
        memory = [grad.data_ptr() for grad in grads_of(params)]
        versions = [grad._version for grad in grads_of(params)]
        clip(params)
        assert [grad.data_ptr() for grad in grads_of(params)] == memory
        assert all(grad._version > v for grad, v in zip(grads_of(params), versions, strict=True) if grad.numel())


def test_nothing_is_written_where_nothing_is_to_clip(backend: str) -> None:
    params = parameters()
    versions = [grad._version for grad in grads_of(params)]
    clip_grad_norm_(params, 1e6)
    assert [grad._version for grad in grads_of(params)] == versions


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_gradients_of_a_graph(backend: str) -> None:
    """create_graph=True: the gradients themselves require a gradient."""
    for clip in CLIPS.values():
        param = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        (param**3).sum().backward(create_graph=True)
        before = param.grad.detach().clone()
        clip([param])
        assert (param.grad < before).all()
        param.grad = None


def test_a_training_step_is_torch_s(backend: str) -> None:
    """With somebody else's optimizer: ten steps beside torch's clipping."""
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))
    theirs = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))
    theirs.load_state_dict(ours.state_dict())
    x, y = torch.randn(20, 5), torch.randn(20, 2)
    for model, norm, value in (
        (ours, clip_grad_norm_, clip_grad_value_),
        (theirs, torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            value(model.parameters(), 0.05)
            norm(model.parameters(), 0.2)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: clip_grad_norm_(p, -1.0), "max_norm must be 0 or more, got -1.0"),
        (lambda p: clip_grad_norm_(p, math.nan), "max_norm must be 0 or more"),
        (lambda p: clip_grad_norm_(p, 1.0, 0.0), "norm_type must be above 0"),
        (lambda p: clip_grad_norm_(p, 1.0, math.nan), "norm_type must be above 0"),
        (lambda p: grad_norm(p, -2.0), "norm_type must be above 0"),
        (lambda p: clip_grad_value_(p, -1.0), "clip_value must be 0 or more"),
        (lambda p: clip_grad_value_(p, math.nan), "clip_value must be 0 or more"),
        (lambda p: clip_grad_agc_(p, -1.0), "clipping must be 0 or more"),
        (lambda p: clip_grad_agc_(p, 0.1, -1.0), "eps must be 0 or more"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    params = parameters()
    with pytest.raises(ValueError, match=message):
        call(params)
    assert all(torch.equal(a, b) for a, b in zip(grads_of(params), grads_of(parameters()), strict=True))


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: (torch.zeros(3, 2), torch.ones(3, 2).to_sparse()), TypeError, r"parameters\[2\]\.grad.*sparse.*dense"),
        (lambda: (torch.zeros(2, dtype=torch.complex64),) * 2, TypeError, r"parameters\[2\]\.grad.*complex64"),
        (
            lambda: (torch.zeros(4, 3), torch.ones(1, 3).expand(4, 3)),
            ValueError,
            r"parameters\[2\]\.grad.*share memory",
        ),
    ],
    ids=["sparse", "complex", "expanded"],
)
def test_bad_gradients_are_refused_by_name(backend: str, clip: str, make, error, message: str) -> None:
    data, grad = make()
    bad, good = torch.nn.Parameter(data), parameters()[0]
    bad.grad = grad
    before = good.grad.clone()
    with pytest.raises(error, match=message):
        CLIPS[clip]([torch.nn.Parameter(torch.zeros(1)), good, bad])
    assert torch.equal(good.grad, before)
    if error is TypeError:
        with pytest.raises(TypeError, match="gradient number 1 "):
            grad_norm([good, bad])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("norm_type", ORDERS)
def test_mixed_devices(backend: str, norm_type: float) -> None:
    here, mixed = parameters(), parameters()
    for i in (0, 2):
        grad = grads_of(mixed)[i].cuda()
        mixed[i] = torch.nn.Parameter(mixed[i].detach().cuda())
        mixed[i].grad = grad
    norm = clip_grad_norm_(mixed, 0.5, norm_type)
    assert norm.device == grads_of(mixed)[0].device
    assert float(norm) == pytest.approx(float(clip_grad_norm_(here, 0.5, norm_type)), rel=1e-6)
    for a, b in zip(grads_of(mixed), grads_of(here), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=0)


def test_devices_without_data_are_not_needed(backend: str) -> None:
    """Meta tensors have a norm of the right dtype and shape, as while tracing."""
    norm = torch.ops.pyft.grad_norm([torch.empty(3, device="meta", dtype=torch.float16)])
    assert (norm.shape, norm.dtype, norm.device.type) == ((), torch.float32, "meta")
