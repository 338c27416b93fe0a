"""Running an ONNX file: what it takes, what it refuses, and that it needs no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pyft.errors import ConfigError, ExportError, MissingExtraError
from pyft.export.onnx import export_module
from pyft.export.run import OnnxModel, default_threads

onnx = pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 4)

    def forward(self, input_ids, attention_mask):
        return (self.embedding(input_ids) * attention_mask.unsqueeze(-1)).sum(1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Pooled()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory) -> Path:
    example = {"input_ids": torch.randint(0, 30, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    target = tmp_path_factory.mktemp("run") / "text.onnx"
    return export_module(model, example, target, classes=["a", "b", "c", "d"], preprocess={"kind": "text"})


@pytest.fixture(scope="module")
def lone_path(tmp_path_factory) -> Path:
    return export_module(nn.Linear(3, 2), torch.randn(2, 3), tmp_path_factory.mktemp("run") / "array.onnx")


@pytest.fixture
def inputs():
    return {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.array([[1, 1, 0]])}


def test_tensors_arrays_and_narrow_integers_give_the_same(path, model, inputs):
    session = OnnxModel(path)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    expected = model(**tensors).detach().numpy()
    for given in (inputs, tensors, {name: value.astype(np.int32) for name, value in inputs.items()}):
        np.testing.assert_allclose(session(given), expected, atol=1e-6)
    backwards = dict(reversed(list(inputs.items())))
    np.testing.assert_allclose(session(backwards), expected, atol=1e-6)


def test_lone_input_needs_no_name(lone_path):
    session = OnnxModel(lone_path)
    x = torch.randn(5, 3, requires_grad=True)
    np.testing.assert_array_equal(session(x), session({"input": x.detach().numpy()}))
    turned = np.asfortranarray(x.detach().numpy())
    np.testing.assert_array_equal(session(turned), session(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["input_ids"], "takes a dict with the inputs input_ids, attention_mask, got one array"),
        (lambda d: {"input_ids": d["input_ids"]}, "takes the inputs input_ids, attention_mask, got input_ids"),
        (lambda d: {**d, "extra": d["input_ids"]}, "got input_ids, attention_mask, extra"),
        (lambda d: {}, "got none"),
        (lambda d: {**d, "input_ids": d["input_ids"].astype(np.float32)}, "'input_ids' must be int64, got float32"),
        (lambda d: {**d, "input_ids": d["input_ids"].astype(np.uint64)}, "'input_ids' must be int64, got uint64"),
        (
            lambda d: {**d, "input_ids": d["input_ids"][0]},
            r"'input_ids' must have shape \(batch, sequence\), got \(3\)",
        ),
        (lambda d: {**d, "input_ids": np.ones((2, 3), np.int64)}, r"one batch size, got \[1, 2\]"),
        (lambda d: {name: value[:0] for name, value in d.items()}, "holds no sample"),
    ],
)
def test_inputs_that_do_not_fit(path, inputs, change, message):
    with pytest.raises(ConfigError, match=message):
        OnnxModel(path)(change(inputs))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 3)), "'input' must be float32, got float64"),
        (np.zeros((2, 3), np.uint8), "'input' must be float32, got uint8"),
        (np.zeros((2, 4), np.float32), r"shape \(batch, 3\), got \(2, 4\)"),
    ],
)
def test_array_that_does_not_fit(lone_path, given, message):
    with pytest.raises(ConfigError, match=message):
        OnnxModel(lone_path)(given)


def test_failure_inside_onnxruntime_is_named(path, inputs):
    inputs["input_ids"][0, 0] = 9999
    with pytest.raises(ExportError, match=r"text.onnx failed in onnxruntime on input_ids \(1, 3\)"):
        OnnxModel(path)(inputs)


def test_missing_file(tmp_path):
    with pytest.raises(ExportError, match=r"no ONNX file at .*none.onnx"):
        OnnxModel(tmp_path / "none.onnx")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file(path, tmp_path, share):
    content = path.read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ExportError, match=r"cut.onnx \(.* bytes\) cannot be opened: it is damaged, cut short"):
        OnnxModel(cut)


def test_file_that_is_something_else(tmp_path):
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(b"PK\x03\x04 this is a zip, or so it seems" * 20)
    with pytest.raises(ExportError, match="damaged, cut short or not ONNX"):
        OnnxModel(wrong)


def test_damaged_metadata(path, tmp_path):
    proto = onnx.load(path)
    next(p for p in proto.metadata_props if p.key == "pyft.classes").value = '["a", '
    onnx.save(proto, tmp_path / "bad.onnx")
    with pytest.raises(ExportError, match=r"bad.onnx: the metadata entry pyft.classes is not JSON"):
        OnnxModel(tmp_path / "bad.onnx")


def test_file_of_another_exporter_has_no_meta(path, tmp_path):
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "plain.onnx")
    meta = OnnxModel(tmp_path / "plain.onnx").meta
    assert (meta.task, meta.kind, meta.classes, meta.preprocess, meta.notes) == ("", "", None, None, [])


def test_provider_that_is_not_there_is_an_error(path):
    with pytest.raises(ExportError, match=r"has no NoSuchExecutionProvider here; it has .*CPUExecutionProvider"):
        OnnxModel(path, provider="NoSuchExecutionProvider")


def test_provider_that_does_not_start_is_an_error(path, monkeypatch):
    import onnxruntime

    # The name is accepted, and then onnxruntime goes on with the CPU, as it does where CUDA cannot start.
    there = onnxruntime.get_available_providers()
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", *there])
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, sess_options, providers: real(path, sess_options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(ExportError, match="CUDAExecutionProvider did not start, onnxruntime would run CPU"):
        OnnxModel(path, provider="CUDAExecutionProvider")


def test_provider_and_threads(path):
    session = OnnxModel(path, threads=1)
    assert session.provider == "CPUExecutionProvider"
    assert session.session.get_providers() == ["CPUExecutionProvider"]
    assert session.session.get_session_options().intra_op_num_threads == 1
    assert OnnxModel(path).session.get_session_options().intra_op_num_threads == torch.get_num_threads()
    assert default_threads() == torch.get_num_threads()
    options = session.session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_missing_onnxruntime_names_the_extra(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"'onnxruntime'.*pyft\[onnx\]"):
        OnnxModel(path)


def test_runs_without_torch_and_onnx(path, model, tmp_path):
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript', 'transformers'): sys.modules[name] = None\n"
        "import numpy as np\n"
        "from pyft.export.run import OnnxModel, default_threads\n"
        "model = OnnxModel(sys.argv[1])\n"
        "assert model.meta.classes == ['a', 'b', 'c', 'd']\n"
        "assert default_threads() >= 1\n"
        "x = np.array([[1, 2, 3]])\n"
        "np.save(sys.argv[2], model({'input_ids': x, 'attention_mask': np.ones_like(x)}))\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "logits.npy")],
        check=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ids = torch.tensor([[1, 2, 3]])
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), model(ids, torch.ones_like(ids)).detach(), atol=1e-6)
