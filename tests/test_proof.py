"""The proof on a run's samples: raw inputs for the file, the training preprocessing for PyTorch, all of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")
onnx = pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")
metrics = pytest.importorskip("sklearn.metrics", reason="pip install scikit-learn")

from proof_models import tokenizer_json  # noqa: E402

import pyft  # noqa: E402
from pyft.data.batches import Batches  # noqa: E402
from pyft.data.images import ImagePreprocess  # noqa: E402
from pyft.data.text import TextPreprocess  # noqa: E402
from pyft.errors import ExportError  # noqa: E402
from pyft.export.onnx import export_module  # noqa: E402
from pyft.export.parity import Known  # noqa: E402
from pyft.models.call import call_model  # noqa: E402
from pyft.onnx_runtime.feed import Feed  # noqa: E402
from pyft.proof import KeptLogits, in_precision, lower, prove, raw_inputs, repeatable  # noqa: E402
from pyft.samples import Batch, Samples  # noqa: E402

CLASSES = ["good", "bad", "plain"]
WORDS = ["fine", "bad", "very", "not", "so", "film", "book", "the"]


def raw_file(model, samples, preprocess, path, spec=None):
    """A file that takes the samples as they are; `spec` changes what the graph in front is made of."""
    example = next(iter(Batches(samples.subset(range(4)), preprocess, 4, shuffle=False).epoch(0))).inputs
    made_of = {**preprocess.spec(), **(spec or {})}
    return export_module(model, example, path, inputs="raw", classes=CLASSES, preprocess=made_of)


class Bag(nn.Module):
    """Mean of the tokens."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3 + len(WORDS), 16)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        weights = attention_mask.unsqueeze(-1).float()
        return self.head((self.table(input_ids) * weights).sum(1) / weights.sum(1))


@pytest.fixture(scope="module")
def texts():
    """120 texts of 1 to 15 words, with targets."""
    generator = np.random.default_rng(0)
    words = [" ".join(generator.choice([*WORDS, "unknown"], 1 + i % 15)) for i in range(120)]
    targets = torch.from_numpy(generator.integers(0, 3, 120))
    return Samples("text", words, targets, "texts"), TextPreprocess(tokenizer_json(WORDS), 20, 0)


@pytest.fixture(scope="module")
def bag():
    torch.manual_seed(0)
    return Bag().eval()


@pytest.fixture(scope="module")
def text_file(bag, texts, tmp_path_factory):
    return raw_file(bag, *texts, tmp_path_factory.mktemp("texts") / "model.onnx")


def logits_of(model, samples, preprocess):
    found = np.zeros((len(samples), 3), np.float32)
    with torch.no_grad():
        for batch in Batches(samples, preprocess, 64, shuffle=False).epoch(0):
            found[batch.index.numpy()] = call_model(model, batch.inputs).numpy()
    return found


def test_texts_as_tokens(bag, texts, text_file, tmp_path):
    samples, preprocess = texts
    parity = prove(
        text_file, bag, samples, preprocess, problem="classification", classes=CLASSES, report=tmp_path / "parity.json"
    )
    assert parity.passed
    assert parity.num_samples == 120
    assert parity.outputs == ("scores", "label_index", "label")
    assert parity.largest_inputs["input_ids"] == [64, 16]
    logits, targets = logits_of(bag, samples, preprocess), samples.targets.numpy()
    for side in ("torch", "onnx"):
        found = parity.metrics[side]
        assert found["accuracy"] == pytest.approx(metrics.accuracy_score(targets, logits.argmax(1)))
        assert found["macro_f1"] == pytest.approx(metrics.f1_score(targets, logits.argmax(1), average="macro"))
        scores = torch.from_numpy(logits).softmax(1)
        assert found["loss"] == pytest.approx(metrics.log_loss(targets, scores, labels=[0, 1, 2]), rel=1e-5)
    assert json.loads((tmp_path / "parity.json").read_text())["metrics"]["onnx"]["accuracy"] == found["accuracy"]


class Counted(nn.Module):
    """Counts the samples that PyTorch computes."""

    def __init__(self, model):
        super().__init__()
        self.model, self.samples = model, 0

    def forward(self, **inputs):
        self.samples += len(inputs["input_ids"])
        return self.model(**inputs)


def test_known_logits_are_not_computed_again(bag, texts, text_file):
    samples, preprocess = texts
    counted = Counted(bag).eval()
    known = Known(logits_of(bag, samples, preprocess), samples.targets.numpy())
    parity = prove(text_file, counted, samples, preprocess, problem="classification", classes=CLASSES, known=known)
    assert parity.passed
    assert parity.num_samples == 120
    assert parity.metrics["torch"]["accuracy"] == metrics.accuracy_score(samples.targets, known.logits.argmax(1))
    assert counted.samples == 64 + 1 + 2 + 7


def test_known_logits_that_differ_are_computed_again(bag, texts, text_file):
    samples, preprocess = texts
    counted = Counted(bag).eval()
    known = Known(logits_of(bag, samples, preprocess) + 1)
    parity = prove(text_file, counted, samples, preprocess, problem="classification", classes=CLASSES, known=known)
    assert parity.passed
    assert parity.max_rel < 1e-5
    assert counted.samples == 120 + 1 + 2 + 7


def test_known_logits_do_not_hide_a_changed_model(bag, texts, text_file, tmp_path):
    samples, preprocess = texts
    other = Bag().eval()
    known = Known(logits_of(bag, samples, preprocess))
    with pytest.raises(ExportError, match="the values differ first at node"):
        prove(
            _copy(text_file, tmp_path), other, samples, preprocess, problem="classification", classes=CLASSES,
            known=known,
        )  # fmt: skip


def _copy(path, folder):
    copy = folder / path.name
    copy.write_bytes(path.read_bytes())
    return copy


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def pictures():
    """Of three sizes."""
    image = pytest.importorskip("PIL.Image", reason="pip install 'pyft[image]'")
    generator = np.random.default_rng(0)
    sizes = [(20, 24), (31, 17), (16, 16)]
    made = [image.fromarray(generator.integers(0, 256, (*sizes[i % 3], 3)).astype(np.uint8)) for i in range(30)]
    return Samples("image", made, torch.arange(30) % 3, "pictures"), ImagePreprocess(12, 14)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, None),
        ({"mean": (0.5, 0.456, 0.406)}, r"preprocessing in front of the model gives another 'input'"),
        ({"resize": 12}, r"preprocessing in front of the model gives another 'input'"),
    ],
)
def test_pictures_of_any_size(pictures, tmp_path, spec, message):
    torch.manual_seed(0)
    model = Pooled().eval()
    with torch.no_grad():
        model.head.weight.mul_(30)
    samples, preprocess = pictures
    path = raw_file(model, samples, preprocess, tmp_path / "model.onnx", spec)
    if message is not None:
        with pytest.raises(ExportError, match=message):
            prove(path, model, samples, preprocess, problem="classification", classes=CLASSES)
        return
    parity = prove(path, model, samples, preprocess, problem="classification", classes=CLASSES)
    assert parity.num_samples == 30
    assert parity.largest_inputs["image"] == [10, 31, 24, 3]
    assert parity.metrics["torch"] == pytest.approx(parity.metrics["onnx"], abs=1e-5)


def test_value_in_the_unit_of_the_target(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1).eval(), torch.randn(50, 4)
    to_value = lambda logits: logits * np.float32(20) + np.float32(100)  # noqa: E731
    with torch.no_grad():
        samples = Samples("array", x, torch.from_numpy(to_value(model(x).numpy())[:, 0]) + torch.randn(50))
    target = {"mean": 100.0, "std": 20.0}
    path = export_module(model, x[:3], tmp_path / "model.onnx", task="regression", target=target)
    parity = prove(path, model, samples, None, problem="regression", classes=None, to_value=to_value)
    assert parity.outputs == ("value",)
    wanted = metrics.root_mean_squared_error(samples.targets, to_value(model(x).detach().numpy())[:, 0])
    assert parity.metrics["onnx"]["rmse"] == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ExportError, match=r"output 'value' is .* for sample 0"):
        prove(path, model, samples, None, problem="regression", classes=None)


def test_run_is_proven_on_every_validation_sample(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 4, generator=generator)
    y = (x[:, 0] > 0).long()
    result = pyft.finetune(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (x, y), val=0.5, epochs=1, batch_size=256,
        out=tmp_path / "run", progress=False, cache_features=False,
    )  # fmt: skip
    written = json.loads((tmp_path / "run" / "parity.json").read_text())
    assert written["num_samples"] == 2000
    assert written["metrics"]["torch"]["accuracy"] == pytest.approx(result.metrics["val_accuracy"])
    assert written["metrics"]["onnx"] == pytest.approx(written["metrics"]["torch"], abs=1e-6)


@pytest.fixture(scope="module")
def right(bag, texts):
    """With the targets that the float32 file predicts."""
    samples, preprocess = texts
    logits = logits_of(bag, samples, preprocess)
    return Samples("text", samples.inputs, torch.from_numpy(logits.argmax(1)), "texts")


def test_lower_precision_takes_the_place_of_float32(bag, texts, text_file, right, tmp_path):
    path, report = _copy(text_file, tmp_path), tmp_path / "parity.json"
    parity = lower(
        path, "fp16", bag, right, texts[1], problem="classification", classes=CLASSES, max_drop=0.1, report=report
    )
    assert parity.passed
    assert parity.max_abs > 1e-5
    written = json.loads(report.read_text())
    assert written["precision"]["chosen"] == "fp16"
    assert [row["name"] for row in written["precision"]["candidates"]] == ["fp32", "fp16"]
    assert written["precision"]["candidates"][0]["metric"] == 1
    half = [v for v in onnx.load(path).graph.initializer if v.data_type == onnx.TensorProto.FLOAT16]
    assert {value.name for value in half} >= {"table.weight", "head.weight"}


def test_refusal_leaves_the_float32_file(bag, texts, text_file, right, tmp_path):
    path, report = _copy(text_file, tmp_path), tmp_path / "parity.json"
    options = {"problem": "classification", "classes": CLASSES, "report": report}
    prove(path, bag, right, texts[1], **options)
    # The weights of this model are too small to be worth it.
    with pytest.raises(ExportError, match=r"no file keeps accuracy within max_drop=0.01"):
        lower(path, "int8", bag, right, texts[1], **options)
    assert path.read_bytes() == text_file.read_bytes()
    written = json.loads(report.read_text())
    assert written["passed"] is True
    assert [row["name"] for row in written["precision"]["candidates"]] == ["fp32", "int8 dynamic", "int8 static"]
    assert written["precision"]["candidates"][1]["metric"] is None


def test_labels_of_a_lower_precision_are_proven(bag, texts, text_file, right, tmp_path):
    path = _copy(text_file, tmp_path)
    _, table = in_precision(path, "fp16", right, texts[1], problem="classification", classes=CLASSES, max_drop=0.1)
    proto = onnx.load(path)
    names = next(value for value in proto.graph.initializer if value.data_type == onnx.TensorProto.STRING)
    names.string_data[:] = [names.string_data[i] for i in (2, 1, 0)]
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match="labels are permuted"):
        prove(path, bag, right, texts[1], problem="classification", classes=CLASSES, precision=table)


def kept_after(batches, num_samples):
    kept = KeptLogits(num_samples)
    for batch in kept.batches(batches):
        assert kept.put(batch.inputs) is batch.inputs
    return kept.known()


def test_kept_logits_are_in_the_order_of_the_samples():
    x, y = torch.randn(7, 3), torch.arange(7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    batches = [Batch(x[index], y[index], index) for index in order.split(3)]
    known = kept_after(batches, 7)
    np.testing.assert_array_equal(known.logits, x.numpy())
    np.testing.assert_array_equal(known.targets, y.numpy())
    assert kept_after(batches[:-1], 7) is None
    assert kept_after([], 7) is None
    assert kept_after([Batch(torch.randn(2, 4, 3), None, torch.arange(2))], 2) is None


def test_too_many_logits_are_not_kept(monkeypatch):
    monkeypatch.setattr("pyft.proof.KEPT_BYTES", 7 * 3 * 4 - 1)
    assert kept_after([Batch(torch.randn(7, 3), None, torch.arange(7))], 7) is None


def test_columns_by_name():
    samples = Samples("array", torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None, columns=("a", "b"))
    assert {name: values.tolist() for name, values in raw_inputs(samples).items()} == {"a": [1, 3], "b": [2, 4]}


@pytest.mark.parametrize(("limit", "times"), [(2**20, 1), (1000, 3)])
def test_batches_are_kept_while_they_are_small(monkeypatch, limit, times):
    monkeypatch.setattr("pyft.proof.KEPT_BYTES", limit)
    made = []

    def make():
        made.append(0)
        for number in range(3):
            yield Feed({"input": np.full((4, 25), number, np.float32)}, np.arange(4) + 4 * number)

    again = repeatable(make)
    for _ in range(2):
        found = list(again())
        assert [float(feed.inputs["input"][0, 0]) for feed in found] == [0, 1, 2]
        assert np.concatenate([feed.index for feed in found]).tolist() == list(range(12))
    assert len(made) == times
