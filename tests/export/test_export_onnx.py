"""Export of MLP, CNN, LSTM and GRU: eval mode, free dimensions, metadata, one quiet whole file."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from pyft.export.onnx import export_module
from pyft.export.run import OnnxModel
from pyft.version import __version__

onnx = pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")

CLASSES = ["grün", "red", "blue"]


class Recurrent(nn.Module):
    def __init__(self, layer, bidirectional):
        super().__init__()
        self.rnn = layer(5, 8, num_layers=2, batch_first=True, bidirectional=bidirectional, dropout=0.3)
        self.head = nn.Linear(16 if bidirectional else 8, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))


class Tokens(nn.Module):
    """Takes a dict, gives an object with `.logits`."""

    class Output:
        def __init__(self, logits):
            self.logits = logits

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.unsqueeze(-1).to(torch.float32)
        hidden = self.dropout(self.embedding(input_ids)) * mask
        return self.Output(self.head(hidden.sum(1) / mask.sum(1).clamp(min=1)))


def mlp():
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout2d(0.3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, 3),
    )


def tokens(rows, length):
    ids = torch.randint(0, 50, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, (length + 1) // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


# name: (build, example, inputs of a batch size and length, whether the length is free)
MODELS = {
    "mlp": (mlp, lambda b, t: torch.randn(b, 4), False),
    "cnn": (cnn, lambda b, t: torch.randn(b, 3, 16, 16), False),
    "lstm": (lambda: Recurrent(nn.LSTM, True), lambda b, t: torch.randn(b, t, 5), True),
    "gru": (lambda: Recurrent(nn.GRU, False), lambda b, t: torch.randn(b, t, 5), True),
    "tokens": (Tokens, tokens, True),
}


class Exported:
    def __init__(self, name, folder):
        torch.manual_seed(0)
        build, self.make, self.free_length = MODELS[name]
        self.model = build().train()
        self.example = self.make(4, 6)
        if not isinstance(self.example, dict):
            # Statistics that differ from those of a fresh layer, so that train mode cannot pass for eval.
            with torch.no_grad():
                for _ in range(3):
                    self.model(self.example * 2 + 1)
        part = next(iter(self.model.children()))
        part.eval()
        self.modes = {m: m.training for m in self.model.modules()}
        self.state = copy.deepcopy(self.model.state_dict())
        rng = torch.get_rng_state()
        # A lone sample is what a careless caller has; the batch must be free all the same.
        lone = {k: v[:1] for k, v in self.example.items()} if isinstance(self.example, dict) else self.example[:1]
        self.path = export_module(
            self.model, lone, folder / f"{name}.onnx", classes=CLASSES, metadata={"weights": "abc", "epochs": 3}
        )
        self.same_rng = torch.equal(rng, torch.get_rng_state())
        self.session = OnnxModel(self.path)
        self.proto = onnx.load(self.path)

    def reference(self, inputs):
        model = copy.deepcopy(self.model).eval()
        with torch.no_grad():
            output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        return (output.logits if hasattr(output, "logits") else output).numpy()


@pytest.fixture(scope="module", params=list(MODELS))
def exported(request, tmp_path_factory):
    return Exported(request.param, tmp_path_factory.mktemp("exported"))


@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_any_batch_size_gives_the_eval_logits(exported, rows):
    inputs = exported.make(rows, 6)
    expected = exported.reference(inputs)
    np.testing.assert_allclose(exported.session(inputs), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("exported", ["lstm", "gru", "tokens"], indirect=True)
@pytest.mark.parametrize("length", [1, 2, 6, 19])
def test_any_length_where_the_model_allows_it(exported, length):
    inputs = exported.make(3, length)
    expected = exported.reference(inputs)
    np.testing.assert_allclose(exported.session(inputs), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_train_mode_would_have_been_noticed(exported):
    torch.manual_seed(1)
    model = copy.deepcopy(exported.model).train()
    inputs = exported.make(8, 6)
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    trained = (output.logits if hasattr(output, "logits") else output).detach().numpy()
    assert np.abs(trained - exported.reference(inputs)).max() > 1e-3


def test_model_is_left_as_it_was(exported):
    assert {m: m.training for m in exported.model.modules()} == exported.modes
    assert set(exported.modes.values()) == {True, False}
    for name, value in exported.model.state_dict().items():
        assert torch.equal(value, exported.state[name]), name
    assert exported.same_rng


@pytest.mark.parametrize("exported", ["lstm", "gru"], indirect=True)
def test_recurrent_weights_are_still_the_parameters(exported):
    rnn = exported.model.rnn
    assert rnn._flat_weights[0] is rnn.weight_ih_l0
    assert type(rnn.weight_ih_l0) is nn.Parameter
    exported.model(exported.example).sum().backward()
    assert rnn.weight_ih_l0.grad.abs().sum() > 0
    exported.model.zero_grad()


def test_graph_is_valid_and_does_not_train(exported):
    onnx.checker.check_model(exported.proto, full_check=True)
    for node in exported.proto.graph.node:
        assert node.op_type != "Dropout"
        assert not any(a.name == "training_mode" and a.i for a in node.attribute)
        assert not node.op_type.startswith("Random")


def test_names_and_free_dimensions(exported):
    expected = ["input_ids", "attention_mask"] if isinstance(exported.example, dict) else ["input"]
    assert [value.name for value in exported.session.inputs] == expected
    for value in exported.session.inputs:
        assert value.shape[0] == "batch"
        assert ("sequence" in value.shape) == exported.free_length
    assert [(value.name, value.shape) for value in exported.session.outputs] == [
        ("logits", ("batch", 3)), ("scores", ("batch", 3)), ("label_index", ("batch",)), ("label", ("batch",)),
    ]  # fmt: skip
    assert exported.session.meta.notes == []


def test_weights_keep_their_names(exported):
    names = {value.name for value in exported.proto.graph.initializer}
    head = [name for name in exported.state if name.endswith(("head.bias", "4.bias", "7.bias"))]
    assert names & set(head)
    assert not any(name.startswith("model.") for name in names)


def test_metadata(exported):
    meta = exported.session.meta
    assert meta.classes == CLASSES
    assert meta.task == "classification"
    assert meta.kind == {"cnn": "image", "tokens": "text"}.get(exported.path.stem, "array")
    assert meta.extra["pyft.format"] == "2"
    assert meta.versions == {"pyft": __version__, "torch": torch.__version__, "onnx": onnx.__version__}
    assert meta.extra["weights"] == "abc"
    assert json.loads(meta.extra["epochs"]) == 3
    described = json.loads(meta.extra["pyft.inputs"])
    assert [d["name"] for d in described] == [v.name for v in exported.session.inputs]
    assert described[0]["dtype"] == ("int64" if exported.path.stem == "tokens" else "float32")
    assert described[0]["shape"] == list(exported.session.inputs[0].shape)


def test_one_file_without_traces_of_this_machine(exported):
    others = [p.name for p in exported.path.parent.iterdir() if p != exported.path]
    assert others == []
    content = exported.path.read_bytes()
    assert b"site-packages" not in content
    assert b"/tests/" not in content


EXPORT = textwrap.dedent(
    """
    import sys, torch
    from pyft.export.onnx import export_module
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 2), torch.nn.AdaptiveAvgPool1d(1), torch.nn.Flatten())
    example = torch.randn(2, 3, 8)
    export_module(model, example, sys.argv[1], classes=["a", "b", "c", "d"], preprocess={"kind": "array"})
    """
)


def test_same_model_same_bytes_and_not_a_word(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "here.onnx")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(EXPORT, {})
        exec(EXPORT.replace("sys.argv[1]", f"{str(tmp_path / 'again.onnx')!r}"), {})
    assert capfd.readouterr() == ("", "")
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path / "there.onnx")],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert (done.stdout, done.stderr) == ("", "")
    here, again, there = ((tmp_path / f"{name}.onnx").read_bytes() for name in ("here", "again", "there"))
    assert here == again
    assert here == there


def test_length_of_a_convolution_is_its_last_dimension(tmp_path):
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    session = OnnxModel(export_module(model, torch.randn(2, 3, 8), tmp_path / "m.onnx"))
    assert session.inputs[0].shape == ("batch", 3, "sequence")
    x = torch.randn(2, 3, 21)
    np.testing.assert_allclose(session(x), model(x).detach().numpy(), atol=1e-6)


def test_fixed_length_is_said_and_recorded(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.warns(UserWarning, match="dimension 1 of 'input' is fixed at 3"):
        session = OnnxModel(export_module(model, torch.randn(2, 3, 4), tmp_path / "m.onnx"))
    assert session.inputs[0].shape == ("batch", 3, 4)
    assert "fixed at 3" in session.meta.notes[0]


def test_length_that_only_the_exporter_fixes_is_said_and_recorded(tmp_path):
    class Looped(nn.Module):
        def forward(self, x):
            total = torch.zeros_like(x[:, 0])
            for step in range(x.shape[1]):
                total = total * 0.5 + x[:, step]
            return total

    with pytest.warns(UserWarning, match="fixed at 4: it cannot be exported free: forward fixes dimension 1"):
        session = OnnxModel(export_module(Looped(), torch.randn(2, 4, 3), tmp_path / "m.onnx"))
    assert session.inputs[0].shape == ("batch", 4, 3)
    x = torch.randn(5, 4, 3)
    np.testing.assert_allclose(session(x), Looped()(x).numpy(), atol=1e-6)


def test_sizes_that_are_alike_are_not_taken_for_one(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    session = OnnxModel(export_module(model, torch.randn(2, 2), tmp_path / "m.onnx"))
    assert session.inputs[0].shape == ("batch", 2)


def test_tied_weights_are_stored_once(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    path = export_module(model, torch.randn(2, 64), tmp_path / "m.onnx")
    assert path.stat().st_size < 1.5 * 64 * 64 * 4


def test_preprocess_and_task_words(tmp_path):
    spec = {"kind": "image", "size": 8, "mean": [0.5, 0.5, 0.5]}
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    path = export_module(model, torch.rand(2, 3, 8, 8), tmp_path / "m.onnx", task="image-multilabel", preprocess=spec)
    meta = OnnxModel(path).meta
    assert (meta.task, meta.kind, meta.preprocess, meta.classes) == ("multilabel", "image", spec, None)


def test_logging_and_warnings_are_given_back(tmp_path):
    logger = logging.getLogger("torch")
    before = (logger.level, list(warnings.filters), random.getstate(), torch.get_num_threads())
    child = logging.getLogger("onnxscript.optimizer")
    child.setLevel(logging.INFO)
    export_module(nn.Linear(2, 2), torch.randn(1, 2), tmp_path / "m.onnx")
    assert (logger.level, list(warnings.filters), random.getstate(), torch.get_num_threads()) == before
    assert child.level == logging.INFO
    child.setLevel(logging.NOTSET)
