"""What a user sees while a run trains: a live bar on a terminal, lines in a log, or nothing."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO


class Progress(Protocol):
    """What the loop tells. `interval` is the least time between two `update` calls, in seconds."""

    interval: float

    def start_stage(self, title: str, epochs: int, num_batches: int) -> None:
        """A stage of `epochs` x `num_batches` batches begins."""

    def update(self, epoch: int, batch: int, samples: int, loss: float, lr: float) -> None:
        """`batch` batches of `epoch` (from 1 in the stage) are done; `samples` since the process began."""

    def end_epoch(self, row: Mapping[str, Any], best: bool) -> None:
        """An epoch is over; `row` as in `History.rows`."""

    def note(self, text: str) -> None:
        """One line worth telling."""

    def close(self) -> None:
        """Take the display away. It may be started again."""


def make_progress(show: bool = True, file: TextIO | None = None) -> Progress:
    """A display on `file` (default stderr): rich's bar on a terminal, plain lines elsewhere, nothing if not `show`."""
    if not show:
        return SilentProgress()
    file = sys.stderr if file is None else file
    if file.isatty() and os.environ.get("TERM") != "dumb":
        return RichProgress(file)
    return PlainProgress(file)


def epoch_line(row: Mapping[str, Any], best: bool) -> str:
    """An epoch in one line.

    >>> epoch_line({"stage": "head", "epoch": 1, "lr": 0.001, "train_loss": 0.5, "val_f1": 0.25, "seconds": 1.5}, True)
    'head epoch 1: train_loss 0.5000, val_f1 0.2500, 1.5 s (best)'
    """
    skipped = {"stage", "epoch", "step", "lr", "seconds"}
    values = [f"{name} {_short(value)}" for name, value in row.items() if name not in skipped]
    return f"{row['stage']} epoch {row['epoch']}: {', '.join([*values, duration(row['seconds'])])}" + (" (best)" * best)


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if math.isnan(value) or 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3e}"


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(0.25), duration(75), duration(7200)
    ('0.2 s', '1 min 15 s', '2 h 0 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Rate:
    """Samples per second and time left of a stage, measured from the first update on."""

    def __init__(self, epochs: int, num_batches: int) -> None:
        self.total = epochs * num_batches
        self.num_batches = num_batches
        self._start: tuple[float, int, int] | None = None
        self.speed = 0.0
        self.left: float | None = None

    def update(self, epoch: int, batch: int, samples: int) -> int:
        """Count; returns the batches done in the stage."""
        done = (epoch - 1) * self.num_batches + batch
        now = time.perf_counter()
        if self._start is None:
            self._start = (now, samples, done)
            return done
        began, samples_before, done_before = self._start
        if now > began and done > done_before:
            self.speed = (samples - samples_before) / (now - began)
            self.left = (self.total - done) * (now - began) / (done - done_before)
        return done


class SilentProgress:
    """Shows nothing."""

    interval = math.inf

    def start_stage(self, title: str, epochs: int, num_batches: int) -> None: ...

    def update(self, epoch: int, batch: int, samples: int, loss: float, lr: float) -> None: ...

    def end_epoch(self, row: Mapping[str, Any], best: bool) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class PlainProgress:
    """One line per stage and epoch, and one every ten seconds in between."""

    interval = 10.0

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._rate = Rate(1, 1)
        self._title = ""

    def start_stage(self, title: str, epochs: int, num_batches: int) -> None:
        self._rate, self._title = Rate(epochs, num_batches), title
        self.note(f"{title}: {epochs} epochs of {num_batches} batches")

    def update(self, epoch: int, batch: int, samples: int, loss: float, lr: float) -> None:
        self._rate.update(epoch, batch, samples)
        text = f"{self._title}: epoch {epoch}, batch {batch}/{self._rate.num_batches}, loss {_short(loss)}, lr {lr:.3g}"
        if self._rate.left is not None:
            text += f", {self._rate.speed:.0f} samples/s, {duration(self._rate.left)} left"
        self.note(text)

    def end_epoch(self, row: Mapping[str, Any], best: bool) -> None:
        self.note(epoch_line(row, best))

    def note(self, text: str) -> None:
        print(text, file=self._file, flush=True)

    def close(self) -> None: ...


class RichProgress:
    """A bar with epoch, loss, learning rate, samples per second and time left; a line stays for each epoch."""

    interval = 0.2

    def __init__(self, file: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(file=file, highlight=False)
        # No refresh thread: it would take turns with the training threads.
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        self._rate = Rate(1, 1)
        self._title = ""
        self._epochs = 1
        self._task: Any = None

    def start_stage(self, title: str, epochs: int, num_batches: int) -> None:
        self._rate, self._title, self._epochs = Rate(epochs, num_batches), title, epochs
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._bar.start()
        self._task = self._bar.add_task(title, total=self._rate.total, status="")
        self._bar.refresh()

    def update(self, epoch: int, batch: int, samples: int, loss: float, lr: float) -> None:
        done = self._rate.update(epoch, batch, samples)
        status = f"loss {_short(loss)}  lr {lr:.2e}"
        if self._rate.left is not None:
            status += f"  {self._rate.speed:.0f} samples/s  {duration(self._rate.left)} left"
        self._bar.update(
            self._task,
            completed=done,
            status=status,
            description=f"{self._title} {epoch}/{self._epochs}",
        )
        self._bar.refresh()

    def end_epoch(self, row: Mapping[str, Any], best: bool) -> None:
        self.note(epoch_line(row, best))

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()
