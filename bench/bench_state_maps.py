"""How to keep a moment in 8 bits: pyft's companded linear map against the dynamic one of Dettmers et al., 2022.

Both on blocks of 256, with moments of AdamW as a model in training has them: accuracy of what is kept, and of an update
made from it; and the time of a step. pytest bench/bench_state_maps.py
"""

from __future__ import annotations

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
        "companded linear (pyft)": through_pyft(m, v),
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
    assert errors["companded linear (pyft)"] < errors["dynamic"]


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_complete(signed: bool) -> None:
    codes = dynamic_map(signed)
    assert len(codes) == 256
    assert bool((codes.diff() > 0).all())
