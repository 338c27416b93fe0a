"""A run that is killed or stopped and continued ends with the same bits as one that was not."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pyft
from pyft.errors import CheckpointError, ConfigError, ExportError
from pyft.run_dir import read_state

REPOSITORY = Path(__file__).resolve().parents[1]

# What the killed process and this one have in common. The weights before tuning differ from process to process.
JOB = """
import sys, time
import torch
from torch import nn
import pyft

class Slow(nn.Module):
    def __init__(self, seed, seconds):
        super().__init__()
        torch.manual_seed(seed)
        self.seconds = seconds
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(16, 9)

    def forward(self, x):
        if self.training:
            time.sleep(self.seconds)
        return self.head(self.dropout(self.body(x)))

def run(out, seed=0, seconds=0.0, shift=0.0, **keywords):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    X = torch.randn(300, 6, generator=generator) + y.view(-1, 1) + shift
    options = dict(epochs=6, batch_size=8, accumulate=2, lr=1e-2, export=None, progress=False, precision="fp32")
    return pyft.finetune(Slow(seed, seconds), (X, y), out=out, **{**options, **keywords})
"""


def job() -> dict[str, Any]:
    """The functions of JOB."""
    names: dict[str, Any] = {}
    exec(JOB, names)
    return names


def start(out: Path, call: str, tmp_path: Path) -> subprocess.Popen[str]:
    """A process that runs the job and can be killed."""
    script = tmp_path / "script.py"
    script.write_text(f"{JOB}\nif __name__ == '__main__':\n    {call}\n")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, str(script), str(out)], env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=listen_to_ctrl_c,
    )  # fmt: skip


def listen_to_ctrl_c() -> None:
    """pytest may run with SIGINT ignored (in the background of a shell), and its children would, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_rows(out: Path, rows: int, process: subprocess.Popen[str]) -> None:
    """Until metrics.csv has so many epochs."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the process ended before it was stopped: {process.communicate()[1]}")
        path = out / "metrics.csv"
        if path.exists() and len(path.read_text().splitlines()) > rows:
            return
        time.sleep(0.01)
    process.kill()
    pytest.fail("no epoch within two minutes")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    job()["run"](out)
    return out


def same_files(one: Path, two: Path) -> None:
    for name in ("model.safetensors", "best.safetensors"):
        before, after = load_file(one / name), load_file(two / name)
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert value.numpy().tobytes() == after[key].numpy().tobytes(), f"{name}: {key}"
    # Wall-clock seconds are the last column.
    tables = [
        [line.rpartition(",")[0] for line in (path / "metrics.csv").read_text().splitlines()] for path in (one, two)
    ]
    assert tables[0] == tables[1]
    metrics = [(path / "metrics.json").read_text() for path in (one, two)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("rows", [1, 4], ids=["after the head stage", "in the full stage"])
def test_killed_and_resumed(rows: int, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, "run(sys.argv[1], seconds=0.004)", tmp_path)
    wait_for_rows(out, rows, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert read_state(out) == "started"
    assert (out / "start.safetensors").exists()
    assert not (out / "model.safetensors").exists()
    result = job()["run"](out, seed=12345)  # other first weights: those of the run must be used
    assert len(result.history) == 6
    same_files(uninterrupted, out)
    assert read_state(out) == "finished"
    assert not (out / "start.safetensors").exists()


def test_ctrl_c_says_how_to_go_on(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, "run(sys.argv[1], seconds=0.004)", tmp_path)
    wait_for_rows(out, 3, process)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode != 0
    assert "KeyboardInterrupt" in error
    assert f"out={str(out)!r}" in error
    job()["run"](out, seed=777, resume=True)
    same_files(uninterrupted, out)


def test_stopped_before_the_first_checkpoint(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("pyft.shared_run"), "freeze_for", stop)
    with pytest.raises(KeyboardInterrupt, match="nothing is lost"):
        job()["run"](out)
    monkeypatch.undo()
    assert not (out / "last.pt").exists()
    assert len(job()["run"](out, seed=9).history) == 6
    same_files(uninterrupted, out)


def test_a_run_that_died_while_it_was_made_is_begun_anew(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "plan.txt").write_text("")
    job()["run"](out)
    same_files(uninterrupted, out)


def test_other_arguments_or_data_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, "run(sys.argv[1], seconds=0.004)", tmp_path)
    wait_for_rows(out, 2, process)
    process.kill()
    process.communicate()
    run = job()["run"]
    with pytest.raises(ConfigError, match=r"epochs was 6, is 7; lr was 0\.01, is 0\.02"):
        run(out, epochs=7, lr=2e-2)
    with pytest.raises(ConfigError, match="the data has fingerprint"):
        run(out, shift=0.5)
    with pytest.raises(ConfigError, match="resume=False"):
        run(out, resume=False)
    with pytest.raises(ConfigError, match="make the same call again"):
        pyft.resume(out)
    run(out)
    with pytest.raises(ConfigError, match="is finished: there is nothing to resume"):
        pyft.resume(out)
    with pytest.raises(ConfigError, match="finished run, which is never written over"):
        run(out)


def test_disk_full_keeps_the_last_good_checkpoint(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    real, calls = os.fsync, []

    def fsync(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if "last.pt" in name:
            calls.append(name)
            if len(calls) == 4:
                raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="No space left"):
        job()["run"](out)
    monkeypatch.undo()
    assert not list(out.glob(".*.tmp"))
    assert read_state(out) == "started"
    job()["run"](out)
    same_files(uninterrupted, out)


def test_a_failed_export_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"

    def fail(*arguments: object, **keywords: object) -> None:
        raise ExportError("the operator is not known")

    monkeypatch.setattr("pyft.tuned.write_onnx", fail)
    with pytest.raises(ExportError, match=r"the operator is not known.*model\.safetensors"):
        job()["run"](out, export="onnx")
    assert (out / "model.safetensors").is_file()
    assert (out / "metrics.json").is_file()
    assert read_state(out) == "tuned"
    monkeypatch.undo()
    weights = load_file(out / "model.safetensors")
    result = job()["run"](out)  # without the export the run can be finished
    assert all(torch.equal(value, weights[name]) for name, value in load_file(out / "model.safetensors").items())
    assert len(result.history) == 6
    assert read_state(out) == "finished"
