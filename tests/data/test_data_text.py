"""Tokenising and padding, compared with transformers and with a plain loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyft.data.preprocess import preprocess_from_spec
from pyft.data.text import TextPreprocess, gather_tokens
from pyft.errors import ConfigError, DataError

tokenizers = pytest.importorskip("tokenizers", reason="pip install 'pyft[text]'")

WORDS = ["[PAD]", "[UNK]", "<s>", "</s>", "card", "lost", "my", "is", "where"]


def tokenizer_json(pad_first: bool = True) -> str:
    words = WORDS if pad_first else [*WORDS[1:], WORDS[0]]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]"])
    # As MiniLM's file does: a fixed padding and a short cut, which must not act.
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(4)
    return str(tokenizer.to_str())


def make_folder(path: Path, tokenizer_config: dict[str, Any], config: dict[str, Any], pad_first: bool = True) -> Path:
    path.mkdir()
    (path / "tokenizer.json").write_text(tokenizer_json(pad_first))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_padding_and_truncation_of_the_file_do_not_act(tmp_path: Path) -> None:
    text = TextPreprocess.from_folder(make_folder(tmp_path / "m", {"model_max_length": 7}, {}))
    assert [row.tolist() for row in text.encode(["where is my card", "lost", "my " * 20])] == [
        [2, 8, 7, 6, 4, 3],
        [2, 5, 3],
        [2, 6, 6, 6, 6, 6, 3],
    ]
    assert text.encode(["lost"])[0].dtype == np.int64
    batch = text(["lost", "where is"])
    assert batch["input_ids"].tolist() == [[2, 5, 3, 0], [2, 8, 7, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("tokenizer_config", "config", "asked", "limit"),
    [
        ({"model_max_length": 64}, {"max_position_embeddings": 32}, None, 32),
        ({"model_max_length": 16}, {"max_position_embeddings": 32}, None, 16),
        ({"model_max_length": 1e30}, {"max_position_embeddings": 32}, None, 32),
        ({"model_max_length": 1e30}, {}, None, 512),
        ({}, {"max_position_embeddings": 34, "model_type": "roberta"}, None, 33),
        ({"model_max_length": 64}, {}, 10, 10),
        ({}, {}, 2000, 2000),
    ],
)
def test_limits(
    tmp_path: Path, tokenizer_config: dict[str, Any], config: dict[str, Any], asked: int | None, limit: int
) -> None:
    folder = make_folder(tmp_path / "m", tokenizer_config, config)
    assert TextPreprocess.from_folder(folder, asked).max_length == limit


def test_pad_number_comes_from_the_folder(tmp_path: Path) -> None:
    assert (
        TextPreprocess.from_folder(make_folder(tmp_path / "a", {"pad_token": "[PAD]"}, {}, pad_first=False)).pad_id == 8
    )
    named = {"pad_token": {"content": "[PAD]", "special": True}}
    assert (
        TextPreprocess.from_folder(make_folder(tmp_path / "b", named, {"pad_token_id": 3}, pad_first=False)).pad_id == 8
    )
    assert TextPreprocess.from_folder(make_folder(tmp_path / "c", {}, {"pad_token_id": 3})).pad_id == 3


def test_bad_folders_and_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        TextPreprocess.from_folder(tmp_path)
    folder = make_folder(tmp_path / "m", {"model_max_length": 8}, {})
    with pytest.raises(ConfigError, match="max_length=9: the model of m takes at most 8 tokens"):
        TextPreprocess.from_folder(folder, 9)
    with pytest.raises(ConfigError, match="max_length=2: expected more than 2"):
        TextPreprocess.from_folder(folder, 2)
    with pytest.raises(ConfigError, match="the tokenizer cannot be read"):
        TextPreprocess("{}", 8, 0)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        TextPreprocess.from_folder(folder)
    with pytest.raises(DataError, match="expected a list of str; row 1 is int"):
        TextPreprocess(tokenizer_json(), 8, 0).encode(["a", 3])  # type: ignore[list-item]


def test_spec_survives_json() -> None:
    text = TextPreprocess(tokenizer_json(), 6, 0)
    again = preprocess_from_spec(json.loads(json.dumps(text.spec())))
    assert isinstance(again, TextPreprocess)
    texts = ["where is my lost card", "my", "unknown words"]
    assert [row.tolist() for row in again.encode(texts)] == [row.tolist() for row in text.encode(texts)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), max_size=7), min_size=1, max_size=9), st.data())
def test_gathered_tokens_against_a_loop(rows: list[list[int]], data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9))
    flat = np.array([number for row in rows for number in row] or [0], dtype=np.int32)
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    batch = gather_tokens(flat, offsets, np.array(index), 77)
    longest = max(len(rows[number]) for number in index)
    assert batch["input_ids"].tolist() == [rows[number] + [77] * (longest - len(rows[number])) for number in index]
    assert batch["attention_mask"].tolist() == [[1] * len(rows[n]) + [0] * (longest - len(rows[n])) for n in index]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_minilm_tokens_are_those_of_transformers(minilm_dir: Path, shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install 'pyft[text]'")
    lines = (shared_data / "banking77" / "test.tsv").read_text(encoding="utf-8").split("\n")[1:401]
    texts = [line.split("\t")[0] for line in lines]
    texts += ["naïve café – 北京 \U0001f600 don't", "word " * 700, " \t ", "[CLS] [MASK] typed by hand"]
    reference = transformers.AutoTokenizer.from_pretrained(minilm_dir)
    for length in (None, 16):
        text = TextPreprocess.from_folder(minilm_dir, length)
        expected = reference(texts, truncation=True, max_length=length or 512, padding="longest", return_tensors="pt")
        batch = text(texts)
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["attention_mask"], expected["attention_mask"])
        flat, offsets = text.encode_flat(texts)
        assert np.array_equal(flat, np.concatenate(text.encode(texts)))
        assert offsets[-1] == len(flat)
