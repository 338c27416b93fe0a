"""finetune on texts: a tiny encoder made here, and MiniLM on real texts."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pyft
from pyft.errors import ConfigError
from pyft.run_dir import open_run, read_config

transformers = pytest.importorskip("transformers", reason="pip install 'pyft[text]'")

REPOSITORY = Path(__file__).resolve().parents[1]
WORDS = {"money": ["cash", "bank"], "food": ["soup", "eat"], "sport": ["ball", "team"]}
FILLERS = ["i", "want", "to", "a", "my", "please", "now", "where"]


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, label): one telling word among fillers, of very different lengths."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = list(WORDS)[number % len(WORDS)]
        words = [draw.choice(FILLERS) for _ in range(draw.choice((1, 2, 4, 7)))] + [draw.choice(WORDS[label])]
        draw.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


def write_table(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return path


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two small layers with random weights and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLERS, *(word for group in WORDS.values() for word in group)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    config.save_pretrained(folder)
    save_file(transformers.BertModel(config, add_pooling_layer=False).state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    write_table(folder / "train.tsv", sentences(300, 0))
    write_table(folder / "test.tsv", sentences(60, 1))
    return folder


def tune(model: Any, data: Any, out: Path, **keywords: Any) -> pyft.Result:
    return pyft.finetune(model, data, out=out, **{"progress": False, "export": None, "precision": "fp32", **keywords})


@pytest.fixture(scope="module")
def tuned(encoder_dir: Path, tables: Path, tmp_path_factory: pytest.TempPathFactory) -> pyft.Result:
    """A run with export, on a folder with train.tsv and test.tsv."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    return tune(f"hf:{encoder_dir}", str(tables), out, export="onnx", epochs=9, lr=3e-3)


class TestTinyEncoder:
    def test_it_learns(self, tuned: pyft.Result) -> None:
        assert tuned.classes == ["food", "money", "sport"]
        assert tuned.metrics["test_accuracy"] > 0.9
        assert [row["stage"] for row in tuned.history] == ["head"] * 3 + ["full"] * 6
        assert "features" in tuned.seconds

    def test_module_folder_and_onnx_agree(self, tuned: pyft.Result, tables: Path) -> None:
        assert tuned.onnx is not None
        expected = tuned.evaluate(tables / "test.tsv")
        assert expected["accuracy"] == tuned.metrics["test_accuracy"]
        for model in (tuned.onnx, tuned.run_dir, str(tuned.run_dir)):
            found = pyft.evaluate(model, tables / "test.tsv")
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
            np.testing.assert_array_equal(found.confusion, expected.confusion)

    def test_predictions_of_texts_of_any_length(self, tuned: pyft.Result) -> None:
        texts = ["i want cash", "soup", "where to ball please " * 3, "my bank " * 40]
        expected = tuned.predict(texts)
        assert [row["label"] for row in expected][:3] == ["money", "food", "sport"]
        for model in (tuned.onnx, tuned.run_dir):
            rows = pyft.predict(model, texts)
            np.testing.assert_allclose(
                [row["scores"] for row in rows], [row["scores"] for row in expected], rtol=1e-3, atol=1e-6
            )
        assert pyft.predict(tuned.onnx, "i want cash")[0]["label"] == "money"

    def test_a_table_to_predict_needs_no_known_labels(self, tuned: pyft.Result, tmp_path: Path) -> None:
        path = write_table(tmp_path / "new.tsv", [("i eat soup", "unheard of"), ("my bank now", "what")])
        assert [row["label"] for row in tuned.predict(path)] == ["food", "money"]

    def test_the_folder_can_be_opened_without_the_encoder(self, tuned: pyft.Result) -> None:
        opened = open_run(tuned.run_dir)
        for name, value in tuned.model.state_dict().items():
            assert torch.equal(opened.module.state_dict()[name], value)
        assert opened.classes == tuned.classes

    def test_the_shell_command_repeats_the_run(self, tuned: pyft.Result, encoder_dir: Path, tables: Path) -> None:
        repeat = read_config(tuned.run_dir)["repeat"]
        assert repeat["shell"] == (f"pyft train hf:{encoder_dir} {tables} --epochs 9 --lr 0.003 --precision fp32")

    def test_next_commands_name_the_test_set(self, tuned: pyft.Result, tables: Path) -> None:
        assert tuned.next_commands()[0] == f"pyft eval {tuned.onnx} {tables / 'test.tsv'}"

    def test_tuning_goes_on_from_a_run(self, tuned: pyft.Result, tables: Path, tmp_path: Path) -> None:
        head = tuned.model.get_parameter("head.weight").clone()
        again = tune(tuned.run_dir, str(tables), tmp_path / "again", strategy="head", epochs=1, lr=1e-6)
        assert again.metrics["test_accuracy"] >= tuned.metrics["test_accuracy"] - 0.05
        torch.testing.assert_close(again.model.get_parameter("head.weight"), head, rtol=0, atol=1e-3)
        other = write_table(tmp_path / "other.tsv", [(text, label.upper()) for text, label in sentences(90, 3)])
        anew = tune(tuned.run_dir, other, tmp_path / "other", strategy="head", epochs=1, lr=1e-6)
        assert any("drawn anew" in note for note in anew.notes)
        assert anew.model.get_parameter("head.weight").std().item() == pytest.approx(0.0175, rel=0.3)
        assert open_run(anew.run_dir).classes == ["FOOD", "MONEY", "SPORT"]


def test_frozen_encoder_keeps_every_bit(encoder_dir: Path, tables: Path, run_dir: Path) -> None:
    result = tune(f"hf:{encoder_dir}", str(tables), run_dir, freeze="encoder*", strategy="full", epochs=1)
    for name, value in load_file(encoder_dir / "model.safetensors").items():
        assert torch.equal(result.model.state_dict()[f"encoder.{name}"], value), name
    assert "features" in result.seconds


def test_max_length_cuts_texts(encoder_dir: Path, tables: Path, run_dir: Path) -> None:
    result = tune(f"hf:{encoder_dir}", str(tables), run_dir, max_length=8, strategy="head", epochs=1)
    assert json.loads((run_dir / "preprocess.json").read_text())["max_length"] == 8
    assert result.predict("soup " + "now " * 20)[0]["scores"] == pytest.approx(
        result.predict("soup " + "now " * 30)[0]["scores"]
    )


def test_images_for_a_text_model(encoder_dir: Path, run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="takes text inputs, the data holds array inputs"):
        tune(f"hf:{encoder_dir}", (torch.zeros(4, 2), [0, 1, 0, 1]), run_dir)


def test_a_text_model_of_the_users_own(encoder_dir: Path, tables: Path, run_dir: Path) -> None:
    from pyft.data.text import TextPreprocess

    class Bag(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = torch.nn.Embedding(64, 16), torch.nn.Linear(16, 2)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            mask = attention_mask.unsqueeze(-1).float()
            return self.head((self.embedding(input_ids) * mask).sum(1) / mask.sum(1))

    preprocess = TextPreprocess.from_folder(encoder_dir)
    result = tune(
        Bag(), str(tables), run_dir, preprocess=preprocess, epochs=12, lr=5e-2, strategy="full", export="onnx"
    )
    assert result.metrics["test_accuracy"] > 0.9
    assert pyft.evaluate(run_dir, tables / "test.tsv")["accuracy"] == result.metrics["test_accuracy"]


def test_killed_and_resumed_from_the_folder_alone(encoder_dir: Path, tables: Path, tmp_path: Path) -> None:
    keywords = {"epochs": 5, "lr": 1e-3, "batch_size": 4, "export": None, "precision": "fp32", "progress": False}
    whole, out = tmp_path / "whole", tmp_path / "run"
    tune(f"hf:{encoder_dir}", str(tables), whole, **keywords)
    code = f"import pyft; pyft.finetune({f'hf:{encoder_dir}'!r}, {str(tables)!r}, out={str(out)!r}, **{keywords!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (out / "metrics.csv").exists() or len((out / "metrics.csv").read_text().splitlines()) < 3:
        assert process.poll() is None, "the process ended before it was stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = pyft.resume(out, progress=False)
    assert len(result.history) == 5
    for name, value in load_file(whole / "model.safetensors").items():
        assert torch.equal(load_file(out / "model.safetensors")[name], value), name
    with pytest.raises(ConfigError, match="finished"):
        pyft.resume(out)


def test_minilm_on_real_texts(minilm_dir: Path, shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "banking77" / "train.tsv").read_text().splitlines()[1:]
    rows = [tuple(line.split("\t")) for line in lines]
    kept = sorted({label for _, label in rows})[:6]
    rows = [row for row in rows if row[1] in kept]
    random.Random(0).shuffle(rows)
    train = write_table(tmp_path / "train.tsv", rows[:240])
    test = write_table(tmp_path / "test.tsv", rows[240:360])
    result = tune(
        f"hf:{minilm_dir}", {"train": train, "test": test}, tmp_path / "run", strategy="head", val=0, epochs=5
    )
    assert result.metrics["test_accuracy"] > 0.93
    assert result.metrics["test_macro_f1"] > 0.93
