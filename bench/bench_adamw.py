"""Clip and AdamW in fp32 on the CPU: pyft against torch's three paths, each with torch's clip, in one run.

pytest bench/bench_adamw.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from parameters import BERT, MINILM, Shapes, numel, parameters, resnet50
from stream import fastest_stream

import pyft

# Shapes, rounds, calls in a row.
SETS: dict[str, tuple[Shapes, int, int]] = {
    "BERT base, 110 M": (BERT, 9, 1),
    "MiniLM, 22 M": (MINILM, 25, 1),
    "ResNet-50, 26 M": (resnet50(), 25, 1),
    "448 x 16 K": ([(16384,)] * 448, 25, 1),
    "one of 448 x 16 K": ([(448 * 16384,)], 25, 1),
    "2000 x 512": ([(512,)] * 2000, 15, 10),
    "one of 2000 x 512": ([(2000 * 512,)], 15, 10),
    "400 x 1 K": ([(1000,)] * 400, 15, 20),
}


def torch_step(shapes: Shapes, **options: bool) -> Callable[[], None]:
    params = parameters(shapes)
    optimizer = torch.optim.AdamW(params, lr=1e-5, **options)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


@pytest.mark.parametrize("name", SETS)
def test_clip_and_adamw(benchmark, record, in_turn, name: str) -> None:
    shapes, rounds, block = SETS[name]
    optimizer = pyft.optim.AdamW(parameters(shapes), lr=1e-5, clip_norm=1.0)
    calls: dict[str, Callable[[], object]] = {
        "pyft": optimizer.step,
        "torch clip + fused": torch_step(shapes, fused=True),
        "torch clip + foreach": torch_step(shapes, foreach=True),
        "torch clip + for-loop": torch_step(shapes, foreach=False),
    }
    medians = in_turn(calls, rounds, block)
    size = numel(shapes)
    for peer, seconds in medians.items():
        # Two passes: 4 bytes to read for the norm, 16 to read and 12 to write for the update.
        figures = {"ns/param": seconds / size * 1e9}
        record(
            "clip + AdamW, fp32",
            name,
            peer,
            seconds,
            **figures,
            **({"GB/s": 32 * size / seconds / 1e9} if peer == "pyft" else {}),
        )
    benchmark.extra_info.update({peer: seconds / medians["pyft"] for peer, seconds in medians.items()})
    benchmark.pedantic(optimizer.step, rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize(("many", "one"), [("448 x 16 K", "one of 448 x 16 K"), ("2000 x 512", "one of 2000 x 512")])
def test_many_small_tensors(benchmark, record, in_turn, many: str, one: str) -> None:
    """The same number of elements in many tensors and in one."""
    shapes, rounds, block = SETS[many]
    steps = {name: pyft.optim.AdamW(parameters(SETS[name][0]), lr=1e-5, clip_norm=1.0).step for name in (one, many)}
    medians = in_turn(steps, rounds, block)
    for name, seconds in medians.items():
        record("many tensors against one", many, name, seconds, **{"ns/param": seconds / numel(shapes) * 1e9})
    benchmark.pedantic(steps[many], rounds=rounds)


def test_against_the_fastest_stream(benchmark, record, in_turn) -> None:
    """The update alone moves 28 bytes a parameter, as a kernel does that only adds and multiplies, in place."""
    optimizer = pyft.optim.AdamW(parameters(BERT), lr=1e-5)
    streams = fastest_stream(numel(BERT), torch.get_num_threads())
    medians = in_turn({"pyft": optimizer.step, **streams}, 11)
    best = min(medians[name] for name in streams)
    for name, seconds in medians.items():
        rate = 28 * numel(BERT) / seconds / 1e9
        record("update alone, 110 M", "4 reads, 3 writes", name, seconds, **{"GB/s": rate, "of best": best / seconds})
    benchmark.extra_info["of the fastest stream"] = best / medians["pyft"]
    benchmark.pedantic(optimizer.step, rounds=5, warmup_rounds=1)


def test_overhead(benchmark, record, in_turn) -> None:
    """400 tensors of one element: what a step costs beside its kernels."""
    shapes: Shapes = [(1,)] * 400
    calls = {"pyft": pyft.optim.AdamW(parameters(shapes), lr=1e-5, clip_norm=1.0).step}
    calls["torch clip + fused"] = torch_step(shapes, fused=True)
    medians = in_turn(calls, 15, 20)
    for name, seconds in medians.items():
        record("overhead", "400 x 1", name, seconds)
    benchmark.pedantic(calls["pyft"], rounds=100)


class Parts(torch.nn.Module):
    """Weights of 110 M, each used once: a backward that costs little beside the optimizer."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([p.detach() for p in parameters(shapes)])
        self.inputs = {shape[-1]: torch.randn(8, shape[-1]) * 1e-3 for shape in shapes}

    def loss(self) -> torch.Tensor:
        return torch.stack([(self.inputs[w.shape[-1]] @ w.t()).sum() for w in self.weights]).sum()


def test_norm_in_backward(benchmark, record) -> None:
    """Time outside backward plus what backward takes longer, against torch's clip and fused step."""
    model = Parts([shape for shape in BERT if len(shape) == 2] + [s for s in BERT if len(s) == 1])
    params = list(model.parameters())
    two_passes = pyft.optim.AdamW(params, lr=1e-7, clip_norm=1.0)
    fused = torch.optim.AdamW(params, lr=1e-7, fused=True)
    one_pass = pyft.optim.AdamW(params, lr=1e-7, clip_norm=1.0)

    def torch_way() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        fused.step()

    backward: dict[str, list[float]] = {name: [] for name in ("one pass", "two passes", "torch clip + fused")}
    outside: dict[str, list[float]] = {name: [] for name in backward}
    for turn in range(13):
        for name, step in (
            ("one pass", one_pass.step),
            ("two passes", two_passes.step),
            ("torch clip + fused", torch_way),
        ):
            norms = pyft.optim.norm_in_backward(params) if name == "one pass" else None
            one_pass.norm_in_backward = norms
            for param in params:
                param.grad = None
            loss = model.loss()
            began = time.perf_counter()
            loss.backward()
            middle = time.perf_counter()
            step()
            ended = time.perf_counter()
            if norms is not None:
                norms.remove()
            if turn >= 3:
                backward[name].append(middle - began)
                outside[name].append(ended - middle)
    plain = statistics.median(backward["two passes"] + backward["torch clip + fused"])
    growth = max(0.0, statistics.median(backward["one pass"]) - plain)
    for name, seconds in outside.items():
        grown = growth if name == "one pass" else 0.0
        total = statistics.median(seconds) + grown
        record("norm in backward, 110 M", "outside backward + its growth", name, total, growth_ms=grown * 1e3)
    benchmark.pedantic(two_passes.step, rounds=3)
