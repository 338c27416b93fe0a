"""Shared by all benches: two threads, peers in the same run, a table of ratios at the end.

    pytest bench --benchmark-json=bench/results/all.json

Each bench calls `record(table, row, name, seconds)`; the first name in a row is pyft, the others are peers.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

THREADS = int(os.environ.get("PYFT_BENCH_THREADS", "2"))
RESULTS = Path(__file__).parent / "results"
_tables: dict[str, dict[str, dict[str, dict[str, float]]]] = {}


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture
def record() -> Callable[..., None]:
    """record(table, row, name, seconds, **other figures)"""

    def add(table: str, row: str, name: str, seconds: float, **figures: float) -> None:
        _tables.setdefault(table, {}).setdefault(row, {})[name] = {"seconds": seconds, **figures}

    return add


@pytest.fixture
def in_turn() -> Callable[..., dict[str, float]]:
    """Median seconds of several callables, timed A B C A B C ... so that a drifting machine hits all alike.

    Short ones are called `block` times in a row in each turn, each call timed: what a training loop does is not to
    have three other optimizers use the caches between two steps.
    """

    def measure(
        calls: dict[str, Callable[[], object]], rounds: int, block: int = 1, warmup: int = 2
    ) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(warmup + rounds):
            for name, call in calls.items():
                for _ in range(block):
                    began = time.perf_counter()
                    call()
                    if turn >= warmup:
                        times[name].append(time.perf_counter() - began)
        return {name: statistics.median(values) for name, values in times.items()}

    return measure


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(os.environ.get("PYFT_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}: set PYFT_TEST_DATA to a folder that holds them")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _tables:
        return
    write = terminalreporter.write_line
    write("")
    write(f"torch {torch.__version__}, {THREADS} threads, {platform.processor() or platform.machine()}")
    for table, rows in _tables.items():
        write("")
        write(table)
        for row, peers in rows.items():
            ours = next(iter(peers.values()))["seconds"]
            for name, figures in peers.items():
                extra = "  ".join(f"{key} {value:.4g}" for key, value in figures.items() if key != "seconds")
                timed = "" if math.isnan(figures["seconds"]) else f"{figures['seconds'] * 1e3:12.3f} ms"
                ratio = f"  {figures['seconds'] / ours:6.2f}x" if timed else ""
                write(f"  {row:24} {name:32} {timed}{ratio}  {extra}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tables.json").write_text(json.dumps(_tables, indent=2))
