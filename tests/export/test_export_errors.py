"""What cannot be exported says why, and leaves nothing behind."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from pyft.errors import ConfigError, ExportError, MissingExtraError
from pyft.export.onnx import export_module
from pyft.export.trace import check_graph

onnx = pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)


class FixedBatch(Base):
    def forward(self, x):
        return self.layer(x.reshape(3, 4))


class LoopsOverBatch(Base):
    def forward(self, x):
        return self.layer(torch.cat([x[i : i + 1] for i in range(x.shape[0])]))


class BranchesOnValues(Base):
    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


class UnknownOperator(Base):
    def forward(self, x):
        return torch.special.bessel_j0(self.layer(x))


class AlwaysDropout(Base):
    def forward(self, x):
        return torch.nn.functional.dropout(self.layer(x), training=True)


class Packed(Base):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 2, batch_first=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.rnn(packed)[1][0][-1]


class BatchInside(Base):
    def forward(self, x):
        return self.layer(x).sum(0)


class NotFinite(Base):
    def forward(self, x):
        return self.layer(x) / 0 - torch.inf


class NoTensor(Base):
    def forward(self, x):
        return {"scores": self.layer(x)}


@pytest.mark.parametrize(
    ("model", "messages"),
    [
        (FixedBatch(), ["batch of 1", "invalid for input of size 4", "x.shape[0]"]),
        (LoopsOverBatch(), ["forward fixes dimension 0", "x.shape[0]"]),
        (BranchesOnValues(), ["data-dependent", "test_export_errors.py", "if x.sum() > 0", "torch.where"]),
        (UnknownOperator(), ["bessel_j0", "replace that operation"]),
        (AlwaysDropout(), ["other logits for the same inputs", "dropout with training=True"]),
        (BatchInside(), ["logits of shape (2,) for a batch of 1"]),
        (NotFinite(), ["PyTorch gives NaN or inf for sample 0"]),
        (NoTensor(), ["must give a Tensor of logits", "got dict"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_cause_and_mend_are_named(model, messages, tmp_path):
    model.train()
    with pytest.raises((ExportError, ConfigError)) as error:
        export_module(model, torch.randn(3, 4), tmp_path / "m.onnx")
    for message in messages:
        assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "Summary" not in str(error.value)
    assert model.training
    assert list(tmp_path.iterdir()) == []


def test_packed_sequence(tmp_path):
    example = {"x": torch.randn(3, 5, 4), "lengths": torch.tensor([5, 3, 2])}
    with pytest.raises(ExportError, match=r"packed\).*packed sequences cannot be exported"):
        export_module(Packed(), example, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["a", "b", "c"]}, r"classes holds 3 names, but the model gives logits \(7, 2\)"),
        ({"task": "ranking"}, "task must be one of classification"),
        ({"task": "sound-classification"}, "got 'sound-classification'"),
        ({"kind": "sound"}, "kind must be 'text', 'image' or 'array', got 'sound'"),
        ({"preprocess": {"mean": {1, 2}}}, "preprocess must be JSON-able"),
        ({"metadata": {"pyft.task": "x"}}, "metadata: pyft writes 'pyft.task' itself"),
        ({"example": [1.0]}, "'input' must be a Tensor .* got list"),
        ({"example": torch.zeros(0, 4)}, r"got shape \(0, 4\)"),
        ({"example": {"a": torch.zeros(2, 4), "b": torch.zeros(3, 4)}}, r"one batch size, got \[2, 3\]"),
        ({"model": nn.Linear(4, 2).bfloat16()}, r"'weight' is torch.bfloat16.*model.float\(\)"),
        ({"path": "."}, "path must be a file"),
    ],
)
def test_argument_that_does_not_fit(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"model": nn.Linear(4, 2), "example": torch.randn(2, 4), "path": tmp_path / "m.onnx", **change}
    with pytest.raises(ConfigError, match=message):
        export_module(**arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_names_the_extra(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*pyft\[onnx\]"):
        export_module(nn.Linear(4, 2), torch.randn(2, 4), tmp_path / "m.onnx")


def test_graph_that_differs_never_appears(tmp_path, monkeypatch):
    import pyft.export.onnx as module

    def spoiled(proto):
        clean(proto)
        bias = next(value for value in proto.graph.initializer if value.name == "bias")
        bias.raw_data = b"\0" * len(bias.raw_data)

    clean = module.clean
    monkeypatch.setattr(module, "clean", spoiled)
    (tmp_path / "m.onnx").write_bytes(b"the file of before")
    with pytest.raises(ExportError, match=r"does not behave like the model .* the worst is sample \d"):
        export_module(nn.Linear(4, 2), torch.randn(2, 4), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == b"the file of before"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (("Dropout", {}), "training node Dropout"),
        (("RandomNormalLike", {}), "training node RandomNormalLike"),
        (("BatchNormalization", {"training_mode": 1}), "training node BatchNormalization"),
        (("Relu", {}), "fixed batch size \\(3\\) in 'input'"),
    ],
)
def test_graph_check(node, message):
    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3, 4]) for name in ("input", "logits")]
    made = helper.make_node(node[0], ["input"], ["logits"], name="n", **node[1])
    proto = helper.make_model(helper.make_graph([made], "g", values[:1], values[1:]))
    with pytest.raises(ExportError, match=message):
        check_graph(proto)
