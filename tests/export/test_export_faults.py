"""Faults put into a file or a model on purpose: each is caught, and named."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")
onnx = pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")

from proof_models import CLASSES, MEAN, batch_of, feeds, front, net, pictures, preprocess, write  # noqa: E402

from pyft.errors import ExportError  # noqa: E402
from pyft.export.onnx import export_module  # noqa: E402
from pyft.export.parity import Parity, check_parity  # noqa: E402
from pyft.export.run import OnnxModel  # noqa: E402


@pytest.fixture(scope="module")
def raw():
    return pictures()


@pytest.fixture(scope="module")
def model():
    return net()


@pytest.fixture(scope="module")
def tensors(model, raw, tmp_path_factory):
    """The file that takes tensors; the others are made from it."""
    path = tmp_path_factory.mktemp("tensors") / "model.onnx"
    return export_module(model, preprocess(raw[:4]), path, classes=CLASSES)


@pytest.fixture(scope="module")
def good(tensors, tmp_path_factory):
    return write(tensors, tmp_path_factory.mktemp("faults") / "model.onnx")


@pytest.fixture
def path(good, tmp_path):
    return shutil.copy(good, tmp_path / "model.onnx")


def check(model, path, raw, **keywords):
    order = np.random.default_rng(0).permutation(len(raw))
    return check_parity(
        model, path, batch_of(raw), feeds=feeds(raw, order=order), module=model, classes=CLASSES,
        report=path.parent / "parity.json" if hasattr(path, "parent") else None, **keywords,
    )  # fmt: skip


def failed(model, path, raw, match, **keywords) -> Parity:
    """The error says `match`; the file is kept under another name, and the report says the same."""
    with pytest.raises(ExportError, match=match) as raised:
        check(model, path, raw, **keywords)
    assert not path.exists()
    kept = path.with_name("model.failed.onnx")
    assert kept.exists()
    assert str(kept) in str(raised.value)
    written = json.loads((path.parent / "parity.json").read_text())
    assert written["passed"] is False
    assert written["failure"] in str(raised.value)
    assert written["kept"] == str(kept)
    return written


def changed(path, change):
    """The file with its graph changed after export."""
    proto = onnx.load(path)
    change(proto)
    path.write_bytes(proto.SerializeToString())
    return path


def initializer(proto, name):
    return next(value for value in proto.graph.initializer if value.name == name)


def node(proto, name):
    return next(node for node in proto.graph.node if name in node.output)


def set_array(proto, name, change):
    value = initializer(proto, name)
    value.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(value).copy()), name))


def test_the_good_file_passes(model, path, raw):
    parity = check(model, path, raw)
    assert parity.passed
    assert parity.outputs == ("scores", "label_index", "label")
    assert parity.num_samples == 40
    assert parity.largest_batch == 16
    assert parity.largest_inputs == {"image": [16, 12, 12, 3]}
    assert set(parity.nodes_by_provider) == {"CPUExecutionProvider"}
    assert parity.nodes_by_provider["CPUExecutionProvider"] > 5
    assert parity.first_difference is None
    assert 0 < parity.scores_max_abs < 1e-5
    assert path.exists()


def test_model_left_in_train_mode(model, path, raw):
    training = copy.deepcopy(model)
    training.body[1].train()
    failed(training, path, raw, r"train mode: 'body.1' \(BatchNorm2d\).*call model.eval\(\) first")


def test_file_that_trains(model, path, raw):
    def to_dropout(proto):
        last = node(proto, "layer_norm")
        last.output[0] = "undropped"
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.5, np.float32), "ratio"))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "training"))
        dropout = onnx.helper.make_node("Dropout", ["undropped", "ratio", "training"], ["layer_norm"], name="drop")
        proto.graph.node.insert(list(proto.graph.node).index(last) + 1, dropout)

    failed(model, changed(path, to_dropout), raw, r"node 'drop' \(Dropout, .*behaves as in training")


@pytest.mark.parametrize("change", [{"mean": MEAN + 2}, {"std": np.array([60.0, 55.0, 50.0], np.float32)}])
def test_preprocessing_constants(model, tensors, tmp_path, raw, change):
    path = write(tensors, tmp_path / "model.onnx", front(**change))
    written = failed(model, path, raw, r"preprocessing in front of the model gives another 'input' than in training")
    found = written["first_difference"]
    assert (found["part"], found["output"], found["node"]) == ("preprocessing", "input", "image/input")
    assert found["after"] > 1e-2
    assert f"the worst is sample {written['worst_sample']['index']}" in written["failure"]


def test_labels_permuted_in_the_metadata(model, path, raw):
    def permute(proto):
        entry = next(entry for entry in proto.metadata_props if entry.key == "pyft.classes")
        entry.value = json.dumps([CLASSES[i] for i in (1, 0, 2, 3)])

    failed(model, changed(path, permute), raw, r"carries the classes \['tulip', 'rose', .*expected \['rose', 'tulip'")


def test_labels_permuted_in_the_output(model, tensors, tmp_path, raw):
    path = write(tensors, tmp_path / "model.onnx", classes=[CLASSES[i] for i in (1, 0, 2, 3)])
    failed(model, path, raw, r"output 'label' names '(\w+)' for sample \d+, where index \d stands for .*permuted")


def test_label_index_of_another_axis(model, path, raw):
    def smallest(proto):
        next(node for node in proto.graph.node if node.op_type == "ArgMax").op_type = "ArgMin"

    failed(model, changed(path, smallest), raw, r"output 'label_index' is \d for sample \d+, whose logits are \[")


def test_scores_that_are_no_softmax(model, path, raw):
    def sigmoid(proto):
        last = next(node for node in reversed(proto.graph.node) if node.op_type == "Softmax")
        last.op_type = "Sigmoid"
        del last.attribute[:]

    failed(model, changed(path, sigmoid), raw, r"output 'scores' is \[.*for sample \d+, whose logits are \[")


def test_layer_of_the_model_replaced(model, path, raw):
    other = copy.deepcopy(model)
    torch.manual_seed(7)
    other.body[0] = nn.Conv2d(8, 16, 3, padding=1).eval()
    written = failed(other, path, raw, r"values differ first at node '\w+' \(Conv, output '\w+', module 'body\.")
    assert written["first_difference"]["before"] < 1e-5
    assert written["first_difference"]["after"] > 1e-2


def test_weights_of_the_file_changed(model, path, raw):
    def nudge(weights):
        weights[2, 3] += 0.05
        return weights

    changed(path, lambda proto: set_array(proto, "head.weight", nudge))
    written = failed(model, path, raw, r"differ first at node 'node_linear' \(Gemm, output 'logits', module 'head'\)")
    assert written["first_difference"]["before"] < 1e-5 < written["first_difference"]["after"]


def test_op_of_the_file_changed(model, path, raw):
    def to_sigmoid(proto):
        found = next(node for node in proto.graph.node if "gelu" in node.output[0])
        found.op_type = "Sigmoid"
        del found.attribute[:]

    written = failed(
        model, changed(path, to_sigmoid), raw, r"first at node '\w+' \(Sigmoid, output 'gelu', module 'bod"
    )
    assert written["first_difference"]["module"] == "body.2"


def test_batch_fixed_at_one_in_the_input(model, path, raw):
    def fix(proto):
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1

    failed(model, changed(path, fix), raw, r"does not run on a batch of 16: input 'image' must have shape \(1, ")


def test_batch_fixed_at_one_inside(model, path, raw):
    def fix(proto):
        last = node(proto, "layer_norm")
        last.output[0] = "loose"
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 16]), "one"))
        made = onnx.helper.make_node("Reshape", ["loose", "one"], ["layer_norm"], name="fixed_batch")
        proto.graph.node.insert(list(proto.graph.node).index(last) + 1, made)

    failed(model, changed(path, fix), raw, r"does not run on a batch of 16: .*Reshape.*fixed_batch")


def test_provider_that_is_not_there(model, path, raw):
    failed(
        model, path, raw, r"provider='CUDAExecutionProvider': .* give one of these", provider="CUDAExecutionProvider"
    )


def test_provider_that_did_not_start(model, path, raw):
    opened = OnnxModel(path)
    with pytest.raises(ExportError, match="CUDAExecutionProvider was asked for, but onnxruntime runs CPUExecutionProv"):
        check(model, opened, raw, provider="CUDAExecutionProvider")


def test_provider_that_started_and_ran_nothing(model, path, raw):
    import onnxruntime

    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no provider that starts and runs nothing")
    failed(
        model,
        path,
        raw,
        "Azure.* ran no node of the graph: CPUExecutionProvider \\d+ nodes",
        provider="AzureExecutionProvider",
    )


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_file(model, path, raw, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    failed(model, path, raw, "damaged, cut short")
