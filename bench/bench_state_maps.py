"""How to keep a moment in 8 bits: pyft's small floats against companded linear codes and a dynamic map.

All on blocks of 256, with moments of AdamW as a model in training has them: accuracy of what is kept, and of an update
made from it; once, and over many steps of rounding. pytest bench/bench_state_maps.py
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pyft

BLOCK = 256


def dynamic_map(signed: bool, bits: int = 7) -> Tensor:
    """The dynamic tree map ("8-bit Optimizers via Block-wise Quantization", ICLR 2022, section 2.2): each code holds a
    power of ten and a linear fraction; the more zeros in front, the fewer bits are left for the fraction."""
    values: list[float] = []
    for exponent in range(bits):
        count = 2 ** (exponent if signed else exponent + 1)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        means = (edges[:-1] + edges[1:]) / 2
        sizes = (10.0 ** (exponent - (bits - 1)) * means).tolist()
        values += sizes + ([-value for value in sizes] if signed else [])
    return torch.tensor(sorted([*values, 0.0, 1.0])).float()


def through_dynamic(x: Tensor, signed: bool) -> Tensor:
    codes = dynamic_map(signed)
    blocks = x.view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)
    nearest = torch.bucketize(blocks / scale, (codes[1:] + codes[:-1]) / 2)
    return (codes[nearest] * scale).view(-1)


def companded(x: Tensor, signed: bool, fraction: Tensor) -> Tensor:
    """Linear codes of a square root, or of a fourth root for what is not negative (FlashOptim, arXiv 2602.23349).
    `fraction`: 0.5 for the nearest code, or uniform in [0, 1)."""
    blocks = x.view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)
    codes, power = (127, 2) if signed else (255, 4)
    size = (codes * (blocks.abs() / scale) ** (1 / power) + fraction.view(-1, BLOCK)).floor().clamp(max=codes)
    if not signed:
        size = size.clamp(min=1)
    return (blocks.sign() * (size / codes) ** power * scale).view(-1)


def moments(steps: int = 200, size: int = BLOCK * 512) -> tuple[Tensor, Tensor]:
    """Moments after many steps, with gradients whose size differs by 10^4 between elements of a block."""
    generator = torch.Generator().manual_seed(0)
    size_of = 10.0 ** (torch.rand(size, generator=generator) * 4 - 8)
    drift = torch.randn(size, generator=generator) * 0.2
    m, v = torch.zeros(size), torch.zeros(size)
    for _ in range(steps):
        g = (torch.randn(size, generator=generator) + drift) * size_of
        m, v = m.lerp(g, 0.1), v.lerp(g * g, 0.001)
    return m, v


def through_pyft(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What an int8 optimizer keeps of these moments: loaded into one, and from there into an fp32 one."""
    param = torch.nn.Parameter(torch.zeros_like(m))
    state = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": m, "exp_avg_sq": v}}}
    narrow, wide = pyft.optim.AdamW([param], state_dtype="int8"), pyft.optim.AdamW([param])
    narrow.load_state_dict({**state, "param_groups": narrow.state_dict()["param_groups"]})
    wide.load_state_dict(narrow.state_dict())
    return wide.state[param]["exp_avg"], wide.state[param]["exp_avg_sq"]


def test_accuracy(record) -> None:
    m, v = moments()
    exact = m / (v.sqrt() + 1e-10)
    kept = {
        "small floats (pyft)": through_pyft(m, v),
        "companded linear": tuple(companded(x, x is m, torch.full_like(x, 0.5)) for x in (m, v)),
        "dynamic": (through_dynamic(m, True), through_dynamic(v, False)),
    }
    errors = {}
    for name, (a, b) in kept.items():
        update = a / (b.sqrt() + 1e-10)
        errors[name] = float((update - exact).norm() / exact.norm())
        record(
            "8-bit maps: relative error",
            "AdamW moments",
            name,
            float("nan"),
            exp_avg=float((a - m).norm() / m.norm()),
            exp_avg_sq=float((b - v).norm() / v.norm()),
            update=errors[name],
            worst_update=float((update - exact).abs().max()),
        )
    assert errors["small floats (pyft)"] < min(errors["dynamic"], errors["companded linear"])


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_complete(signed: bool) -> None:
    codes = dynamic_map(signed)
    assert len(codes) == 256
    assert bool((codes.diff() > 0).all())


def gradients(spread: float, steps: int, size: int = BLOCK * 64) -> list[Tensor]:
    """Of elements whose sizes differ by 10^spread within each block."""
    generator = torch.Generator().manual_seed(1)
    size_of = 10.0 ** (torch.rand(size, generator=generator) * spread - 4)
    drift = torch.randn(size, generator=generator) * 0.2
    return [(torch.randn(size, generator=generator) + drift) * size_of for _ in range(steps)]


def updates_of_pyft(history: list[Tensor], state_dtype: str) -> list[Tensor]:
    """What AdamW takes from a weight in each step, over lr."""
    param = torch.nn.Parameter(torch.zeros_like(history[0]))
    optimizer = pyft.optim.AdamW([param], lr=1.0, eps=1e-12, weight_decay=0.0, state_dtype=state_dtype)
    updates = []
    for g in history:
        param.grad = g.clone()
        with torch.no_grad():
            param.zero_()
        optimizer.step()
        updates.append(-param.detach().clone())
    return updates


def updates_of_companded(history: list[Tensor]) -> list[Tensor]:
    """The same with linear codes of roots, rounded at random."""
    generator = torch.Generator().manual_seed(0)
    m, v = torch.zeros_like(history[0]), torch.zeros_like(history[0])
    updates = []
    for step, g in enumerate(history, start=1):
        m, v = m.lerp(g, 0.1), v * 0.999 + g * g * 0.001
        updates.append((m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-12))
        m, v = (companded(x, x is m, torch.rand(x.shape, generator=generator)) for x in (m, v))
    return updates


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0, 4.0])
def test_updates_after_many_roundings(record, spread: float) -> None:
    history = gradients(spread, steps=1000)
    exact = updates_of_pyft(history, "float32")[300:]
    errors = {}
    for name, updates in (
        ("small floats (pyft)", updates_of_pyft(history, "int8")),
        ("companded linear", updates_of_companded(history)),
    ):
        wrong = sum(float((a - b).square().sum()) for a, b in zip(updates[300:], exact, strict=True))
        errors[name] = math.sqrt(wrong / sum(float(b.square().sum()) for b in exact))
        record("8-bit maps: updates", f"gradients over 10^{spread:.0f}", name, float("nan"), error=errors[name])
    assert errors["small floats (pyft)"] < 0.15
