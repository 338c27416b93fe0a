"""What a log and a terminal show."""

from __future__ import annotations

import io
import math

import pytest

from pyft.training import progress as module
from pyft.training.progress import PlainProgress, Progress, Rate, RichProgress, SilentProgress, duration, make_progress

ROW = {"stage": "head", "epoch": 1, "step": 10, "lr": 0.01, "train_loss": 0.5, "val_f1": 0.25, "seconds": 1.25}


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def show(progress: Progress) -> None:
    progress.note("[bold] is text")
    progress.start_stage("head", 2, 10)
    progress.update(1, 1, 32, 0.7, 0.01)
    progress.update(1, 5, 160, 0.6, 0.01)
    progress.end_epoch(ROW, True)
    progress.close()


def test_the_display_fits_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_progress(True, Terminal()), RichProgress)
    assert isinstance(make_progress(True, io.StringIO()), PlainProgress)
    assert isinstance(make_progress(False, Terminal()), SilentProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_progress(True, Terminal()), PlainProgress)


def test_a_log_has_plain_lines() -> None:
    file = io.StringIO()
    show(make_progress(True, file))
    lines = file.getvalue().splitlines()
    assert lines[:3] == [
        "[bold] is text",
        "head: 2 epochs of 10 batches",
        "head: epoch 1, batch 1/10, loss 0.7000, lr 0.01",
    ]
    assert lines[3].startswith("head: epoch 1, batch 5/10, loss 0.6000, lr 0.01, ")
    assert "samples/s" in lines[3]
    assert lines[3].endswith(" left")
    assert lines[4] == "head epoch 1: train_loss 0.5000, val_f1 0.2500, 1.2 s (best)"
    assert "\x1b" not in file.getvalue()


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    file = Terminal()
    show(make_progress(True, file))
    text = file.getvalue()
    assert "head 1/2" in text
    assert "loss 0.6000" in text
    assert "samples/s" in text
    assert "head epoch 1: train_loss 0.5000, val_f1 0.2500, 1.2 s (best)" in text
    assert "[bold] is text" in text


def test_a_display_can_be_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    progress = make_progress(True, Terminal())
    show(progress)
    show(progress)


def test_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 102.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))
    rate = Rate(3, 10)
    rate.update(1, 2, 64)
    assert rate.left is None
    assert rate.update(2, 2, 384) == 12
    assert rate.speed == 160.0
    assert rate.left == pytest.approx(18 * 0.2)


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.94, 59.96, 3599.6, 36000)] == [
        "0.0 s",
        "59.9 s",
        "1 min 0 s",
        "1 h 0 min",
        "10 h 0 min",
    ]
    assert math.isinf(SilentProgress.interval)
