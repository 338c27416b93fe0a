"""The proof finds every fault that was put in, and names the worst sample."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.special import softmax as scipy_softmax
from torch import nn

from pyft.errors import ConfigError, DataError, ExportError
from pyft.export.onnx import export_module
from pyft.export.parity import check_parity, relative_difference
from pyft.export.run import OnnxModel
from pyft.samples import Batch

pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")

CLASSES = ["a", "b", "c", "d"]


def build():
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build().eval()


@pytest.fixture(scope="module")
def data():
    return torch.randn(101, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def good(model, tmp_path_factory):
    return export_module(model, torch.randn(2, 6), tmp_path_factory.mktemp("parity") / "model.onnx", classes=CLASSES)


@pytest.fixture
def path(good, tmp_path):
    return shutil.copy(good, tmp_path / "model.onnx")


def batches(x, size=16, first=1000):
    for start in range(0, len(x), size):
        stop = min(start + size, len(x))
        yield Batch(x[start:stop], None, torch.arange(first + start, first + stop))


def test_whole_set_is_compared_in_a_stream(model, path, data, tmp_path):
    sizes, live = [], []

    def call(x):
        sizes.append(len(x))
        return model(x)

    def watched():
        for batch in batches(data):
            live.append(len(batch.index))
            yield batch

    parity = check_parity(call, path, watched(), report=tmp_path / "parity.json")
    assert parity.passed
    assert parity.failure is None
    assert parity.num_samples == 101
    assert parity.agreement == 1
    assert parity.batch_sizes == (1, 2, 7)
    assert sizes == [16, 1, 2, 7, 16, 16, 16, 16, 16, 5]
    assert live == [16] * 6 + [5]
    assert 0 <= parity.mean_abs <= parity.max_abs < 1e-5
    assert parity.max_rel < 1e-5
    assert 1000 <= parity.worst_sample["index"] < 1101
    written = json.loads((tmp_path / "parity.json").read_text())
    assert written == json.loads(json.dumps(parity.to_dict()))
    assert written["provider"] == "CPUExecutionProvider"
    assert "agree" in str(parity)


def test_onnx_runs_in_every_batch_size(model, path, data):
    session = OnnxModel(path)
    seen = []

    class Watched(OnnxModel):
        def __init__(self):
            self.path, self.meta, self.provider = session.path, session.meta, session.provider

        def __call__(self, inputs):
            seen.append(len(inputs))
            return session(inputs)

    check_parity(model, Watched(), batches(data[:3]))
    assert seen == [3, 1, 2, 7]


def spoil_head_rows(model):
    with torch.no_grad():
        model[4].weight.copy_(model[4].weight[[1, 0, 2, 3]])
        model[4].bias.copy_(model[4].bias[[1, 0, 2, 3]])


def spoil_layer(model):
    torch.manual_seed(5)
    model[0] = nn.Linear(6, 32)


def spoil_slightly(model):
    with torch.no_grad():
        model[4].bias[2] += 1e-3


def spoil_statistics(model):
    model[1].running_mean += 0.5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_head_rows, r"of 101 predictions differ"),
        (spoil_layer, r"of 101 predictions differ"),
        (spoil_statistics, r"predictions differ|relative difference"),
        (spoil_slightly, r"relative difference is \d.*e-0\d, above 1e-04|predictions differ"),
    ],
)
def test_model_that_is_not_the_one_exported(model, path, data, tmp_path, spoil, message):
    other = copy.deepcopy(model)
    spoil(other)
    with torch.no_grad():
        error = (other(data) - model(data)).abs().max(1).values
    content = path.read_bytes()
    with pytest.raises(ExportError, match=message) as raised:
        check_parity(other, path, batches(data), report=tmp_path / "parity.json")
    assert f"the worst is sample {1000 + int(error.argmax())}, output" in str(raised.value) or spoil is spoil_slightly
    assert not path.exists()
    kept = tmp_path / "model.failed.onnx"
    assert str(kept) in str(raised.value)
    assert kept.read_bytes() == content
    written = json.loads((tmp_path / "parity.json").read_text())
    assert written["passed"] is False
    assert written["kept"] == str(kept)
    assert written["max_abs"] == pytest.approx(float(error.max()), rel=1e-2)


def test_asked_not_to_raise_moves_nothing(model, path, data):
    other = copy.deepcopy(model)
    spoil_layer(other)
    parity = check_parity(other, path, batches(data), raises=False)
    assert not parity.passed
    assert parity.kept is None
    assert parity.agreement < 1
    assert path.exists()
    assert "differ" in str(parity)


def test_train_mode_is_named_as_the_cause(model, path, data):
    training = copy.deepcopy(model)
    training[3].train()
    with pytest.raises(ExportError, match=r"other logits each time .* call model.eval\(\) first"):
        check_parity(training, path, batches(data))


def test_batch_statistics_of_train_mode_are_found(model, path, data):
    training = copy.deepcopy(model)
    training[1].train()
    with pytest.raises(ExportError, match=r"does not run on a batch of 1: Expected more than 1 value .* training"):
        check_parity(training, path, batches(data))
    assert not path.exists()


def test_permuted_class_names(model, path, data):
    with pytest.raises(ExportError, match=r"carries the classes \['a', .*'d'\], expected \['b', 'a', 'c', 'd'\]"):
        check_parity(model, path, batches(data), classes=["b", "a", "c", "d"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_file_with_a_fixed_batch(model, data, tmp_path):
    path = tmp_path / "fixed.onnx"
    program = torch.onnx.export(model, (data[:16],), dynamo=True, verbose=False)
    program.save(path, external_data=False)
    with pytest.raises(ExportError, match=r"does not run on a batch of 1: input '.*' must have shape \(16, 6\)"):
        check_parity(model, path, batches(data))
    assert (tmp_path / "fixed.failed.onnx").exists()


def test_file_of_another_model(model, data, tmp_path):
    other = export_module(nn.Linear(6, 3), torch.randn(2, 6), tmp_path / "other.onnx")
    with pytest.raises(ExportError, match=r"logits have shape \(16, 3\) where PyTorch gives \(16, 4\)"):
        check_parity(model, other, batches(data))
    wide = export_module(nn.Linear(7, 4), torch.randn(2, 7), tmp_path / "wide.onnx")
    with pytest.raises(ExportError, match=r"must have shape \(batch, 7\), got \(16, 6\)"):
        check_parity(model, wide, batches(data))


def test_truncated_file(model, path, data):
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ExportError, match="damaged, cut short"):
        check_parity(model, path, batches(data))


@pytest.mark.parametrize("side", ["PyTorch", "ONNX"])
def test_nan_anywhere_fails(model, path, data, side, tmp_path):
    session = OnnxModel(path)

    class Spoiled(OnnxModel):
        def __init__(self):
            self.path, self.meta, self.provider = session.path, session.meta, session.provider

        def __call__(self, inputs):
            return spoiled(session(inputs), inputs, "ONNX")

    def spoiled(logits, inputs, name):
        row = (inputs == data[37]).all(1).numpy()
        logits = logits.numpy().copy() if name == "PyTorch" else logits.copy()
        logits[row, 2] = np.nan if name == side else logits[row, 2]
        return logits

    def call(x):
        return spoiled(model(x), x, "PyTorch")

    with pytest.raises(ExportError, match=f"{side} gives NaN or inf for sample 1037"):
        check_parity(call, Spoiled(), batches(data), report=tmp_path / "parity.json")
    written = json.loads((tmp_path / "parity.json").read_text())
    assert written["max_abs"] is None
    assert written["worst_sample"]["index"] == 1037
    assert written["worst_sample"]["output"] == 2


class Fake(OnnxModel):
    """Gives prepared logits, looked up by the input."""

    def __init__(self, table, task="classification"):
        from pyft.export.run import OnnxMeta

        self.path, self.meta, self.provider, self.table = None, OnnxMeta(task=task), "CPUExecutionProvider", table

    def __call__(self, inputs):
        return self.table[inputs.numpy()]


def compare(a, b, task="classification", **keywords):
    a, b = np.array(a, np.float32), np.array(b, np.float32)
    index = torch.arange(len(a))
    return check_parity(lambda i: a[i.numpy()], Fake(b, task), [Batch(index, None, index)], raises=False, **keywords)


def test_ties_are_listed_and_pass():
    a = np.tile([5.0, 1.0, 0.0], (20, 1))
    b = a.copy()
    a[3], b[3] = [1.0, 1.0001, 0], [1.0001, 1.0, 0]
    parity = compare(a, b)
    assert parity.passed
    assert parity.agreement == 1
    assert parity.num_ties == 1
    assert parity.ties == [{"index": 3, "torch": 1, "onnx": 0}]
    assert "1 ties" in str(parity)


def test_prediction_that_differs_beyond_a_tie_fails_even_within_a_loose_tolerance():
    a = np.tile([5.0, 1.0, 0.0], (20, 1))
    b = a.copy()
    a[3], b[3] = [1.0, 1.2, 0], [1.2, 1.0, 0]
    parity = compare(a, b)
    assert parity.failure.startswith("1 of 20 predictions differ; the worst is sample 3")
    assert parity.agreement == 0.95
    assert parity.num_ties == 0
    assert compare(a, b, tolerance=0.05).passed  # 0.2 / 5 is within this one, and so a tie


def test_multilabel_compares_every_label():
    a = np.tile([3.0, -2.0], (10, 1))
    b = a.copy()
    b[4] = [3.0, 1.0]
    parity = compare(a, b, task="multilabel")
    assert parity.failure.startswith("1 of 10 predictions differ; the worst is sample 4, output 1")
    a[4], b[4] = [3.0, 1e-5], [3.0, -1e-5]
    parity = compare(a, b, task="multilabel")
    assert parity.passed
    assert parity.ties == [{"index": 4, "torch": [1, 1], "onnx": [1, 0]}]


def test_regression_is_measured_by_the_largest_value():
    a = np.linspace(-2, 2, 20)[:, None]
    assert compare(a, a * (1 + 1e-6), task="regression").passed
    parity = compare(a, a + 1e-3, task="regression")
    assert parity.failure.startswith("the relative difference is 5.0e-04, above 1e-04")
    assert parity.agreement == 0


def test_small_batches_near_zero_are_measured_by_the_largest_value_of_all():
    a = np.array([[1e-6], *[[2.0]] * 20])
    parity = compare(a, a + 1e-7, task="regression")
    assert parity.passed
    assert parity.max_rel == pytest.approx(5e-8, rel=1e-2)


def test_output_for_each_token_is_compared():
    a = np.random.default_rng(0).normal(size=(9, 5, 3)).astype(np.float32)
    assert compare(a, a).agreement == 1
    b = a.copy()
    b[6, 4] = b[6, 4, [1, 2, 0]]
    assert compare(a, b).failure.startswith("1 of 9 predictions differ")


def test_relative_difference():
    a = np.array([[1.0, -4.0]])
    assert relative_difference(a, a + 0.2) == pytest.approx(0.05)
    assert relative_difference(np.zeros(3), np.zeros(3)) == 0
    assert relative_difference(np.zeros(3), np.ones(3)) == np.inf
    assert np.isnan(relative_difference(np.ones(2), np.array([1.0, np.nan])))
    assert relative_difference(np.zeros(0), np.zeros(0)) == 0


def test_nothing_to_compare_is_an_error(model, path):
    with pytest.raises(DataError, match="nothing was compared"):
        check_parity(model, path, [])
    with pytest.raises(ConfigError, match="got 'ranking'"):
        check_parity(model, path, [], problem="ranking")


class Sum:
    """A metric that sees every logit."""

    def __init__(self, name):
        self.name, self.total = name, 0.0

    def update(self, targets, logits):
        self.total += float(logits.sum()) + float(targets.sum())

    def metrics(self):
        return SimpleNamespace(values={self.name: self.total, "r2": math.nan})


def compare_with_targets(a, b, name, **keywords):
    a, b = np.array(a, np.float32), np.array(b, np.float32)
    index, targets = torch.arange(len(a)), torch.ones(len(a))
    batches = [Batch(index, targets, index)]
    return check_parity(
        lambda i: a[i.numpy()], Fake(b), batches, raises=False, counter=lambda: Sum(name), **keywords
    )  # fmt: skip


def test_metrics_of_both_sides():
    a = np.tile([5.0, 1.0, 0.0], (20, 1))
    parity = compare_with_targets(a, a * (1 + 3e-6), "accuracy")
    assert re.match(r"the metric accuracy is 140 with PyTorch and 140\.0\d+ with ONNX", parity.failure)
    # A mean over real numbers moves with the logits.
    assert compare_with_targets(a, a * (1 + 3e-6), "loss").passed
    assert compare_with_targets(a, a, "accuracy").metrics["torch"]["accuracy"] == 140
    assert compare(a, a).metrics is None


def test_tie_is_no_difference_in_a_metric():
    a = np.tile([5.0, 1.0, 0.0], (20, 1))
    b = a.copy()
    a[3], b[3] = [1.0, 1.0001, 0], [1.0001, 1.0, 0]
    parity = compare_with_targets(a, b, "accuracy")
    assert parity.passed
    assert parity.num_ties == 1


@pytest.mark.parametrize(
    ("problem", "function"), [("classification", scipy_softmax), ("multilabel", expit), ("regression", lambda x: x)]
)
def test_differences_of_scores(problem, function):
    generator = np.random.default_rng(0)
    a = generator.normal(0, 300, (30, 4)).astype(np.float32)
    b = a + generator.normal(0, 1e-3, a.shape).astype(np.float32)
    axis = {"axis": -1} if problem == "classification" else {}
    wanted = np.abs(function(a.astype(np.float64), **axis) - function(b.astype(np.float64), **axis))
    parity = compare(a, b, task=problem)
    assert parity.scores_max_abs == pytest.approx(wanted.max(), rel=1e-6, abs=1e-12)
    assert parity.scores_mean_abs == pytest.approx(wanted.mean(), rel=1e-6, abs=1e-12)


def test_batches_and_feeds_must_fit(model, path, data):
    with pytest.raises(ConfigError, match="a function of sample numbers needs feeds="):
        check_parity(model, path, lambda index: None)
    with pytest.raises(ConfigError, match="with feeds= a function from sample numbers"):
        check_parity(model, path, batches(data), feeds=[SimpleNamespace(inputs={}, index=[0])])
    feed = SimpleNamespace(inputs={"input": data[:3].numpy()}, index=np.arange(3))
    with pytest.raises(ConfigError, match="holds other samples than it was asked for"):
        check_parity(model, path, lambda index: next(batches(data[:3])), feeds=[feed])
