"""Draws as bits against torch's own from the same state of the generator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyft.ops import random_bits
from pyft.ops.bit_masks import unpack_bits
from pyft.ops.random_bits import bernoulli_bits


@pytest.fixture(autouse=True)
def random_state() -> Any:
    with torch.random.fork_rng(devices=[]):
        yield


def check(x: torch.Tensor, p: float) -> None:
    state = torch.get_rng_state()
    bits = bernoulli_bits(x, p)
    after, following = torch.get_rng_state(), torch.rand(3)
    torch.set_rng_state(state)
    drawn = torch.empty_like(x).bernoulli_(p)
    assert torch.equal(unpack_bits(bits, drawn), drawn.bool())
    assert torch.equal(after, torch.get_rng_state())
    assert torch.equal(following, torch.rand(3))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 311, 312, 313, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_draws_of_torch(cpu_target: str, count: int, p: float) -> None:
    torch.manual_seed(count)
    check(torch.empty(count), p)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**40), st.integers(0, 700), st.integers(0, 3000), st.floats(0.0, 1.0))
def test_from_any_state(core: Any, seed: int, before: int, count: int, p: float) -> None:
    torch.manual_seed(seed)
    # torch.randn keeps a number for its next call, and one float takes a single word.
    torch.randn(3, dtype=torch.float64)
    torch.rand(before)
    check(torch.empty(count), p)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.9, 1.0, 2.0**-40])
@pytest.mark.parametrize(("before", "count"), [(0, 1), (1, 2000), (623, 13), (624, 312), (1000, 1031)])
def test_the_kernel_against_numpys_twister(cpu_target: str, before: int, count: int, p: float) -> None:
    """On any processor, whatever generator torch has there."""
    torch.manual_seed(before)
    torch.rand(before)
    state = torch.get_rng_state()
    twister = np.random.MT19937()
    words = state[24 : 24 + 624 * 8].numpy().view(np.uint64).astype(np.uint32)
    left = int(state[8:12].view(torch.int32))
    place = int(state[16:24].view(torch.int64)) if left > 1 else 624
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": place}}
    drawn = twister.random_raw(2 * count).astype(np.uint64).reshape(count, 2)
    below = ((drawn[:, 0] << np.uint64(32) | drawn[:, 1]) & np.uint64(2**53 - 1)) / 2.0**53 < p
    bits = torch.ops.pyft.bernoulli_bits(state, count, p)
    assert torch.equal(bits, torch.from_numpy(np.packbits(below, bitorder="little")))
    after = state[24 : 24 + 624 * 8].numpy().view(np.uint64)
    assert (after == twister.state["state"]["key"]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_layouts(core: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.empty(4, 6, 5, 3, dtype=dtype)
    check(x, 0.4)
    check(x.contiguous(memory_format=torch.channels_last), 0.4)
    check(x.transpose(1, 2).contiguous().transpose(1, 2), 0.4)


def test_another_generator_is_noticed(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch draws otherwise, as on Intel's processors, it is torch that draws."""
    own = random_bits.bernoulli_bits_reference
    monkeypatch.setattr(random_bits, "bernoulli_bits_reference", lambda *given: own(*given) ^ 1)
    random_bits._draws_are_known.cache_clear()
    assert not random_bits._draws_are_known()
    check(torch.empty(100), 0.3)
    random_bits._draws_are_known.cache_clear()


def test_errors_name_the_argument(core: Any) -> None:
    state = torch.get_rng_state()
    op = torch.ops.pyft.bernoulli_bits
    with pytest.raises(RuntimeError, match="state must be 5056 contiguous uint8"):
        op(state[:-1], 3, 0.5)
    with pytest.raises(RuntimeError, match="p from 0 to 1"):
        op(state, 3, 1.5)
    with pytest.raises(RuntimeError, match="not that of torch's generator"):
        op(torch.full_like(state, 255), 3, 0.5)


def test_opcheck(core: Any) -> None:
    torch.library.opcheck(
        torch.ops.pyft.bernoulli_bits.default,
        (torch.get_rng_state(), 100, 0.3),
        test_utils=("test_schema", "test_faketensor"),
    )
