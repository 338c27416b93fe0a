"""An ONNX file in fp16 or int8 that is still good enough, measured; or a refusal with the measurements."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pyft.errors import ConfigError, DataError, ExportError, need
from pyft.export.bisect import MAX_BYTES
from pyft.export.comparison import take_rows
from pyft.export.parity import finite
from pyft.export.precision_table import Candidate, PrecisionTable, latencies
from pyft.export.quantize import named_nodes, to_fp16, to_int8_dynamic, to_int8_static, weight_bytes, weights_of
from pyft.export.run import CPU, OnnxModel, first_line
from pyft.export.sensitivity import ranked_groups

PRECISIONS = ("fp16", "int8")
WORTH = 0.5
"""A way to quantise that reaches less than this share of the weights is not tried."""

MAX_STEPS = 6
"""How often more nodes are left in float32 before a way is given up."""

MAX_TRIALS = 10
"""How many groups of nodes are measured for their sensitivity."""

SMALL_BATCHES = (1, 2, 7)

Lower = Callable[[Any, Sequence[str]], Any]


def lower_precision(
    path: str | os.PathLike[str],
    precision: str,
    *,
    calibration: Sequence[Mapping[str, Any]],
    metric: Callable[[OnnxModel], float],
    metric_name: str = "metric",
    higher_is_better: bool = True,
    max_drop: float = 0.01,
    provider: str = CPU,
) -> tuple[bytes, PrecisionTable]:
    """Make a float32 file smaller, and leave in float32 what would cost too much.

    "int8" tries scales found while the file runs (dynamic), then scales from calibration data (static); "fp16" has one
    way. A way whose metric drops too far is tried again without the nodes that the logits react to most. The first
    file that holds and is not slower than float32 is taken, else the fastest that holds. Preprocessing in front of the
    model and the outputs behind it keep their precision.

    Args:
        path: the float32 file, of less than 2 GiB.
        precision: "fp16" or "int8".
        calibration: batches of what the file is fed with; a few hundred samples of the training or validation data.
        metric: measures a file on the whole validation data.
        metric_name: for the table.
        higher_is_better: False for an error; its drop is then relative to that of float32.
        max_drop: the largest drop that is accepted, in the unit of the metric.

    Returns:
        The bytes of the file, with the entries `pyft.precision` and `pyft.precision_table`; and the table of all files
        that were tried.

    Raises:
        ExportError: none holds; the message holds the table, the attribute `table` the object.
        ConfigError: another precision, or a bound that is negative.
        DataError: no calibration data.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r}: expected 'fp16' or 'int8' ('fp32' is the file as it is)")
    if not (isinstance(max_drop, int | float) and max_drop >= 0):
        raise ConfigError(f"max_drop={max_drop!r}: expected a number of 0 or more")
    if not calibration:
        raise DataError("calibration: the file needs samples to be measured on, got none")
    search = _Search(path, calibration, metric, higher_is_better, float(max_drop), provider)
    best = search.best(precision)
    table = PrecisionTable(metric_name, float(max_drop), tuple(search.rows), None if best is None else best[1].name)
    if best is None:
        raise refusal(precision, table)
    proto, _ = best
    return _with_entries(proto, search.proto, precision, table), table


def refusal(precision: str, table: PrecisionTable) -> ExportError:
    """The error that says that nothing holds, with `table` as an attribute."""
    error = ExportError(
        f"precision={precision!r}: no file keeps {table.metric_name} within max_drop={table.max_drop:g} of float32; "
        f"export in fp32, or allow more:\n{table}"
    )
    error.table = table  # type: ignore[attr-defined]
    return error


class _Search:
    """The float32 file, its measurements, and those of every other that was tried."""

    def __init__(
        self, path: Any, calibration: Any, metric: Any, higher_is_better: bool, max_drop: float, provider: str
    ) -> None:
        onnx = need("onnx", "onnx", "lowering the precision of an ONNX file")
        self.proto = named_nodes(onnx.load(os.fspath(path)))
        if self.proto.ByteSize() > MAX_BYTES:
            raise ExportError(
                f"{path} holds {self.proto.ByteSize() / 2**30:.2f} GiB, and only files below "
                f"{MAX_BYTES / 2**30:.2f} GiB can be made smaller: export in fp32"
            )
        self.calibration = list(calibration)
        self.measure = metric
        self.higher_is_better = higher_is_better
        self.max_drop = max_drop
        self.provider = provider
        self.base = OnnxModel(self.proto.SerializeToString(), provider=provider)
        self.logits = [self.base(feed) for feed in self.calibration]
        value, size = float(metric(self.base)), self.proto.ByteSize()
        self.feeds = {"one": take_rows(self.calibration[0], np.arange(1)), "batch": self.calibration[0]}
        times = latencies(self.base, self.base, self.feeds)
        self.rows = [Candidate("fp32", size, 1.0, value, 0.0, True, times)]

    def best(self, precision: str) -> tuple[Any, Candidate] | None:
        """The file to take: the first that holds and is not slower, else the fastest that holds."""
        held: list[tuple[Any, Candidate]] = []
        for name, lower, kinds in self._ways(precision):
            reached = self._reached(kinds)
            if precision == "int8" and reached < WORTH:
                self._note(name, f"not tried: reaches {reached:.0%} of the weights")
                continue
            try:
                found = self._way(name, lower)
            except Exception as error:
                self._note(name, f"failed: {first_line(error)}")
                continue
            if found is not None:
                held.append(found)
                if not found[1].note:
                    return found
        return min(held, key=lambda one: max(t.ratio for t in one[1].latency)) if held else None

    def _ways(self, precision: str) -> list[tuple[str, Lower, tuple[str, ...]]]:
        every = ("Conv", "Gemm", "MatMul", "Gather")
        if precision == "fp16":
            return [("fp16", to_fp16, every)]
        return [
            ("int8 dynamic", to_int8_dynamic, ("Gemm", "MatMul", "Gather")),
            ("int8 static", lambda proto, left: to_int8_static(proto, left, self.calibration, self.provider), every),
        ]

    def _reached(self, kinds: Sequence[str]) -> float:
        reached = sum(weight.num_bytes for weight in weights_of(self.proto) if weight.op_type in kinds)
        # A weight that two nodes share is counted twice.
        return min(1.0, reached / max(weight_bytes(self.proto), 1))

    def _way(self, name: str, lower: Lower) -> tuple[Any, Candidate] | None:
        """Lower everything, then leave out the most sensitive groups one by one until the metric holds."""
        excluded: list[str] = []
        groups: list[tuple[str, ...]] | None = None
        for _ in range(MAX_STEPS + 1):
            proto = lower(self.proto, excluded)
            candidate = self._candidate(name, proto, excluded)
            self.rows.append(candidate)
            if candidate.holds:
                return proto, candidate
            if groups is None:
                groups = ranked_groups(self.proto, lower, self._moved, MAX_TRIALS)
            if not groups or len(excluded) + len(groups[0]) == len(weights_of(self.proto)):
                # Nothing would be left in fewer bits.
                return None
            excluded += groups.pop(0)
        return None

    def _candidate(self, name: str, proto: Any, excluded: Sequence[str]) -> Candidate:
        model = OnnxModel(proto.SerializeToString(), provider=self.provider)
        for size in SMALL_BATCHES:
            model(take_rows(self.calibration[0], np.arange(size) % len(self.logits[0])))
        base, value = self.rows[0], float(self.measure(model))
        drop = base.metric - value if self.higher_is_better else (value - base.metric) / max(abs(base.metric), 1e-12)
        # A NaN must not hold.
        holds = bool(drop <= self.max_drop)
        times = latencies(self.base, model, self.feeds) if holds else ()
        slower = [f"{t.ratio:.2f}x for {t.samples}" for t in times if t.ratio > 1]
        full = f"{name}, {len(excluded)} node{'s' * (len(excluded) > 1)} in fp32" if excluded else name
        return Candidate(
            full, proto.ByteSize(), proto.ByteSize() / base.num_bytes, value, drop, holds, times, tuple(excluded),
            f"slower than fp32: {', '.join(slower)}" if slower else "",
        )  # fmt: skip

    def _moved(self, proto: Any) -> float:
        """How far the logits of the calibration data move, relative to their spread."""
        model = OnnxModel(proto.SerializeToString(), provider=self.provider)
        wanted = np.concatenate([logits.reshape(-1) for logits in self.logits]).astype(np.float64)
        found = np.concatenate([model(feed).reshape(-1) for feed in self.calibration]).astype(np.float64)
        moved = float(np.sqrt(np.mean((wanted - found) ** 2)) / max(float(wanted.std()), 1e-12))
        return moved if np.isfinite(moved) else float("inf")

    def _note(self, name: str, note: str) -> None:
        nothing = float("nan")
        self.rows.append(Candidate(name, 0, nothing, nothing, nothing, False, note=note))


def _with_entries(proto: Any, base: Any, precision: str, table: PrecisionTable) -> bytes:
    """The file's own metadata, which a quantiser may drop, and what was done to it."""
    entries = {entry.key: entry.value for entry in base.metadata_props}
    entries["pyft.precision"] = precision
    entries["pyft.precision_table"] = json.dumps(finite(table.to_dict()), ensure_ascii=False, allow_nan=False)
    del proto.metadata_props[:]
    for key, value in sorted(entries.items()):
        proto.metadata_props.add(key=key, value=value)
    content: bytes = proto.SerializeToString(deterministic=True)
    return content
