"""Clip and AdamW in fp32 on the CPU: pyft against torch's three paths, each with torch's clip, in one run.

pytest bench/bench_adamw.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import pyft


def transformer(vocabulary: int, positions: int, width: int, layers: int) -> list[tuple[int, ...]]:
    """Shapes of a BERT-like encoder without its pooler."""
    shapes: list[tuple[int, ...]] = [(vocabulary, width), (positions, width), (2, width), (width,), (width,)]
    for _ in range(layers):
        shapes += [(width, width), (width,)] * 4 + [(width,)] * 4
        shapes += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return shapes


def resnet50() -> list[tuple[int, ...]]:
    """Shapes of ResNet-50 with 1000 outputs."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            convolutions += [(4 * width, inputs, 1, 1)] if block == 0 else []
            shapes += [shape for c in convolutions for shape in (c, (c[0],), (c[0],))]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


SETS = {
    "BERT base, 110 M": (transformer(30522, 512, 768, 12), 9, 1),
    "MiniLM, 22 M": (transformer(30522, 512, 384, 6), 25, 1),
    "ResNet-50, 26 M": (resnet50(), 25, 1),
    "400 x 1 K": ([(1000,)] * 400, 15, 20),
}


def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 1e-3
    return params


def torch_step(shapes: list[tuple[int, ...]], **options: bool) -> Callable[[], None]:
    params = parameters(shapes)
    optimizer = torch.optim.AdamW(params, lr=1e-5, **options)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


@pytest.mark.parametrize("name", SETS)
def test_clip_and_adamw(benchmark, record, in_turn, name: str) -> None:
    shapes, rounds, block = SETS[name]
    ours = parameters(shapes)
    optimizer = pyft.optim.AdamW(ours, lr=1e-5, clip_norm=1.0)
    calls: dict[str, Callable[[], object]] = {
        "pyft": optimizer.step,
        "torch clip + fused": torch_step(shapes, fused=True),
        "torch clip + foreach": torch_step(shapes, foreach=True),
        "torch clip + for-loop": torch_step(shapes, foreach=False),
    }
    medians = in_turn(calls, rounds, block)
    numel = sum(param.numel() for param in ours)
    for peer, seconds in medians.items():
        # Two passes: 4 bytes to read for the norm, 16 to read and 12 to write for the update.
        figures = {"GB/s": 32 * numel / seconds / 1e9} if peer == "pyft" else {}
        record("clip + AdamW, fp32", name, peer, seconds, **figures)
    benchmark.extra_info.update({peer: seconds / medians["pyft"] for peer, seconds in medians.items()})
    benchmark.pedantic(optimizer.step, rounds=rounds, warmup_rounds=1)
