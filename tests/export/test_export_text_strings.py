"""Texts as strings in the file, against the tokenizer of the model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

tokenizers = pytest.importorskip("tokenizers", reason="pip install 'pyft[text]'")
pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime_extensions", reason="pip install 'pyft[text-graph]'")

from pyft.data.text import TextPreprocess  # noqa: E402
from pyft.errors import ConfigError, ExportError  # noqa: E402
from pyft.export.onnx import export_module  # noqa: E402
from pyft.export.run import OnnxModel  # noqa: E402
from pyft.export.text_strings import strings_front  # noqa: E402

NAMES = ["input_ids", "attention_mask", "token_type_ids"]


def minilm(folder: Path) -> TextPreprocess:
    return TextPreprocess.from_folder(folder, 24)


class Counted(nn.Module):
    """Sums over the tokens, which tell every number, place and mask apart."""

    def forward(self, input_ids, attention_mask):
        place = torch.arange(input_ids.shape[1]) + 1.0
        seen = input_ids.to(torch.float32) * attention_mask
        return torch.stack([seen.sum(1), (seen.sqrt() * place).sum(1)], dim=1)


def small(**changes) -> dict:
    """The spec of a WordPiece tokenizer of BERT's kind, with parts changed."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", changes.pop("mark", "[MASK]"), "a", "b", "##b", *"xyz"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=changes.pop("lowercase", True))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    content = {**json.loads(made.to_str()), **changes}
    return {"kind": "text", "tokenizer": json.dumps(content), "max_length": 6, "pad_id": 0}


@pytest.mark.filterwarnings("ignore:inputs='strings'")
def test_texts_of_banking77_are_cut_as_by_the_tokenizer(minilm_dir: Path, tmp_path: Path) -> None:
    path = Path(os.environ.get("PYFT_TEST_DATA", "../shared/data"), "banking77", "test.tsv")
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    texts = [line.split("\t")[0] for line in path.read_text(encoding="utf-8").splitlines()[1:400]]
    text = minilm(minilm_dir)
    model, example = Counted(), text(texts[:3])
    file = OnnxModel(export_module(model, example, tmp_path / "m.onnx", inputs="strings", preprocess=text.spec()))
    assert [(value.name, value.dtype) for value in file.inputs] == [("text", np.dtype(object))]
    assert file.meta.inputs_form == "strings"
    for few in (texts, texts[:1], texts[1:3]):
        wanted = model(**text(few)).numpy()
        np.testing.assert_allclose(file({"text": np.array(few, dtype=object)}), wanted, rtol=1e-6)
    assert max(map(len, text.encode(texts))) == 24


def test_scripts_that_the_operator_does_not_know_are_told(minilm_dir: Path) -> None:
    with pytest.warns(UserWarning, match=r"texts with .*Korean.* are cut otherwise"):
        strings_front(minilm(minilm_dir).spec(), NAMES)


def test_a_tokenizer_that_is_cut_otherwise_is_refused() -> None:
    """Of a word that is known in part, the operator keeps that part; the tokenizer makes all of it unknown."""
    words = (
        r"cuts '  lead and trail  ' into \[2, 1, 5, 1, 1, 3\], the tokenizer into \[2, 1, 1, 1, 3\]: give inputs='raw'"
    )
    with pytest.raises(ExportError, match=words):
        strings_front(small(), NAMES)


def test_a_vocabulary_that_the_operator_does_not_take() -> None:
    with pytest.raises(ExportError, match=r"does not take this tokenizer: .*\[MASK\]"):
        strings_front(small(mark="mask"), NAMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": None}, "the normalizer of this tokenizer is None"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "the model of this tokenizer is BPE"),
    ],
)
def test_another_kind_of_tokenizer_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        strings_front(small(**changes), NAMES)
    with pytest.raises(ConfigError, match="takes 'input_ids', this one takes x"):
        strings_front(small(), ["x"])
