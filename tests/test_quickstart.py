"""`pyft quickstart`, as a user runs it, and every command that it says can be typed next."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pyft.cli import main

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = REPOSITORY / "pyft" / "quickstart_data"


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, minilm_dir: Path) -> SimpleNamespace:
    """What `pyft quickstart` printed and left behind; only the head is trained, to be quick."""
    pytest.importorskip("onnxscript", reason="pip install 'pyft[quickstart]'")
    pytest.importorskip("onnxruntime", reason="pip install 'pyft[quickstart]'")
    folder = tmp_path_factory.mktemp("quickstart")
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pyft", "quickstart", "--strategy", "head", "--epochs", "10"],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    wall = time.perf_counter() - begin
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder, out=done.stdout, err=done.stderr, wall=wall)


def numbers(text: str, label: str) -> list[float]:
    """The numbers at the end of the line that begins with `label`."""
    line = next(line for line in text.splitlines() if line.startswith(label))
    return [float(value) for value in re.findall(r"\d+\.\d+", line[len(label) :])]


def test_scores_before_and_after(finished: SimpleNamespace) -> None:
    before = numbers(finished.out, "before: encoder as it came, head untrained")
    after = numbers(finished.out, "after:  PyTorch")
    exported = numbers(finished.out, "after:  ONNX file in onnxruntime")
    assert max(before) < 0.3
    assert min(after) > 0.75
    assert after == exported


def test_scores_hold_without_pyft(finished: SimpleNamespace) -> None:
    """The file alone, with tokenizers and onnxruntime, gives the accuracy and macro-F1 that were printed."""
    onnxruntime = pytest.importorskip("onnxruntime")
    tokenizers = pytest.importorskip("tokenizers")
    metrics = pytest.importorskip("sklearn.metrics")
    session = onnxruntime.InferenceSession(finished.folder / "runs/quickstart/model.onnx")
    meta = session.get_modelmeta().custom_metadata_map
    classes = json.loads(meta["pyft.classes"])
    tokenizer = tokenizers.Tokenizer.from_str(json.loads(meta["pyft.preprocess"])["tokenizer"])
    tokenizer.no_padding()
    rows = [line.split("\t") for line in (DATA / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    predicted = []
    for text, _ in rows:
        ids = np.array([tokenizer.encode(text).ids], dtype=np.int64)
        logits, label = session.run(["logits", "label"], {"input_ids": ids})
        predicted.append(classes[int(logits[0].argmax())])
        assert label[0] == predicted[-1]
    labels = [label for _, label in rows]
    wanted = [metrics.accuracy_score(labels, predicted), metrics.f1_score(labels, predicted, average="macro")]
    assert numbers(finished.out, "after:  ONNX file in onnxruntime") == pytest.approx(wanted, abs=5e-5)


def test_times_add_up(finished: SimpleNamespace) -> None:
    lines = finished.out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("seconds"))
    last = next(number for number, line in enumerate(lines) if line.startswith("total"))
    parts = [float(line.split()[-1]) for line in lines[first + 1 : last]]
    total = float(lines[last].split()[-1])
    assert len(parts) >= 8
    assert sum(parts) == pytest.approx(total, abs=0.06 * len(parts))
    assert 0.6 * finished.wall < total < finished.wall


def test_progress_is_on_standard_error(finished: SimpleNamespace) -> None:
    assert finished.err.count("head epoch") == 10
    assert "head epoch" not in finished.out
    assert "Traceback" not in finished.err


def test_places_exist(finished: SimpleNamespace) -> None:
    run = finished.folder / "runs" / "quickstart"
    assert f"run   {run.relative_to(finished.folder)}" in finished.out
    assert json.loads((run / "status.json").read_text()) == {"state": "finished"}
    arguments = json.loads((run / "config.json").read_text())["arguments"]
    assert "<" not in json.dumps(arguments), "what is only named there, `pyft resume` could not give again"
    assert json.loads((run / "parity.json").read_text())["passed"] is True
    assert (run / "model.onnx").stat().st_size > 80e6


def test_next_commands_work_as_they_stand(finished: SimpleNamespace, tmp_path: Path) -> None:
    program = tmp_path / "pyft"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pyft "$@"\n')
    program.chmod(0o755)
    commands = [line.strip() for line in finished.out.splitlines() if line.startswith("  pyft ")]
    assert [command.split()[1] for command in commands] == ["eval", "predict", "train"]
    shown = {}
    for command in commands:
        done = subprocess.run(
            command, shell=True, cwd=finished.folder, capture_output=True, text=True, timeout=300,
            env=environment(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}"),
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        shown[command.split()[1]] = done.stdout
    accuracy = numbers(finished.out, "after:  ONNX file in onnxruntime")[0]
    assert numbers(shown["eval"], "accuracy")[0] == accuracy
    assert shown["predict"].split("\t")[0] == "meeting_room"
    assert numbers(shown["train"], "test_accuracy")[0] > 0.75


def test_missing_extra_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["quickstart"]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "'onnxruntime'" in shown.err or "'transformers'" in shown.err
    assert "pip install 'pyft[quickstart]'" in shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pyft.quickstart import next_folder

    monkeypatch.chdir(tmp_path)
    assert next_folder() == Path("runs/quickstart")
    for name, state in (("quickstart", "finished"), ("quickstart-2", "started")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "status.json").write_text(json.dumps({"state": state}))
    assert next_folder() == Path("runs/quickstart-2"), "an unfinished one is gone on with"
    (tmp_path / "runs/quickstart-2/status.json").write_text('{"state": "finished"}')
    assert next_folder() == Path("runs/quickstart-3")


def test_stages_keep_their_learning_rates() -> None:
    from pyft.errors import ConfigError
    from pyft.quickstart import ENCODER_LR, HEAD_LR, make_stages

    head, full = make_stages("gradual", 6)
    assert (head.kind, head.epochs, head.freeze, head.lr_scale) == ("head", 2, "encoder*", 1.0)
    assert (full.kind, full.epochs, full.freeze) == ("full", 4, None)
    assert full.lr_scale * HEAD_LR == pytest.approx(ENCODER_LR)
    with pytest.raises(ConfigError, match="strategy"):
        make_stages("all", 6)


def test_a_core_that_cannot_be_used_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyft.core import loader
    from pyft.quickstart import prepare_core

    monkeypatch.setattr(loader, "load_core", lambda: None)
    monkeypatch.setattr(loader, "core_status", lambda: SimpleNamespace(state="failed"))
    seconds: dict[str, float] = {}
    prepare_core(seconds)
    assert list(seconds) == ["no compiled core, PyTorch instead"]
