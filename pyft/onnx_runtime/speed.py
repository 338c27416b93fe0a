"""How fast a file runs: throughput over a whole set, latency of batches and of single samples."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyft.export.run import OnnxModel
from pyft.onnx_runtime.feed import Feed, feeds


@dataclass(frozen=True)
class Speed:
    """Throughput and latency of one evaluation.

    Attributes:
        samples_per_second: with reading, preprocessing and counting.
        model_samples_per_second: of the file alone.
        batch_size: samples at a time.
        batch_ms: median and 95th percentile of one run of the file on a batch, milliseconds; the first batch, which
            also sets up memory, is left out where there are others.
        single_ms: the same on one sample; None where it was not measured.
        provider: that ran.
        threads: within an operator.
    """

    samples_per_second: float
    model_samples_per_second: float
    batch_size: int
    batch_ms: tuple[float, float]
    single_ms: tuple[float, float] | None
    provider: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and text for JSON."""
        batch, single = list(self.batch_ms), None if self.single_ms is None else list(self.single_ms)
        return {**vars(self), "batch_ms": batch, "single_ms": single}

    def __str__(self) -> str:
        lines = [
            f"{self.samples_per_second:,.0f} samples per second, {self.model_samples_per_second:,.0f} in the model "
            f"alone",
            f"{self.provider}, {self.threads} thread{'s' * (self.threads != 1)}",
            f"{'latency':<18}{'p50':>10}{'p95':>10}  ms",
        ]
        rows = [(f"batch of {self.batch_size}", self.batch_ms), ("one sample", self.single_ms)]
        lines += [f"{name:<18}{ms[0]:>10.2f}{ms[1]:>10.2f}" for name, ms in rows if ms is not None]
        return "\n".join(lines)


@dataclass
class Stopwatch:
    """Times the runs of a file."""

    model: OnnxModel
    begin: float = field(default_factory=time.perf_counter)
    seconds: list[float] = field(default_factory=list)
    samples: int = 0

    def run(self, feed: Feed, output: str) -> NDArray[Any]:
        """One output of the file for a batch."""
        start = time.perf_counter()
        answer = self.model.run(feed.inputs, [output])[output]
        self.seconds.append(time.perf_counter() - start)
        self.samples += len(feed.index)
        return answer

    def speed(self, batch_size: int, single_ms: tuple[float, float] | None) -> Speed:
        """What was measured so far."""
        whole = time.perf_counter() - self.begin
        options = self.model.session.get_session_options()
        return Speed(
            self.samples / whole,
            self.samples / sum(self.seconds),
            batch_size,
            _percentiles(self.seconds[1:] or self.seconds),
            single_ms,
            self.model.provider,
            options.intra_op_num_threads,
        )


def single_latency(model: OnnxModel, raw: Any, output: str) -> tuple[float, float]:
    """Median and 95th percentile of one run of the file on one sample, milliseconds.

    Args:
        raw: the samples, as `feeds` takes them; each is run once, after the first has been run for warming up.
    """
    seconds: list[float] = []
    for number, feed in enumerate(feeds(model, raw, batch_size=1)):
        for _ in range(1 if number else 2):
            start = time.perf_counter()
            model.run(feed.inputs, [output])
            last = time.perf_counter() - start
        seconds.append(last)
    return _percentiles(seconds)


def _percentiles(seconds: list[float]) -> tuple[float, float]:
    if not seconds:
        return math.nan, math.nan
    low, high = np.percentile(np.array(seconds) * 1e3, [50, 95]).tolist()
    return low, high
