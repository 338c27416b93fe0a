"""What lower precision costs and saves: one row per file that was tried."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pyft.export.run import OnnxModel

ROUNDS = {"one": 30, "batch": 8}
SECONDS = 4.0
"""No measurement takes longer than this, however slow the model."""


@dataclass(frozen=True)
class Latency:
    """Seconds of one run, and how they compare with float32 measured in turn with it.

    Attributes:
        samples: in the batch.
        p50, p95: seconds, median and 95th percentile.
        ratio: p50 over that of the float32 file in the same turns; below 1 is faster.
    """

    samples: int
    p50: float
    p95: float
    ratio: float


@dataclass(frozen=True)
class Candidate:
    """One file.

    Attributes:
        name: "fp32", "fp16", "int8 dynamic" or "int8 static", with the number of nodes left in float32.
        num_bytes: of the file. size_ratio: over that of float32.
        metric: on the validation data. drop: how much worse than float32.
        holds: the drop is within the bound.
        latency: of one sample and of the evaluation batch; empty where it was not measured.
        excluded: names of the nodes left in float32.
        note: what else there is to know, such as "slower than fp32".
    """

    name: str
    num_bytes: int
    size_ratio: float
    metric: float
    drop: float
    holds: bool
    latency: tuple[Latency, ...] = ()
    excluded: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class PrecisionTable:
    """All candidates, and the one that was taken.

    Attributes:
        metric_name: name of the metric.
        max_drop: largest drop that holds.
        candidates: the first is float32.
        chosen: name of the candidate that was taken, or None.
    """

    metric_name: str
    max_drop: float
    candidates: tuple[Candidate, ...]
    chosen: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "candidates": [asdict(candidate) for candidate in self.candidates]}

    def __str__(self) -> str:
        head = ("file", "MB", "size", self.metric_name, "drop", "p50 / p95 ms of one", "of a batch", "excluded", "")
        rows = [head, *(_row(candidate, candidate.name == self.chosen) for candidate in self.candidates)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def _row(candidate: Candidate, chosen: bool) -> tuple[str, ...]:
    if not candidate.num_bytes:
        return (candidate.name, *[""] * 7, candidate.note)
    times = [f"{t.p50 * 1e3:.1f} / {t.p95 * 1e3:.1f} ({t.ratio:.2f}x)" for t in candidate.latency]
    note = "; ".join(filter(None, ["taken" if chosen else "", candidate.note]))
    return (
        candidate.name, f"{candidate.num_bytes / 1e6:.1f}", f"{candidate.size_ratio:.2f}x", f"{candidate.metric:.4f}",
        f"{candidate.drop:+.4f}", *(times or ["", ""]), str(len(candidate.excluded) or ""), note,
    )  # fmt: skip


def latencies(base: OnnxModel, other: OnnxModel, feeds: Mapping[str, Mapping[str, Any]]) -> tuple[Latency, ...]:
    """Seconds of `other`, run in turn with `base`, so that a drifting machine hits both alike.

    Args:
        feeds: "one" and "batch": what the files are fed with.
    """
    found = []
    for size, feed in feeds.items():
        times: dict[str, list[float]] = {"base": [], "other": []}
        began = time.perf_counter()
        for turn in range(2 + ROUNDS[size]):
            if turn > 4 and time.perf_counter() - began > SECONDS:
                break
            for name, model in (("base", base), ("other", other)):
                start = time.perf_counter()
                model(feed)
                if turn > 1:
                    times[name].append(time.perf_counter() - start)
        p50, p95 = (float(np.percentile(times["other"], share)) for share in (50, 95))
        samples = len(next(iter(feed.values())))
        found.append(Latency(samples, p50, p95, p50 / float(np.median(times["base"]))))
    return tuple(found)
