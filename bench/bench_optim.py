"""The optimizer family with clipping on 110 M parameters: rules, precisions, peers, peak memory, in one run.

pytest bench/bench_optim.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parameters import BERT, numel, parameters
from peers import peers, versions

import pyft

ROUNDS = 7
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("Adam", {}),
    "sgd": ("SGD", {"momentum": 0.9}),
    "rmsprop": ("RMSprop", {}),
    "adagrad": ("Adagrad", {}),
    "lion": ("Lion", {}),
}
PRECISIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp32, bf16 moments": (torch.float32, {"state_dtype": "bfloat16"}),
    "fp32, 8-bit moments": (torch.float32, {"state_dtype": "int8"}),
    "bf16 everything": (torch.bfloat16, {"state_dtype": "bfloat16"}),
    "bf16 stochastic, bf16 moments": (torch.bfloat16, {"state_dtype": "bfloat16", "weights": "stochastic"}),
    "bf16 kahan, bf16 moments": (torch.bfloat16, {"state_dtype": "bfloat16", "weights": "kahan"}),
    "bf16 split32, fp32 moments": (torch.bfloat16, {"weights": "split32"}),
    "bf16 split32, 8-bit moments": (torch.bfloat16, {"weights": "split32", "state_dtype": "int8"}),
}


def ours(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[], object]:
    params = parameters(BERT, dtype)
    return getattr(pyft.optim, name)(params, lr=1e-5, clip_norm=1.0, **options).step


def record_all(record: Callable[..., None], table: str, row: str, medians: dict[str, float]) -> None:
    for name, seconds in medians.items():
        record(table, row, name, seconds, **{"ns/param": seconds / numel(BERT) * 1e9})


@pytest.mark.parametrize("rule", RULES)
def test_rules(benchmark, record, in_turn, rule: str) -> None:
    """Each against torch's paths with torch's clip; Lion against its foreach form."""
    name, options = RULES[rule]
    calls = {"pyft": ours(name, **options)}
    for peer, build in peers(rule).items():
        if not isinstance(build, str) and peer.startswith("torch "):
            calls[peer] = build(parameters(BERT))
    record_all(record, "clip + rule, fp32, 110 M", rule, in_turn(calls, ROUNDS))
    benchmark.pedantic(calls["pyft"], rounds=3)


def test_precisions(benchmark, record, in_turn) -> None:
    """AdamW in each format, all in one run."""
    calls = {name: ours("AdamW", dtype, **options) for name, (dtype, options) in PRECISIONS.items()}
    record_all(record, "clip + AdamW, 110 M", "precision", in_turn(calls, ROUNDS))
    benchmark.pedantic(calls["fp32, 8-bit moments"], rounds=3)


def test_bf16_against_torch(benchmark, record, in_turn) -> None:
    """bf16 parameters, gradients and moments against torch's paths."""
    calls = {"pyft": ours("AdamW", torch.bfloat16, state_dtype="bfloat16")}
    for peer, build in peers("adamw", torch.bfloat16).items():
        if not isinstance(build, str) and peer.startswith("torch "):
            calls[peer] = build(parameters(BERT, torch.bfloat16))
    record_all(record, "clip + AdamW, bf16 everything, 110 M", "bf16", in_turn(calls, ROUNDS))
    benchmark.pedantic(calls["pyft"], rounds=3)


@pytest.mark.parametrize("family", ["adamw", "lion", "adagrad"])
def test_peers(record, in_turn, family: str) -> None:
    """8-bit, low-bit and compiled peers; one that does not install or run here is listed with its error."""
    name = {"adamw": "AdamW", "lion": "Lion", "adagrad": "Adagrad"}[family]
    calls: dict[str, Callable[[], object]] = {
        "pyft, 8-bit moments": ours(name, state_dtype="int8"),
        "pyft, fp32": ours(name),
    }
    missing = []
    for peer, build in peers(family).items():
        if peer.startswith("torch "):
            continue
        if isinstance(build, str):
            missing.append(f"{peer}: {build}")
        else:
            calls[peer] = build(parameters(BERT))
    record_all(record, f"peers of {name}, 110 M", family, in_turn(calls, 3, warmup=1))
    for line in missing:
        record(f"peers of {name}, 110 M", family, line, float("nan"))
    print(versions())


# A process of its own for each: what one leaves behind does not count for the next.
MEASURE = """
import json, sys, torch
import pyft
from parameters import BERT, numel, parameters
who, dtype, options = json.loads(sys.argv[1])

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

pyft.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
before = status("VmRSS")
params = parameters(BERT, getattr(torch, dtype))
if who == "pyft":
    optimizer = pyft.optim.AdamW(params, lr=1e-5, clip_norm=1.0, **options)
else:
    optimizer = torch.optim.AdamW(params, lr=1e-5, **options)
open("/proc/self/clear_refs", "w").write("5")
for _ in range(2):
    if who == "torch":
        torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
print((status("VmHWM") - before) / numel(BERT))
"""


def peak_bytes(who: str, dtype: torch.dtype, options: dict[str, Any]) -> float:
    """Peak resident bytes a parameter while clipping and stepping, with parameter, gradient and state."""
    argument = json.dumps([who, str(dtype).removeprefix("torch."), options])
    folder = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", MEASURE, argument], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_peak_memory(record) -> None:
    """Measured, not computed."""
    cases = {f"pyft {name}": ("pyft", *case) for name, case in PRECISIONS.items()}
    cases["torch fp32 fused"] = ("torch", torch.float32, {"fused": True})
    cases["torch fp32 foreach"] = ("torch", torch.float32, {"foreach": True})
    cases["torch bf16 fused"] = ("torch", torch.bfloat16, {"fused": True})
    for name, case in cases.items():
        record("peak memory, clip + AdamW, 110 M", "peak", name, float("nan"), bytes_per_param=peak_bytes(*case))
