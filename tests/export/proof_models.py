"""Small models with files in the form that pyft writes: raw inputs in front, scores and labels behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pyft.export.graph import Graph, put_before
from pyft.onnx_runtime.feed import Feed
from pyft.samples import Batch

CLASSES = ["rose", "tulip", "daisy", "lily"]
MEAN, STD = np.array([110.0, 120.0, 130.0], np.float32), np.array([50.0, 55.0, 60.0], np.float32)


class Net(nn.Module):
    """Convolutions with BatchNorm, an attention-like product, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU6())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GELU())
        self.norm = nn.LayerNorm(16)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to (B, 4)."""
        x = self.body(self.stem(x)).flatten(2).transpose(1, 2)
        x = torch.softmax(x @ x.transpose(1, 2) / 8, dim=-1) @ x
        return self.head(self.drop(self.norm(x.mean(1))))


def net() -> Net:
    """With statistics and weights away from their defaults."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.5, 2)
                part.weight.uniform_(0.5, 1.5)
        model.head.weight.mul_(4)
    return model.eval()


def pictures(count: int = 40) -> np.ndarray:
    """(count, 12, 12, 3) uint8."""
    generator = np.random.default_rng(1)
    base = generator.integers(0, 256, (count, 1, 1, 3))
    return np.clip(base + generator.normal(0, 40, (count, 12, 12, 3)), 0, 255).astype(np.uint8)


def preprocess(raw: np.ndarray) -> torch.Tensor:
    """The training preprocessing: (B, H, W, 3) uint8 to (B, 3, H, W)."""
    return torch.from_numpy(((raw.astype(np.float32) - MEAN) / STD).transpose(0, 3, 1, 2).copy())


def front(mean: np.ndarray = MEAN, std: np.ndarray = STD) -> Graph:
    """The same in a graph."""
    graph = Graph("image")
    picture = graph.input("image", np.uint8, ["batch", "height", "width", 3])
    scaled = (picture.to(np.float32) - mean) / std
    graph.output("input", graph.Transpose(scaled, perm=[0, 3, 1, 2]), ["batch", 3, 12, 12])
    return graph


def write(tensors: Path, path: Path, graph: Graph | None = None, classes=CLASSES) -> Path:
    """From a file that takes `input` to one that takes `image`, with these names in its output `label`."""
    proto = onnx.load(tensors)
    put_before(proto, graph or front())
    names = next(value for value in proto.graph.initializer if value.data_type == onnx.TensorProto.STRING)
    names.string_data[:] = [name.encode() for name in classes]
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())
    return path


def feeds(raw: np.ndarray, size: int = 16, order=None):
    """Batches as the file takes them, in any order of the samples."""
    order = np.arange(len(raw)) if order is None else order
    for start in range(0, len(raw), size):
        index = order[start : start + size]
        yield Feed({"image": raw[index]}, index)


def batch_of(raw: np.ndarray, targets: torch.Tensor | None = None):
    """From sample numbers to what the model takes."""

    def make(index: np.ndarray) -> Batch:
        numbers = torch.from_numpy(index)
        return Batch(preprocess(raw[index]), None if targets is None else targets[numbers], numbers)

    return make


def tokenizer_json(words: list[str]) -> str:
    """Splits at spaces and ends every text with [SEP]; [PAD] is 0."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install 'pyft[text]'")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[SEP]", *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", vocabulary["[SEP]"])]
    )
    return made.to_str()
