"""Clipping alone, for other people's optimizers, on the CPU: pyft against torch.nn.utils, in one run.

pytest bench/bench_clip.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from parameters import BERT, parameters

import pyft

# Shapes, dtype, rounds, calls in a row.
SETS: dict[str, tuple[list[tuple[int, ...]], torch.dtype, int, int]] = {
    "BERT base, 110 M, fp32": (BERT, torch.float32, 15, 1),
    "BERT base, 110 M, bf16": (BERT, torch.bfloat16, 15, 1),
    "BERT base, 110 M, fp16": (BERT, torch.float16, 15, 1),
    "400 x 1 K, fp32": ([(1000,)] * 400, torch.float32, 15, 20),
    "400 x 1 K, bf16": ([(1000,)] * 400, torch.bfloat16, 15, 20),
}


def compare(
    in_turn: Callable[..., dict[str, float]],
    record: Callable[..., None],
    benchmark,
    table: str,
    name: str,
    calls: Callable[[list[torch.nn.Parameter]], dict[str, Callable[[], object]]],
    passes: int,
) -> None:
    """`passes`: how often a byte of the gradients is read or written."""
    shapes, dtype, rounds, block = SETS[name]
    params = parameters(shapes, dtype)
    made = calls(params)
    medians = in_turn(made, rounds, block)
    numbers = sum(param.numel() for param in params)
    for peer, seconds in medians.items():
        figures = {"GB/s": passes * dtype.itemsize * numbers / seconds / 1e9} if peer == "pyft" else {}
        record(table, name, peer, seconds, **figures)
    benchmark.extra_info.update({peer: seconds / medians["pyft"] for peer, seconds in medians.items()})
    benchmark.pedantic(made["pyft"], rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize("name", SETS)
def test_norm_that_clips(benchmark, record, in_turn, name: str) -> None:
    """The limit is just below the norm and shrinks by 1 % a call: every call scales, and no number vanishes."""

    def calls(params: list[torch.nn.Parameter]) -> dict[str, Callable[[], object]]:
        limit = float(pyft.optim.grad_norm(params))

        def clip_with(clip: Callable[..., torch.Tensor], **options: bool) -> Callable[[], object]:
            def call() -> None:
                nonlocal limit
                limit *= 0.99
                clip(params, limit, **options)

            return call

        return {
            "pyft": clip_with(pyft.optim.clip_grad_norm_),
            "torch, foreach": clip_with(torch.nn.utils.clip_grad_norm_, foreach=True),
            "torch, for-loop": clip_with(torch.nn.utils.clip_grad_norm_, foreach=False),
        }

    compare(in_turn, record, benchmark, "clip_grad_norm_, scaling", name, calls, passes=3)


@pytest.mark.parametrize("name", SETS)
def test_norm_below_the_limit(benchmark, record, in_turn, name: str) -> None:
    def calls(params: list[torch.nn.Parameter]) -> dict[str, Callable[[], object]]:
        return {
            "pyft": lambda: pyft.optim.clip_grad_norm_(params, 1e9),
            "torch, foreach": lambda: torch.nn.utils.clip_grad_norm_(params, 1e9, foreach=True),
            "torch, for-loop": lambda: torch.nn.utils.clip_grad_norm_(params, 1e9, foreach=False),
        }

    compare(in_turn, record, benchmark, "clip_grad_norm_, below the limit", name, calls, passes=1)


@pytest.mark.parametrize("name", SETS)
def test_value(benchmark, record, in_turn, name: str) -> None:
    def calls(params: list[torch.nn.Parameter]) -> dict[str, Callable[[], object]]:
        return {
            "pyft": lambda: pyft.optim.clip_grad_value_(params, 0.5),
            "torch, foreach": lambda: torch.nn.utils.clip_grad_value_(params, 0.5, foreach=True),
            "torch, for-loop": lambda: torch.nn.utils.clip_grad_value_(params, 0.5, foreach=False),
        }

    compare(in_turn, record, benchmark, "clip_grad_value_", name, calls, passes=2)
