"""On a GPU: one step of clip and AdamW, and lean layers; time from bytes and bandwidth, and measured where one is here.

python bench/bench_cuda.py     # the tables of docs/cuda.md
pytest bench/bench_cuda.py     # needs a GPU; torch's fused AdamW, apex, bitsandbytes and torch's layers in the same run
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from parameters import BERT, numel, parameters
from torch import nn

import pyft

# Of memory, bytes a second, as NVIDIA gives them.
BANDWIDTH = {"A100 80 GB": 2.0e12, "H100 SXM": 3.35e12, "RTX 4090": 1.0e12}


@dataclass(frozen=True)
class Layout:
    """Bytes of one parameter: what it, its gradient and each moment take, and what else is read and written with it.

    `moments` counts both. `extra` is a master copy or its lower half. 8-bit moments have one scale for a block, which
    is left out.
    """

    param: int
    grad: int
    moments: int
    extra: int = 0

    @property
    def update(self) -> int:
        """Everything is read once, and all but the gradient written once."""
        return 2 * (self.param + self.moments + self.extra) + self.grad

    @property
    def fused_clip(self) -> int:
        """The gradient is read once more for its norm; the factor is applied inside the update."""
        return self.update + self.grad

    @property
    def separate_clip(self) -> int:
        """The gradient is read for its norm, then read and written to be scaled."""
        return self.update + 3 * self.grad


FP32, BF16 = Layout(4, 4, 8), Layout(2, 2, 4)
AMSGRAD = Layout(4, 4, 12)
# Row -> ours, and what others move for the same storage, or the nearest that they have. Loads and stores of the others
# were counted in their sources, which docs/cuda.md names.
ROWS: dict[str, dict[str, int]] = {
    "fp32": {"pyft": FP32.fused_clip, "torch fused": FP32.separate_clip, "apex": FP32.separate_clip},
    # The largest second moment is a third state; apex refuses amsgrad.
    "fp32, amsgrad": {"pyft": AMSGRAD.fused_clip, "torch fused": AMSGRAD.separate_clip},
    "bf16 everything": {"pyft": BF16.fused_clip, "torch fused": BF16.separate_clip},
    "bf16, fp32 moments": {"pyft": Layout(2, 2, 8).fused_clip, "apex": Layout(2, 2, 8).separate_clip},
    "bf16, fp32 master, fp32 moments": {
        "pyft": Layout(2, 2, 8, 2).fused_clip,
        # fp16 alone. Reads the master, not the parameter; writes both, and the gradient back.
        "apex": Layout(2, 2, 8, 4).separate_clip - 2 + 2,
    },
    "fp32, 8-bit moments": {"pyft": Layout(4, 4, 2).fused_clip, "bitsandbytes": Layout(4, 4, 2).separate_clip},
    "bf16, 8-bit moments": {"pyft": Layout(2, 2, 2).fused_clip, "bitsandbytes": Layout(2, 2, 2).separate_clip},
}
PEERS = ("torch fused", "apex", "bitsandbytes")


@dataclass(frozen=True)
class Traffic:
    """Of one element of a layer's input: bytes that memory moves forward and backward, and those kept in between."""

    forward: float
    backward: float
    kept: float

    def __str__(self) -> str:
        return f"{self.forward:g} + {self.backward:g}"


BIT = 1 / 8


def lean_traffic(size: int) -> dict[str, tuple[Traffic, Traffic]]:
    """Layer -> ours and torch's, for elements of `size` bytes; numbers for each channel are left out."""
    copy = 2 * size
    norm = Traffic(copy, copy, size), Traffic(copy, copy, 0)
    relu = Traffic(copy, 3 * size, size), Traffic(copy + BIT, copy + BIT, BIT)
    both = Traffic(*(a + b for a, b in zip((copy, copy, size), (copy, 3 * size, size), strict=True)))
    # fp32 takes one pass, 16 bits take two.
    fused = Traffic(copy + BIT, copy + BIT, BIT) if size == 4 else Traffic(2 * copy + BIT, 2 * copy + BIT, BIT)

    def pool(place: int, kept: float) -> Traffic:
        # Each output: a value and a place. Overlapping windows read their inputs from the cache.
        return Traffic(size + (size + place) / 4, size + (size + place) / 4, kept)

    return {
        "ReLU": (relu[1], relu[0]),
        "ReLU6, Hardtanh, LeakyReLU": (Traffic(copy + size + BIT, copy + BIT, BIT), relu[0]),
        "BatchNorm in eval mode": (norm[1], norm[0]),
        "BatchNorm in eval mode, ReLU": (fused, both),
        "Dropout": (Traffic(copy + 1 + 1 + BIT, copy + BIT, BIT), Traffic(copy + 1, copy + 1, 1)),
        "MaxPool2d(3, 2, 1)": (pool(1, 1 / 4), pool(8, size + 8 / 4)),
    }


# Row -> dtype of parameters and options of pyft.optim.AdamW.
OURS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp32, amsgrad": (torch.float32, {"amsgrad": True}),
    "bf16 everything": (torch.bfloat16, {"state_dtype": "bfloat16"}),
    "bf16, fp32 moments": (torch.bfloat16, {}),
    "bf16, fp32 master, fp32 moments": (torch.bfloat16, {"weights": "split32"}),
    "fp32, 8-bit moments": (torch.float32, {"state_dtype": "int8"}),
    "bf16, 8-bit moments": (torch.bfloat16, {"state_dtype": "int8"}),
}


def tables() -> str:
    """Bytes, and milliseconds for BERT base at full bandwidth, as Markdown."""
    count = numel(BERT)
    lines = ["| storage | pyft | " + " | ".join(PEERS) + " |", "|---" * (len(PEERS) + 2) + "|"]
    for row, bytes_of in ROWS.items():
        lines.append(f"| {row} | " + " | ".join(str(bytes_of.get(who, "–")) for who in ("pyft", *PEERS)) + " |")
    lines += ["", f"| ms, {count / 1e6:.1f} M parameters | " + " | ".join(BANDWIDTH) + " |"]
    lines.append("|---" * (len(BANDWIDTH) + 1) + "|")
    for row, bytes_of in ROWS.items():
        for who, moved in bytes_of.items():
            times = " | ".join(f"{1e3 * count * moved / speed:.2f}" for speed in BANDWIDTH.values())
            lines.append(f"| {row}, {who} | {times} |")
    return "\n".join(lines)


def lean_table() -> str:
    """Bytes of an element of the input, forward + backward, as Markdown."""
    heads = [f"{who}, {name}" for name in ("fp32", "16 bits") for who in ("pyft", "torch")]
    lines = ["| layer | " + " | ".join(heads) + " | kept, pyft | kept, torch |", "|---" * (len(heads) + 3) + "|"]
    wide, narrow = lean_traffic(4), lean_traffic(2)
    for layer, (ours, theirs) in wide.items():
        kept = f"{theirs.kept:g}", f"{narrow[layer][1].kept:g}"
        cells = [str(traffic) for pair in ((ours, theirs), narrow[layer]) for traffic in pair]
        lines.append(f"| {layer} | {' | '.join(cells)} | {ours.kept:g} | {' or '.join(dict.fromkeys(kept))} |")
    return "\n".join(lines)


def seconds_of(step: Callable[[], object], rounds: int = 30) -> float:
    """Median seconds of a step, by events on the GPU; ten steps in a row, so that the host is ahead."""
    times = []
    for _ in range(rounds + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e4)
    return statistics.median(times[3:])


def on_gpu(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    params = []
    for param in parameters(BERT, dtype):
        moved = torch.nn.Parameter(param.detach().cuda())
        moved.grad = param.grad.cuda()
        params.append(moved)
    return params


def clipped(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def peers_of(row: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Of those that `ROWS` names, torch and what is installed."""
    made: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {}
    if "torch fused" in ROWS[row]:
        amsgrad = OURS[row][1].get("amsgrad", False)
        made["torch fused"] = lambda params: torch.optim.AdamW(params, lr=1e-5, fused=True, amsgrad=amsgrad)
    # Its masters are for fp16 alone.
    if "apex" in ROWS[row] and "master" not in row and importlib.util.find_spec("amp_C") is not None:
        optimizers = importlib.import_module("apex.optimizers")
        made["apex"] = lambda params: optimizers.FusedAdam(params, lr=1e-5, weight_decay=0.01)
    if "bitsandbytes" in ROWS[row] and importlib.util.find_spec("bitsandbytes") is not None:
        bitsandbytes = importlib.import_module("bitsandbytes")
        made["bitsandbytes"] = lambda params: bitsandbytes.optim.AdamW8bit(params, lr=1e-5)
    found = {}
    for who, make in made.items():
        params = on_gpu(dtype)
        found[who] = clipped(params, make(params))
    return found


@pytest.mark.cuda
@pytest.mark.parametrize("row", ROWS)
def test_step(record: Callable[..., None], row: str) -> None:
    """Seconds of a step, and the share of the card's bandwidth that its bytes amount to."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    dtype, options = OURS[row]
    calls = {"pyft": pyft.optim.AdamW(on_gpu(dtype), lr=1e-5, clip_norm=1.0, **options).step, **peers_of(row, dtype)}
    for who, step in calls.items():
        seconds = seconds_of(step)
        moved = numel(BERT) * ROWS[row][who]
        table = f"clip + AdamW, 110 M, {torch.cuda.get_device_name()}"
        record(table, row, who, seconds, **{"TB/s": moved / seconds / 1e12})


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU6, Hardtanh, LeakyReLU": nn.ReLU6,
    "BatchNorm in eval mode": lambda: nn.BatchNorm2d(64),
    "BatchNorm in eval mode, ReLU": lambda: nn.Sequential(nn.BatchNorm2d(64), nn.ReLU()),
    "Dropout": nn.Dropout,
    "MaxPool2d(3, 2, 1)": lambda: nn.MaxPool2d(3, 2, 1),
}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_lean_layer(record: Callable[..., None], layer: str, dtype: torch.dtype) -> None:
    """Seconds of a frozen layer forward and backward, and the share of the card's bandwidth that its bytes are."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    x = torch.randn(64, 64, 112, 112, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    for who, moved in zip(("pyft", "torch"), lean_traffic(dtype.itemsize)[layer], strict=True):
        module = nn.ModuleList([LAYERS[layer](), nn.Linear(2, 2)]).cuda().to(dtype).requires_grad_(False)
        if who == "pyft":
            pyft.lean(module)
        run = module[0].train(layer == "Dropout")
        leaf = x.clone().requires_grad_()
        grad = torch.ones_like(run(leaf))
        seconds = seconds_of(lambda run=run, leaf=leaf, grad=grad: torch.autograd.grad(run(leaf), leaf, grad))
        bytes_ = x.numel() * (moved.forward + moved.backward)
        table = f"frozen layers, 51 M elements of {dtype}, {torch.cuda.get_device_name()}"
        record(table, layer, who, seconds, **{"TB/s": bytes_ / seconds / 1e12})


if __name__ == "__main__":
    print(tables(), lean_table(), sep="\n\n")
