"""The first node that differs is named, whatever kind of value it makes and however the graph was changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")
onnx = pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")

from proof_models import net, pictures, preprocess, tokenizer_json  # noqa: E402

from pyft.export.bisect import _Search, first_difference  # noqa: E402
from pyft.export.graph import put_before  # noqa: E402
from pyft.export.onnx import export_module  # noqa: E402
from pyft.export.parity import check_parity  # noqa: E402
from pyft.export.raw_text import text_front  # noqa: E402
from pyft.export.reference import graph_values, reference_of  # noqa: E402
from pyft.samples import Batch  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return net()


@pytest.fixture(scope="module")
def x():
    return preprocess(pictures(6))


@pytest.fixture(scope="module")
def good(model, x, tmp_path_factory):
    return export_module(model, x, tmp_path_factory.mktemp("bisect") / "model.onnx")


@pytest.fixture(scope="module")
def reference(model, x):
    return reference_of(model, x)


@pytest.fixture(autouse=True)
def _exported_once(reference, model, monkeypatch):
    """The exporter takes seconds, and gives the same each time."""
    import pyft.export.reference as module

    REFERENCES[id(model)] = reference
    monkeypatch.setattr(module, "reference_of", lambda m, x: REFERENCES.get(id(m)) or reference_of(m, x))


REFERENCES: dict[int, object] = {}


def insert_behind(proto, name, nodes, arrays=()):
    """Put nodes behind the value `name`; they take "before" and give `name`."""
    place, maker = next((i, node) for i, node in enumerate(proto.graph.node) if name in node.output)
    maker.output[list(maker.output).index(name)] = "before"
    for node in reversed(nodes):
        proto.graph.node.insert(place + 1, node)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, key) for key, array in arrays)


def find(model, good, x, tmp_path, change, row=2):
    proto = onnx.load(good)
    change(proto)
    path = tmp_path / "changed.onnx"
    path.write_bytes(proto.SerializeToString())
    return first_difference(model, path, x, x.numpy(), row)


def test_values_by_name_are_those_of_forward_hooks(model, x, reference):
    seen = {}
    hooks = [
        part.register_forward_hook(lambda part, given, output, name=name: seen.__setitem__(name, output))
        for name, part in model.named_modules()
        if name in ("stem.2", "body.2", "norm", "head")
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    values = reference.torch_values(x)
    for name, value in (("stem.2", "hardtanh"), ("body.2", "gelu"), ("norm", "layer_norm"), ("head", "logits")):
        assert reference.modules[value] == name
        np.testing.assert_array_equal(values[value], seen[name].detach().numpy())
    found = graph_values(reference.proto, ["gelu", "logits"], {"input": x}, "CPUExecutionProvider")
    np.testing.assert_allclose(found["gelu"], seen["body.2"].detach().numpy(), atol=1e-5)


def test_good_file_has_no_difference(model, good, x):
    # BatchNorm is folded into the convolution in front, whose own value is then another than in PyTorch.
    assert first_difference(model, good, x, x.numpy()) is None
    assert first_difference(model, good, x, x.numpy(), 3) is None


@pytest.mark.parametrize(("value", "module"), [("hardtanh", "stem.2"), ("gelu", "body.2"), ("softmax", "")])
def test_every_place_of_the_graph(model, good, x, tmp_path, value, module):
    def change(proto):
        insert_behind(proto, value, [onnx.helper.make_node("Exp", ["before"], [value], name="power")])

    found = find(model, good, x, tmp_path, change)
    assert (found.output, found.op_type, found.node, found.module) == (value, "Exp", "power", module)
    assert found.part == "model"
    assert found.before < 1e-5
    assert found.after > 0.1
    assert f"module {module!r}" in str(found) or not module


def test_value_that_pytorch_does_not_have(tmp_path):
    # A Linear on (B, T, F) becomes MatMul and Add, and PyTorch has the sum only.
    torch.manual_seed(0)
    steps, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval(), torch.randn(2, 5, 6)
    path = export_module(steps, x, tmp_path / "steps.onnx")
    matmul = [node for node in onnx.load(path).graph.node if node.op_type == "MatMul"][1]
    assert matmul.output[0] not in reference_of(steps, x).torch_values(x)

    def change(proto):
        made = onnx.helper.make_node("Exp", ["before"], [matmul.output[0]], name="power")
        insert_behind(proto, matmul.output[0], [made])

    # The value of the new graph is not used, as another operator makes it; the sum behind it is PyTorch's.
    found = find(steps, path, x, tmp_path, change, row=None)
    assert (found.op_type, found.output, found.module) == ("Add", "logits", "2")
    assert found.before < 1e-5

    def scale(proto):
        weight = next(value for value in proto.graph.initializer if value.name == matmul.input[1])
        weight.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), weight.name))

    # The same operator and inputs: this value can be held against that of the new graph.
    found = find(steps, path, x, tmp_path, scale, row=None)
    assert (found.op_type, found.output, found.module) == ("MatMul", matmul.output[0], "2")
    assert found.before < 1e-5


def test_fault_of_a_batch_only(model, good, x, tmp_path):
    def mix(proto):
        # Nothing at a batch of one: value + (value - mean over the batch).
        insert_behind(
            proto, "layer_norm",
            [
                onnx.helper.make_node("ReduceMean", ["before", "axis"], ["mean_of_all"], name="mean_of_all"),
                onnx.helper.make_node("Sub", ["before", "mean_of_all"], ["off"], name="off"),
                onnx.helper.make_node("Add", ["before", "off"], ["layer_norm"], name="mixing"),
            ],
            [("axis", np.array([0]))],
        )  # fmt: skip

    assert find(model, good, x, tmp_path, mix).node == "mixing"


def test_one_value_at_a_time_finds_the_same(model, good, x, tmp_path, reference):
    proto = onnx.load(good)
    insert_behind(proto, "gelu", [onnx.helper.make_node("Neg", ["before"], ["gelu"], name="negated")])
    search = _Search(reference, proto, x, {"input": x}, "CPUExecutionProvider")
    order = [name for node in proto.graph.node for name in node.output if name in search.compared]
    found = search._with_fusions(order)
    assert (found.node, found.output) == ("negated", "gelu")
    assert found.before < 1e-5
    assert found.after > 1


def test_nan_in_the_middle(model, good, x, tmp_path):
    def spoil(proto):
        insert_behind(proto, "gelu", [onnx.helper.make_node("Mul", ["before", "nan"], ["gelu"], name="spoilt")],
                      [("nan", np.array(np.nan, np.float32))])  # fmt: skip

    found = find(model, good, x, tmp_path, spoil)
    assert (found.node, found.after) == ("spoilt", float("inf"))


def test_other_input_than_the_model_is_given(model, good, x):
    found = first_difference(model, good, x, x.numpy() * 1.5)
    assert found.part == "input"
    assert "the file's input 'input' is not what the model is given" in str(found)


class Bag(nn.Module):
    """Mean of the tokens that the mask leaves."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        weights = attention_mask.unsqueeze(-1).float()
        return self.head((self.table(input_ids) * weights).sum(1) / weights.sum(1))


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    """A model of tokens and mask, an example, and its file."""
    torch.manual_seed(0)
    made, ids = Bag().eval(), torch.tensor([[5, 6, 0, 0], [7, 8, 9, 4]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    REFERENCES[id(made)] = reference_of(made, inputs)
    return made, inputs, export_module(made, inputs, tmp_path_factory.mktemp("bag") / "bag.onnx")


@pytest.mark.parametrize("pad_id", [0, 3])
def test_mask_made_in_front(bag, tmp_path, pad_id):
    made, inputs, tensors = bag
    proto = onnx.load(tensors)
    spec = {"kind": "text", "pad_id": pad_id, "tokenizer": tokenizer_json(["a", "b"])}
    put_before(proto, text_front(spec, list(inputs)))
    path = tmp_path / "raw.onnx"
    path.write_bytes(proto.SerializeToString())
    found = first_difference(made, path, inputs, {"input_ids": inputs["input_ids"].numpy()}, 0)
    if pad_id == 0:
        assert found is None
    else:
        assert (found.part, found.output, found.node) == ("preprocessing", "attention_mask", "text/attention_mask")


def test_file_that_does_not_run_gives_nothing(model, x, tmp_path):
    other = export_module(nn.Flatten(), torch.zeros(2, 3, 4, 4), tmp_path / "other.onnx")
    assert first_difference(model, other, x, x.numpy()) is None


class Unexportable(nn.Module):
    """Branches on values."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        x = self.head(x.mean((2, 3)))
        return x if x.sum() > 0 else -x


def test_failure_is_told_where_its_cause_cannot_be_looked_for(good, x):
    batch = Batch(x, None, torch.arange(len(x)))
    module = Unexportable().eval()
    parity = check_parity(module, good, [batch], module=module, raises=False)
    assert "predictions differ" in parity.failure
    assert "the first node that differs could not be looked for: " in parity.failure
    assert parity.first_difference is None
