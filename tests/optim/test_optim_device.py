"""Steps on a GPU, on the emulated one: how many launches, what moves, and that nothing waits."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import clip_modes_float64 as clip_formulas
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyft.optim
from pyft.errors import NonFiniteError
from pyft.optim import device_plan
from pyft.optim.device_plan import DevicePlan, DeviceReport

CLIPPING: list[dict[str, Any]] = [
    {"clip_norm": 0.5},
    {"clip_norm": 0.5, "clip_value": 0.1},
    {"clip_norm": 0.01, "clip_mode": "tensor"},
    {"clip_norm": 0.3, "clip_mode": "group"},
    {"clip_norm": {"agc": 0.01, "global": 0.5}},
    {"clip_norm": {"tensor": 0.02, "group": 0.3}},
    {"on_nonfinite": "skip"},
]


@pytest.fixture(autouse=True)
def gpu(emulation: Any, plans_of_the_emulated_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The emulation, with what is said about NaN and inf as it is on a GPU."""
    if emulation is None:
        pytest.skip("runs on the CUDA emulation: pytest --cuda-emulation=ascending")
    monkeypatch.undo()
    from pyft.core.loader import load_cuda_core

    monkeypatch.setattr(device_plan, "device_core", lambda param: load_cuda_core())
    yield emulation
    emulation.set(races=True, traffic=False, processors=3, each=2)


def parameters(count: int, size: int = 7, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(count)
    made = [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for _ in range(count)]
    for param in made:
        param.grad = torch.randn(size, generator=generator).to(dtype)
    return made


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a GPU: reading a number, and copies that the host takes part in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[[], NoWaiting]:
    """no_waiting(): a context in which a look at what is on the GPU is an error."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("the GPU was waited for")

    class Context(NoWaiting):
        def __enter__(self) -> Any:
            self.patch = pytest.MonkeyPatch()
            for name in ("cpu", "item", "tolist", "numpy", "__float__", "__int__", "__bool__"):
                self.patch.setattr(Tensor, name, refuse)
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            self.patch.undo()

    return Context


@pytest.mark.parametrize("count", [1, 2000])
def test_one_launch_without_clipping(gpu: Any, no_waiting: Any, count: int) -> None:
    optimizer = pyft.optim.AdamW(parameters(count), lr=1e-3)
    optimizer.step()
    gpu.reset()
    with no_waiting():
        optimizer.step()
    counters = gpu.counters()
    assert counters["launches"] == 1
    assert counters["synchronisations"] == counters["allocations"] == 0


@pytest.mark.parametrize("count", [1, 2000])
@pytest.mark.parametrize("options", CLIPPING, ids=str)
def test_at_most_three_launches_with_clipping(gpu: Any, no_waiting: Any, options: dict[str, Any], count: int) -> None:
    params = parameters(count)
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = pyft.optim.AdamW(groups, lr=1e-3, **options)
    optimizer.step()
    gpu.reset()
    with no_waiting():
        optimizer.step()
        last = optimizer.last_step
    assert gpu.counters()["launches"] == 3
    assert gpu.counters()["synchronisations"] == 0
    assert last is not None
    assert math.isfinite(last.total_norm or math.nan)


def test_tables_are_copied_only_when_they_change(gpu: Any) -> None:
    params = parameters(5)
    optimizer = pyft.optim.AdamW(params, lr=1e-3, clip_norm=1.0)
    optimizer.step()
    assert isinstance(optimizer._plan, DevicePlan)
    uploads = optimizer._plan.devices[0].core_plan.uploads

    def copies(change: Callable[[], Any]) -> int:
        before = uploads()
        change()
        optimizer.step()
        return uploads() - before

    assert copies(lambda: None) == 0
    assert copies(lambda: optimizer.param_groups[0].update(lr=1e-4)) == 1
    assert copies(lambda: setattr(params[2], "grad", params[2].grad.clone())) == 1
    assert copies(lambda: None) == 0


BYTES = [
    # Gradient read for the norm and again; parameter and moments read and written: FIELD.md, section 2.
    ("fp32", torch.float32, {}, {}, 32),
    ("amsgrad", torch.float32, {"amsgrad": True}, {}, 40),
    ("bf16", torch.bfloat16, {"state_dtype": "bfloat16"}, {}, 16),
    ("bf16, fp32 moments", torch.bfloat16, {}, {}, 24),
    ("split32", torch.bfloat16, {"weights": "split32"}, {}, 28),
    ("int8", torch.float32, {"state_dtype": "int8"}, {}, 20),
    ("bf16 and int8", torch.bfloat16, {"state_dtype": "int8"}, {}, 12),
]


@pytest.mark.parametrize(("dtype", "options", "more", "want"), [case[1:] for case in BYTES], ids=[c[0] for c in BYTES])
def test_bytes_of_an_element(gpu: Any, dtype: torch.dtype, options: Any, more: Any, want: int) -> None:
    size = 1 << 17
    [param] = parameters(1, size, dtype)
    optimizer = pyft.optim.AdamW([param], clip_norm=1.0, **options, **more)
    optimizer.step()
    gpu.reset()
    gpu.set(races=False, traffic=True, processors=1, each=2)
    optimizer.step()
    traffic = gpu.traffic()
    assert len(traffic) == 3
    moved = sum(32 * (kernel.loads.sectors + kernel.stores.sectors) for kernel in traffic.values())
    # The rest: the chunk table, the sums of chunks, and 8-bit moments' scales.
    # Of a sector of scales each warp takes one; neighbours share it in the cache.
    scales = 0.5 if options.get("state_dtype") == "int8" else 0.0
    assert want <= moved / size - scales < want * 1.02 + 0.15
    if dtype == torch.float32 and not options:
        for name in ("sum_kernel", "update_kernel"):
            kernel = next(one for key, one in traffic.items() if name in key)
            assert kernel.loads.wide * 16 >= 0.99 * size * (4 if name == "sum_kernel" else 16)


LAYOUTS: list[tuple[str, dict[str, Any], torch.dtype]] = [
    ("AdamW", {}, torch.float32),
    ("AdamW", {"amsgrad": True}, torch.float32),
    ("AdamW", {"state_dtype": "bfloat16"}, torch.float32),
    ("AdamW", {"state_dtype": "int8"}, torch.float32),
    ("AdamW", {}, torch.float16),
    ("AdamW", {}, torch.bfloat16),
    ("AdamW", {"state_dtype": "bfloat16"}, torch.bfloat16),
    ("AdamW", {"state_dtype": "int8"}, torch.bfloat16),
    ("AdamW", {"weights": "split32"}, torch.bfloat16),
    ("AdamW", {"weights": "split32", "state_dtype": "int8"}, torch.bfloat16),
    ("AdamW", {"weights": "kahan", "state_dtype": "bfloat16"}, torch.bfloat16),
    ("AdamW", {"weights": "stochastic", "state_dtype": "bfloat16"}, torch.bfloat16),
    ("Adam", {}, torch.float32),
    ("Adam", {"state_dtype": "int8"}, torch.float32),
    ("SGD", {}, torch.float32),
    ("SGD", {"momentum": 0.9}, torch.float32),
    ("SGD", {"momentum": 0.9, "nesterov": True}, torch.float32),
    ("SGD", {"momentum": 0.9}, torch.bfloat16),
    ("RMSprop", {}, torch.float32),
    ("Adagrad", {}, torch.float32),
    ("Lion", {}, torch.float32),
    ("Lion", {"state_dtype": "bfloat16"}, torch.bfloat16),
]


@pytest.mark.parametrize(("name", "options", "dtype"), LAYOUTS, ids=lambda value: str(value).replace("torch.", ""))
def test_the_kernel_of_one_layout_has_the_bits_of_that_for_any(
    gpu: Any, name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """A pull too weak to change a number needs the kernel that asks every tensor for its formats."""
    sizes = (5000, 257, 1, 2048)
    both = [[parameters(1, size, dtype)[0] for size in sizes] for _ in range(2)]
    odd = torch.zeros(1001, dtype=dtype)
    for params in both:
        params.append(torch.nn.Parameter(odd.clone()[1:]))
        params[-1].grad = torch.linspace(-1, 1, 1000).to(dtype)
    fixed = getattr(pyft.optim, name)(both[0], lr=1e-2, **options)
    asking = getattr(pyft.optim, name)(both[1], lr=1e-2, decay_to_init=1e-30, **options)
    gpu.set(traffic=True)
    for step in range(3):
        for optimizer, kernel in ((fixed, "FixedLayout"), (asking, "AnyLayouts")):
            gpu.reset()
            optimizer.step()
            (launched,) = gpu.traffic()
            assert kernel in launched, (step, launched)
    for one, other in zip(both[0], both[1], strict=True):
        assert torch.equal(one, other)
        assert all(torch.equal(value, asking.state[other][key]) for key, value in fixed.state[one].items())


def test_tensors_of_several_layouts_are_one_launch(gpu: Any) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    together, alone = ([parameters(1, 600, dtype)[0] for dtype in dtypes] for _ in range(2))
    mixed = pyft.optim.AdamW(together)
    each = [pyft.optim.AdamW([param]) for param in alone]
    for _ in range(2):
        gpu.reset()
        mixed.step()
        assert gpu.counters()["launches"] == 1
        for optimizer in each:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_counters_and_report_stay_on_the_gpu_until_asked(gpu: Any, no_waiting: Any) -> None:
    params = parameters(3)
    optimizer = pyft.optim.AdamW(params, clip_norm=1.0)
    reports = []
    for step in range(3):
        for i, param in enumerate(params):
            param.grad = torch.full_like(param, float(step + 1 + i))
        with no_waiting() if step else torch.no_grad():
            optimizer.step()
            reports.append(optimizer.last_step)
    norms = [math.sqrt(7 * sum((step + 1.0 + i) ** 2 for i in range(3))) for step in range(3)]
    assert [report.total_norm for report in reports] == pytest.approx(norms, rel=1e-12)
    assert all(isinstance(report, DeviceReport) for report in reports)
    assert [float(optimizer.state[param]["step"]) for param in params] == [3.0] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_unasked(gpu: Any, no_waiting: Any, bad: float) -> None:
    params = parameters(4)
    optimizer = pyft.optim.AdamW([("abcd"[i], param) for i, param in enumerate(params)], clip_norm=1.0)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    state = [{key: value.clone() for key, value in optimizer.state[param].items()} for param in params]
    params[2].grad[3] = bad
    with no_waiting():
        optimizer.step()
    report = optimizer.last_step
    assert report.skipped
    assert report.first_bad == "c"
    assert report.skipped_steps == optimizer.skipped_steps == 1
    assert report.clip_coef == 1.0
    assert not math.isfinite(report.total_norm)
    for param, old, old_state in zip(params, before, state, strict=True):
        assert torch.equal(param, old)
        assert all(torch.equal(optimizer.state[param][key], value) for key, value in old_state.items())
    params[2].grad[3] = 0.0
    optimizer.step()
    assert not optimizer.last_step.skipped
    assert optimizer.skipped_steps == 1
    assert float(optimizer.state[params[0]]["step"]) == 2.0
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.last_step == optimizer.last_step
    assert again.skipped_steps == 1


def test_raise_reads_the_flag(gpu: Any) -> None:
    params = parameters(2)
    params[1].grad[0] = math.inf
    optimizer = pyft.optim.SGD(params, momentum=0.9, clip_norm=1.0, on_nonfinite="raise")
    before = [param.detach().clone() for param in params]
    with pytest.raises(NonFiniteError, match="number 1 of shape"):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert not optimizer.state
    assert optimizer.skipped_steps == 0


def test_a_first_step_that_was_skipped_is_first_again(gpu: Any) -> None:
    """SGD takes the first gradient into its buffer without dampening: known on the GPU alone."""
    runs = []
    for skips in (0, 2):
        params = parameters(3)
        optimizer = pyft.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, clip_norm=10.0, on_nonfinite="skip")
        for _ in range(skips):
            good = params[0].grad.clone()
            params[0].grad[0] = math.nan
            optimizer.step()
            params[0].grad.copy_(good)
        # A gradient less makes a new plan, which must learn what was.
        kept, params[2].grad = params[2].grad, None
        optimizer.step()
        params[2].grad = kept
        optimizer.step()
        runs.append([param.detach().clone() for param in params])
        assert optimizer.skipped_steps == skips
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("options", CLIPPING, ids=str)
def test_several_gpus_come_to_what_one_does(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, no_waiting: Any, options: dict[str, Any]
) -> None:
    runs = []
    for gpus in (1, 3):
        place = {}
        monkeypatch.setattr(device_plan, "device_of", lambda param, place=place, gpus=gpus: place[id(param)] % gpus)
        params = parameters(8, 300)
        place.update({id(param): i for i, param in enumerate(params)})
        params[5].grad *= 100.0
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.05}]
        optimizer = pyft.optim.AdamW(groups, **options)
        optimizer.step()
        with no_waiting():
            optimizer.step()
        assert len(optimizer._plan.devices) == gpus
        last = optimizer.last_step
        params[6].grad[7] = math.nan
        optimizer.step()
        bad = optimizer.last_step
        assert bad.skipped
        assert bad.first_bad == "number 6"
        runs.append((last.total_norm, last.clip_coef, [param.detach().clone() for param in params]))
    assert runs[0][:2] == runs[1][:2]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][2], runs[1][2], strict=True))


def test_the_grid_changes_no_bit(gpu: Any) -> None:
    runs = []
    for processors, each in ((1, 1), (3, 2), (40, 4)):
        gpu.set(processors=processors, each=each)
        params = parameters(5, 9000) + parameters(30, 3) + parameters(1, 140_000)
        optimizer = pyft.optim.AdamW(params, clip_norm=0.1, state_dtype="int8")
        for _ in range(2):
            optimizer.step()
        runs.append((optimizer.last_step.total_norm, [param.detach().clone() for param in params]))
    for other in runs[1:]:
        assert other[0] == runs[0][0]
        assert all(torch.equal(a, b) for a, b in zip(other[1], runs[0][1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_are_shared_out_among_blocks(gpu: Any, no_waiting: Any, dtype: torch.dtype) -> None:
    """Three launches for any shape, the bits of one block for any grid, and adaptive clipping's own formula."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(70_001,), (2, 16_385), (3, 16_384), (40, 5)]
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    grads = [torch.randn(shape, generator=generator).to(dtype) * 3.0 for shape in shapes]
    runs = []
    for processors, each in ((1, 1), (2, 1), (30, 4)):
        gpu.set(processors=processors, each=each)
        params = [torch.nn.Parameter(value.clone()) for value in values]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer = pyft.optim.SGD(params, lr=1.0, clip_norm=0.01, clip_mode="agc")
        optimizer.step()
        gpu.reset()
        with no_waiting():
            optimizer.step()
        assert gpu.counters()["launches"] == 3
        assert gpu.counters()["synchronisations"] == 0
        runs.append((optimizer.last_step.total_norm, params))
    for other in runs[1:]:
        assert other[0] == runs[0][0]
        assert all(torch.equal(a, b) for a, b in zip(other[1], runs[0][1], strict=True))
    wanted = [value.double().numpy() for value in values]
    for _ in range(2):
        clipped, total, _ = clip_formulas.clip([g.double().numpy() for g in grads], wanted, [0] * 4, {"agc": 0.01})
        wanted = [value - grad for value, grad in zip(wanted, clipped, strict=True)]
    assert runs[0][0] == pytest.approx(total, rel=1e-12)
    tolerance = 1e-6 if dtype == torch.float32 else 0.03
    for param, want in zip(runs[0][1], wanted, strict=True):
        np.testing.assert_allclose(param.detach().double().numpy(), want, rtol=tolerance, atol=tolerance)


def test_chunks_of_a_long_tensor(gpu: Any) -> None:
    size = (1 << 23) + 5
    param = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
    param.grad = torch.full_like(param, 0.5)
    gpu.set(races=False, processors=4)
    optimizer = pyft.optim.SGD([param], lr=0.5, on_nonfinite="skip")
    optimizer.step()
    assert optimizer.last_step.total_norm == math.sqrt(size * 0.25)
    assert (param == 0.75).all()


def test_a_launch_that_fails_names_the_op(gpu: Any) -> None:
    optimizer = pyft.optim.AdamW(parameters(2))
    gpu.fail_next_launch(719)
    with pytest.raises(RuntimeError, match="pyft::update_: cudaErrorLaunchFailure"):
        optimizer.step()


def test_updates_in_backward_are_reported_together(gpu: Any, no_waiting: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = pyft.optim.AdamW(model.named_parameters(), step_in_backward=True, on_nonfinite="skip")
    norms = []
    for scale in (1.0, math.inf, 2.0):
        before = [param.detach().clone() for param in model.parameters()]
        loss = (model(torch.ones(5, 4)) * scale).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        norms.append(math.sqrt(sum(float(grad.double().square().sum()) for grad in gradients)))
        loss.backward()
        optimizer.step()
        last = optimizer.last_step
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert last.skipped == math.isinf(scale)
        assert any(moved) != math.isinf(scale)
        if math.isfinite(scale):
            assert last.total_norm == pytest.approx(norms[-1], rel=1e-6)
    assert optimizer.skipped_steps == 1


def test_learning_rate_on_the_gpu(gpu: Any, no_waiting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = torch.tensor(0.25)
    monkeypatch.setattr("pyft.optim.step_plan.is_on_device", lambda value: isinstance(value, Tensor))
    params = parameters(2)
    optimizer = pyft.optim.SGD([{"params": params[:1], "lr": rate}, {"params": params[1:], "lr": 0.125}])
    optimizer.step()
    want = [param.detach() - lr * param.grad for param, lr in zip(params, (0.5, 0.125), strict=True)]
    rate.fill_(0.5)
    with no_waiting():
        optimizer.step()
    assert all(torch.equal(param.detach(), value) for param, value in zip(params, want, strict=True))
