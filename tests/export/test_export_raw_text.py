"""Masks made from token numbers, against those of the tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

tokenizers = pytest.importorskip("tokenizers", reason="pip install 'pyft[text]'")
pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")

from lone_graphs import session_of  # noqa: E402

from pyft.data.text import TextPreprocess  # noqa: E402
from pyft.errors import ConfigError  # noqa: E402
from pyft.export.onnx import export_module  # noqa: E402
from pyft.export.raw_text import ends_with_pad, text_front  # noqa: E402
from pyft.export.run import OnnxModel  # noqa: E402

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c"]
# The pad token within, at the end and alone; nothing; longer than the cut.
TEXTS = ["a b c", "", "a [PAD] b", "a [PAD]", "[PAD]", "[PAD] [PAD]", "c " * 30, "zzz"]


def preprocess(ends: bool = True, pad: str = "[PAD]") -> TextPreprocess:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    if ends:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return TextPreprocess(made.to_str(), 12, WORDS.index(pad))


class Masked(nn.Module):
    """The mean of embeddings under the mask, with the type of each token added."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), 3)
        self.types = nn.Embedding(2, 3)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        hidden = self.words(input_ids)
        if token_type_ids is not None:
            hidden = hidden + self.types(token_type_ids)
        mask = attention_mask.unsqueeze(-1).to(torch.float32)
        return (hidden * mask).sum(1) / mask.sum(1)


def test_the_mask_is_that_of_the_tokenizer() -> None:
    text = preprocess()
    session = session_of(text_front(text.spec(), ["input_ids", "attention_mask", "token_type_ids"]))
    for texts in (TEXTS, TEXTS[:1], TEXTS[1:3]):
        batch = text(texts)
        mask, types = session.run(["attention_mask", "token_type_ids"], {"input_ids": batch["input_ids"].numpy()})
        np.testing.assert_array_equal(mask, batch["attention_mask"].numpy())
        assert mask.dtype == types.dtype == np.int64
        assert not types.any()


@pytest.mark.parametrize(
    ("ends", "pad", "kept"),
    [
        (True, "[PAD]", False),
        (False, "[PAD]", True),  # a text may end with the pad token
        (True, "[SEP]", True),  # every text ends with it
        (True, "[UNK]", False),  # another token stands behind it
    ],
)
def test_the_mask_stays_an_input_where_a_text_can_end_with_the_pad(ends: bool, pad: str, kept: bool) -> None:
    text = preprocess(ends, pad)
    assert ends_with_pad(text.spec()) is kept
    names = [value.name for value in text_front(text.spec(), ["input_ids", "attention_mask"]).outputs]
    assert names == ([] if kept else ["attention_mask"])


@pytest.mark.parametrize("ends", [True, False])
def test_the_whole_file(ends: bool, tmp_path) -> None:
    torch.manual_seed(0)
    text, model = preprocess(ends), Masked().eval()
    texts = TEXTS if ends else [text for text in TEXTS if text]
    batch = text(texts)
    if ends:
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    path = export_module(
        model, batch, tmp_path / "m.onnx", inputs="raw", preprocess=text.spec(), classes=["x", "y", "z"]
    )
    file = OnnxModel(path)
    names = ["input_ids"] if ends else ["input_ids", "attention_mask"]
    assert [value.name for value in file.inputs] == names
    assert file.inputs[0].shape == ("batch", "sequence")
    for count in (1, 2, 7):
        given = {name: value[:count] for name, value in batch.items()}
        found = file.run({name: given[name] for name in names})
        np.testing.assert_allclose(found["logits"], model(**given).detach().numpy(), atol=1e-6)


def test_another_model_of_texts_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes 'input_ids', this one takes tokens"):
        text_front(preprocess().spec(), ["tokens"])


def test_gpt2_keeps_its_mask() -> None:
    """Byte-level BPE whose pad is its end of text, and which adds nothing to texts."""
    content = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "decoder": None,
        "added_tokens": [{"id": 3, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                  "vocab": {"a": 0, "b": 1, "1": 2, "<|endoftext|>": 3}, "merges": []},
    }  # fmt: skip
    spec = {"kind": "text", "tokenizer": json.dumps(content), "max_length": 8, "pad_id": 3}
    assert TextPreprocess.from_spec(spec)(["a<|endoftext|>"])["input_ids"].tolist() == [[0, 3]]
    assert ends_with_pad(spec)
