"""The command `pyft` on runs: train, eval, predict, export, Ctrl-C and resume, with a small text model."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pyft.cli import main

DATA = Path(__file__).resolve().parents[1] / "pyft" / "quickstart_data"


# ---------------------------------------------------------------- a run from beginning to end


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny BERT, three intents of the shipped data, and a run made by `pyft train`."""
    pytest.importorskip("transformers", reason="pip install 'pyft[text]'")
    pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
    folder = tmp_path_factory.mktemp("cli")
    labels = ("printer_problem", "vpn_access", "staff_change")
    for name in ("train.tsv", "test.tsv"):
        head, *rows = (DATA / name).read_text(encoding="utf-8").splitlines()
        kept = [row for row in rows if row.endswith(labels)]
        (folder / name).write_text("\n".join([head, *kept]) + "\n", encoding="utf-8")
    tiny_bert(folder / "tiny", (folder / "train.tsv").read_text(encoding="utf-8"))
    before = Path.cwd()
    os.chdir(folder)
    run = folder / "run"
    words = ["train", "tiny", "train.tsv", "--test", "test.tsv", "--strategy", "full", "--epochs", "8", "--lr", "0.01"]
    try:
        code = main([*words, "--out", "run", "--progress", "false", "--device", "cpu"])
    finally:
        os.chdir(before)
    assert code == 0
    return SimpleNamespace(folder=folder, run=run, onnx=run / "model.onnx", test=folder / "test.tsv", labels=labels)


def tiny_bert(folder: Path, words: str) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {name: number for number, name in enumerate([*names, *sorted(set(words.lower().split()))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64, "pad_token": "[PAD]"}')


def test_train_leaves_a_run(work: SimpleNamespace) -> None:
    names = {path.name for path in work.run.iterdir()}
    assert {"config.json", "metrics.csv", "metrics.json", "model.onnx", "model.safetensors", "parity.json"} <= names
    assert json.loads((work.run / "config.json").read_text())["arguments"]["epochs"] == 8


def test_eval_of_run_and_file_agree(work: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(work.run), str(work.test), "--json"]) == 0
    of_run = json.loads(capsys.readouterr().out)
    assert main(["eval", str(work.onnx), str(work.test), "--json"]) == 0
    of_file = json.loads(capsys.readouterr().out)
    assert of_run["confusion"] == of_file["confusion"]
    confusion = np.array(of_run["confusion"])
    assert confusion.sum() == 72
    assert of_run["values"]["accuracy"] == pytest.approx(confusion.trace() / 72)
    assert of_run["values"]["accuracy"] > 0.5


def test_eval_prints_a_table(work: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(work.onnx), str(work.test)]) == 0
    shown = capsys.readouterr().out
    assert all(label in shown for label in work.labels)
    assert "macro f1" in shown


def test_eval_says_which_label_is_unknown(work: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(work.onnx), str(DATA / "test.tsv")]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "_problem" in shown or "_request" in shown or "_room" in shown or "_report" in shown


def predictions(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    assert main(["predict", *words]) == 0
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def test_predict_takes_texts_files_and_standard_input(
    work: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the printer is jammed", "no vpn from home", "she starts on monday"]
    direct = predictions([str(work.run), *texts], capsys)
    assert [row[2] for row in direct] == texts
    assert {row[0] for row in direct} <= set(work.labels)
    assert all(0 < float(row[1]) <= 1 for row in direct)

    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    assert predictions([str(work.run), str(tmp_path / "texts.txt")], capsys) == direct
    assert predictions([str(work.onnx), *texts], capsys) == direct
    (tmp_path / "table.tsv").write_text("id\ttext\n" + "".join(f"{i}\t{t}\n" for i, t in enumerate(texts)))
    assert predictions([str(work.run), str(tmp_path / "table.tsv")], capsys) == direct
    monkeypatch.setattr("sys.stdin", SimpleNamespace(read=lambda: "\n".join(texts)))
    assert predictions([str(work.run), "-"], capsys) == direct


def test_predict_json(work: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(work.run), "the printer is jammed", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["input"] == "the printer is jammed"
    assert set(found["scores"]) == set(work.labels)
    assert sum(found["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert found["scores"][found["label"]] == max(found["scores"].values())
    assert found["score"] == pytest.approx(found["scores"][found["label"]], abs=1e-6)


@pytest.mark.parametrize("word", ["gone.txt", "gone.tsv", "gone.csv", "gone.jpg"])
def test_predict_does_not_take_a_missing_file_for_a_text(
    word: str, work: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(work.run), word]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.partition(";")[0]) == ("", f"pyft: error: {word}: no such file")


def test_predict_into_a_closed_pipe(work: SimpleNamespace, tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "many.txt").write_text("a printer jam\n" * 5000)
    words = [sys.executable, "-m", "pyft", "predict", str(work.onnx), str(tmp_path / "many.txt")]
    command = f"{shlex.join(words)} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0"
    assert len(done.stdout.splitlines()) == 2


def test_export_writes_where_it_is_told(
    work: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "other.onnx"
    assert main(["export", str(work.run), "--output", str(target)]) == 0
    shown = capsys.readouterr().out
    assert str(target) in shown
    assert "validation samples" in shown
    assert json.loads((tmp_path / "other.parity.json").read_text())["passed"] is True
    assert main(["eval", str(target), str(work.test), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert main(["eval", str(work.onnx), str(work.test), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert again.pop("speed").keys() == first.pop("speed").keys()
    assert again == first


def test_export_without_the_data(work: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (work.folder / "train.tsv").rename(work.folder / "moved.tsv")
    try:
        assert main(["export", str(work.run), "--output", str(tmp_path / "x.onnx")]) == 0
    finally:
        (work.folder / "moved.tsv").rename(work.folder / "train.tsv")
    assert "texts of pyft's own" in capsys.readouterr().out


# ---------------------------------------------------------------- arrays, images, modules of one's own


@pytest.fixture
def array_run(tmp_path: Path) -> Path:
    pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
    import pyft

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator)
    y = [("low", "high")[int(value > 0)] for value in x[:, 0]]
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    result = pyft.finetune(
        model, (x, y), strategy="full", epochs=20, lr=0.05, out=tmp_path / "array", progress=False, device="cpu"
    )
    return result.run_dir


def test_predict_and_export_of_an_own_module(
    array_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = np.array([[3.0, 0, 0, 0], [-3.0, 0, 0, 0]])
    np.save(tmp_path / "rows.npy", rows)
    np.savetxt(tmp_path / "rows.csv", rows, delimiter=",", header="a,b,c,d", comments="")
    for name in ("rows.npy", "rows.csv"):
        found = predictions([str(array_run), str(tmp_path / name)], capsys)
        assert [row[0] for row in found] == ["high", "low"]
        assert [row[2] for row in found] == [f"{tmp_path / name}:0", f"{tmp_path / name}:1"]
    assert main(["export", str(array_run), "--output", str(tmp_path / "copy.onnx")]) == 0
    assert (tmp_path / "copy.onnx").read_bytes() == (array_run / "model.onnx").read_bytes()
    assert main(["export", str(array_run)]) == 0
    assert "already" in capsys.readouterr().out


def test_predict_refuses_what_is_no_array(array_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros(3))
    (tmp_path / "text.npy").write_text("no array")
    for name in ("objects.npy", "flat.npy", "text.npy", "gone.npy"):
        assert main(["predict", str(array_run), str(tmp_path / name)]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.count("\n") == 1
        assert name in shown.err


def test_predict_takes_images_and_folders(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pip install 'pyft[image]'")
    pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
    from pyft import export_onnx
    from pyft.data.images import ImagePreprocess

    class Brightness(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bright = x.mean(dim=(1, 2, 3), keepdim=False)
            return torch.stack([bright, -bright], dim=1)

    preprocess = ImagePreprocess(8)
    onnx = export_onnx(
        Brightness(), tmp_path / "bright.onnx", example=torch.rand(2, 3, 8, 8), classes=["bright", "dark"],
        task="image-classification", preprocess=preprocess.spec(),
    )  # fmt: skip
    folder = tmp_path / "pictures" / "inner"
    folder.mkdir(parents=True)
    image.new("RGB", (20, 10), "white").save(folder / "a.png")
    image.new("RGB", (10, 20), "black").save(folder / "b.jpg")
    found = predictions([str(onnx), str(tmp_path / "pictures"), str(folder / "a.png")], capsys)
    assert [(row[0], Path(row[2]).name) for row in found] == [
        ("bright", "a.png"),
        ("dark", "b.jpg"),
        ("bright", "a.png"),
    ]
    for word in ("gone.png", str(tmp_path / "empty")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert main(["predict", str(onnx), word]) == 2
        assert word in capsys.readouterr().err


# ---------------------------------------------------------------- Ctrl-C


def test_interrupt_and_resume(
    work: SimpleNamespace, tmp_path: Path, environment: dict[str, str], shell: Callable[..., Any]
) -> None:
    """Ctrl-C ends with 130 and a line that, typed as it stands, finishes the run."""
    command = [
        sys.executable, "-m", "pyft", "train", str(work.folder / "tiny"), str(work.folder / "train.tsv"), "--epochs",
        "2000", "--strategy", "full", "--lr", "0.001", "--export", "none", "--out", "long", "--patience", "3",
    ]  # fmt: skip
    running = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # pytest may run with SIGINT ignored (in the background of a shell), and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    limit = time.monotonic() + 60
    while not (tmp_path / "long" / "last.pt").exists():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    last = err.splitlines()[-1]
    assert last.startswith("pyft: interrupted")
    assert "Traceback" not in err
    typed = shlex.split(last[last.index("pyft resume") :])
    done = shell(*typed[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "long" / "status.json").read_text()) == {"state": "finished"}
