"""Weights that are computed at each call become plain ones in the file; the user's model stays as it is."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

onnx = pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")

from pyft.export.onnx import export_module  # noqa: E402
from pyft.export.plain_weights import plain_weights  # noqa: E402
from pyft.export.run import OnnxModel  # noqa: E402


def pruned(layer: nn.Linear) -> nn.Linear:
    return prune.l1_unstructured(layer, "weight", 0.5)


WAYS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm of old": nn.utils.weight_norm,
    "spectral_norm of old": nn.utils.spectral_norm,
    "pruning": pruned,
}


@pytest.mark.parametrize("way", list(WAYS))
def test_parametrisations_are_folded(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(WAYS[way](nn.Linear(40, 40)), nn.ReLU(), nn.Linear(40, 2))
    x = torch.randn(3, 40)
    # Under autograd the weight is left behind with its history.
    model(x).sum().backward()
    model.eval()
    before = copy.deepcopy(model.state_dict())
    classes = [type(part) for part in model.modules()]
    expected = model(x).detach().numpy()
    path = export_module(model, x, tmp_path / "m.onnx")
    graph = onnx.load(path).graph
    assert [node.op_type for node in graph.node] == ["Gemm", "Relu", "Gemm"]
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    assert set(stored) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert stored["0.weight"].tobytes() == model[0].weight.detach().numpy().tobytes()
    np.testing.assert_allclose(OnnxModel(path)(x), expected, atol=1e-6)
    assert [type(part) for part in model.modules()] == classes
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    np.testing.assert_array_equal(model(x).detach().numpy(), expected)


def test_the_copy_shares_what_is_not_folded() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    copied = plain_weights(model)
    assert copied is not model
    assert copied[1].weight.data_ptr() == model[1].weight.data_ptr()
    assert not parametrize.is_parametrized(copied[0])
    assert parametrize.is_parametrized(model[0])
    plain = nn.Linear(2, 2)
    assert plain_weights(plain) is plain


def test_weights_that_are_folded_and_tied_stay_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = parametrizations.weight_norm(nn.Linear(40, 40))
    model = nn.Sequential(layer, nn.ReLU(), layer)
    path = export_module(model, torch.randn(2, 40), tmp_path / "m.onnx")
    assert len([t for t in onnx.load(path).graph.initializer if t.dims == [40, 40]]) == 1


@pytest.mark.parametrize("state", ["fresh", "merged", "disabled"])
def test_lora_is_merged_on_a_copy(state: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3))
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
    layer = model.base_model.model[0]
    plain = layer.get_base_layer().weight.detach().clone()
    delta = layer.get_delta_weight("default").detach()
    if state == "merged":
        model.merge_adapter()
    if state == "disabled":
        model.disable_adapter_layers()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 20)
    expected = model(x).detach().numpy()
    path = export_module(model, x, tmp_path / "m.onnx")
    graph = onnx.load(path).graph
    assert [node.op_type for node in graph.node] == ["Gemm", "Relu", "Gemm"]
    assert not [t.name for t in graph.initializer if "lora" in t.name]
    [stored] = [onnx.numpy_helper.to_array(t) for t in graph.initializer if list(t.dims) == [20, 20]]
    wanted = plain if state == "disabled" else plain + delta
    np.testing.assert_allclose(stored, wanted.numpy(), atol=1e-7)
    np.testing.assert_allclose(OnnxModel(path)(x), expected, atol=1e-6)
    assert layer.merged is (state == "merged")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rows_in_training_are_plain_weights(tmp_path: Path) -> None:
    import pyft

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    pyft.train_only(model[0], rows=[1, 5])
    x = torch.randn(4, 40)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    path = export_module(model, x, tmp_path / "m.onnx")
    graph = onnx.load(path).graph
    assert [node.op_type for node in graph.node] == ["Gemm", "Relu", "Gemm"]
    np.testing.assert_allclose(OnnxModel(path)(x), model.eval()(x).detach().numpy(), atol=1e-5)
    [stored] = [t.raw_data for t in graph.initializer if list(t.dims) == [40, 40]]
    assert stored == model[0].weight.detach().numpy().tobytes()
