"""What the optimizer tests share: oracles by module name, models of awkward shapes, gradients by seed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# The float64 oracles import each other, and are imported, by module name.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reference"))

SHAPES = [(30, 20), (7,), (4, 3, 3, 3), (0,), (), (257,)]
Tensors = Iterable[torch.Tensor]


@pytest.fixture(autouse=True)
def plans_of_the_emulated_gpu(emulation: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --cuda-emulation, parameters on the CPU are taken for ones on a GPU; what is not finite is treated as there.

    Tests that ask for the backend "reference" have that.
    """
    if (
        emulation is None
        or getattr(getattr(request.node, "callspec", None), "params", {}).get("backend") == "reference"
    ):
        return
    from pyft.core.loader import load_cuda_core
    from pyft.optim import base, device_plan

    monkeypatch.setattr(device_plan, "device_core", lambda param: load_cuda_core())
    for module in (base, device_plan):
        monkeypatch.setattr(module, "device_policy", lambda settings: settings.policy)


@pytest.fixture
def make_params() -> Callable[..., list[torch.nn.Parameter]]:
    """make_params(seed=0, dtype=float32, shapes=SHAPES): standard normal parameters."""

    def make(
        seed: int = 0, dtype: torch.dtype = torch.float32, shapes: Iterable[Any] = SHAPES
    ) -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]

    return make


@pytest.fixture
def give_grads() -> Callable[..., None]:
    """give_grads(params, same_params, ..., seed=, scale=1.0): the same normal gradient to the same place of each."""

    def give(*models: list[torch.nn.Parameter], seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(1000 + seed)
        for same in zip(*models, strict=True):
            grad = torch.randn(same[0].shape, generator=generator) * scale
            for param in same:
                param.grad = grad.to(param.grad_dtype or param.dtype, copy=True)

    return give


@pytest.fixture
def array() -> Callable[[torch.Tensor], np.ndarray]:
    """array(tensor): a copy in float64, of any dtype and layout."""
    return lambda tensor: tensor.detach().double().numpy().copy()


@pytest.fixture
def assert_near() -> Callable[..., None]:
    """assert_near(got, want, steps, scale=1.0): within a few fp32 roundings of |want| + scale for each step."""

    def check(got: torch.Tensor, want: Any, steps: int, scale: float = 1.0) -> None:
        want = want.detach().double().numpy() if isinstance(want, torch.Tensor) else want
        error = np.abs(got.detach().double().numpy() - want)
        bound = 4 * 2.0**-24 * steps * (np.abs(want) + scale)
        assert got.shape == want.shape
        assert np.all(error <= bound), f"{(error / bound).max():.3g} times the bound"

    return check


@pytest.fixture
def assert_equal() -> Callable[[Tensors, Tensors], None]:
    """assert_equal(tensors, others): the same bits, dtypes and shapes."""

    def check(some: Tensors, others: Tensors) -> None:
        for number, (a, b) in enumerate(zip(some, others, strict=True)):
            assert a.dtype == b.dtype, f"tensor {number}"
            assert a.shape == b.shape, f"tensor {number}"
            same = torch.equal(bits(a), bits(b))
            assert same, f"tensor {number} of shape {tuple(a.shape)} differs by {(a.double() - b.double()).abs().max()}"

    return check


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that NaN equals itself and 0 is not -0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()])


@pytest.fixture
def state_tensors() -> Callable[[torch.optim.Optimizer], dict[str, torch.Tensor]]:
    """state_tensors(optimizer): copies of all its state by "parameter.key"."""

    def collect(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        state = optimizer.state_dict()["state"]
        return {
            f"{number}.{key}": value.detach().clone()
            for number, of_param in sorted(state.items())
            for key, value in sorted(of_param.items())
            if isinstance(value, torch.Tensor)
        }

    return collect


@pytest.fixture
def snapshot(state_tensors: Any) -> Callable[..., tuple[list[torch.Tensor], dict[str, torch.Tensor], Any]]:
    """snapshot(params, optimizer): copies of the parameters, the state and the groups, to compare with later."""

    def take(params: Tensors, optimizer: torch.optim.Optimizer) -> Any:
        groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
        return [p.detach().clone() for p in params], state_tensors(optimizer), groups

    return take


@pytest.fixture
def assert_untouched(assert_equal: Any, snapshot: Any) -> Callable[..., None]:
    """assert_untouched(params, optimizer, before): nothing of a snapshot has changed by one bit."""

    def check(params: Tensors, optimizer: torch.optim.Optimizer, before: Any) -> None:
        after = snapshot(params, optimizer)
        assert_equal(after[0], before[0])
        # A first step that is refused may have made its state, but must not have used it.
        new = {key: value for key, value in after[1].items() if key not in before[1]}
        assert all(not value.any() for key, value in new.items() if key.endswith(("step", "exp_avg", "exp_avg_sq")))
        assert_equal([after[1][key] for key in before[1]], before[1].values())
        assert after[2] == before[2]

    return check


@pytest.fixture
def thread_counts(emulation: Any) -> Iterator[list[int]]:
    """Thread counts to try, of which a GPU knows nothing; the old count is restored."""
    before = torch.get_num_threads()
    yield [1, 2, 3] if emulation is None else [1]
    torch.set_num_threads(before)
