"""What a run did, epoch by epoch, and the file that tells it."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyft.core.files import write_text
from pyft.errors import ConfigError
from pyft.training.checkpoint import write_error

Row = dict[str, Any]


@dataclass
class History:
    """Attributes:
    metric: what picks the best epoch, where something is evaluated.
    higher_is_better: the direction of `metric`.
    rows: one dict per epoch: stage, epoch (from 1, over all stages), step (optimizer steps so far), lr (of the
        epoch's last step), train_loss (mean over the samples), val_<name> for each metric, seconds.
    best_epoch: the epoch whose weights the model holds: best metric, then lowest val_loss, then the earliest; None when
        nothing was evaluated (it holds the last ones).
    best_value: its metric.
    stages: one dict per stage: name, lr, precision, epochs, stopped_early, seconds {"prepare", "train", "evaluate"}.
    notes: lines worth telling the user.
    resumed_from_step: the optimizer step at which the run was taken up again, or None.
    last_path, best_path: the checkpoint, and the weights of the best epoch.
    """

    metric: str
    higher_is_better: bool
    last_path: Path
    best_path: Path
    rows: list[Row] = field(default_factory=list)
    best_epoch: int | None = None
    best_value: float | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    resumed_from_step: int | None = None

    @property
    def best_row(self) -> Row | None:
        """The row of the best epoch; the last one when nothing was evaluated; None before the first."""
        if self.best_epoch is not None:
            return self.rows[self.best_epoch - 1]
        return self.rows[-1] if self.rows else None


def metric_value(metrics: Mapping[str, float], name: str) -> float:
    """The metric that picks the best epoch.

    Raises:
        ConfigError: `evaluate` did not give it; the message lists what it gave.
    """
    if name not in metrics:
        raise ConfigError(f"metric={name!r} is not among those evaluated: {', '.join(sorted(metrics)) or 'none'}")
    return float(metrics[name])


def is_better(value: float, best: float | None, higher: bool) -> bool:
    """Whether `value` beats `best`; NaN beats nothing, and ties keep the earlier epoch.

    >>> is_better(0.5, None, True), is_better(0.5, 0.5, True), is_better(float("nan"), None, True)
    (True, False, False)
    """
    if math.isnan(value):
        return False
    return best is None or (value > best if higher else value < best)


def write_metrics(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Write one line per epoch, atomically. The columns are those of all rows, in order of appearance.

    Raises:
        CheckpointError: it cannot be written; the old file is untouched.
    """
    path = Path(path)
    columns = list(dict.fromkeys(column for row in rows for column in row if column != "seconds"))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*columns, "seconds"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
    try:
        write_text(path, buffer.getvalue())
    except OSError as error:
        raise write_error(path, error) from error


def _plain(value: Any) -> Any:
    # repr keeps every bit of a float, so two runs can be compared by their files.
    return repr(value) if isinstance(value, float) else value
