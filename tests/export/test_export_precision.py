"""Fewer bits within a bound: the right nodes, measured rows, and a refusal with the table."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")
onnx = pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")

from proof_models import front, preprocess, tokenizer_json  # noqa: E402

from pyft.errors import ConfigError, DataError, ExportError  # noqa: E402
from pyft.export.graph import put_before  # noqa: E402
from pyft.export.onnx import export_module  # noqa: E402
from pyft.export.precision import lower_precision  # noqa: E402
from pyft.export.quantize import outer_nodes, to_int8_dynamic, weights_of  # noqa: E402
from pyft.export.run import OnnxModel  # noqa: E402
from pyft.export.sensitivity import groups_of, ranked_groups  # noqa: E402

CLASSES = [f"class {i}" for i in range(5)]


class Words(nn.Module):
    """A large table of words, and two layers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2000, 64)
        self.inner = nn.Linear(64, 128)
        self.head = nn.Linear(128, 5)

    def forward(self, input_ids, attention_mask):
        weights = attention_mask.unsqueeze(-1).float()
        mean = (self.table(input_ids) * weights).sum(1) / weights.sum(1).clamp(min=1)
        return self.head(torch.relu(self.inner(mean)))


class Filters(nn.Module):
    """Convolutions on pictures of 12 by 12."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU6(), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU6()
        )
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    torch.manual_seed(0)
    model = Words().eval()
    ids = torch.randint(1, 2000, (64, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    spec = {"kind": "text", "pad_id": 0, "tokenizer": tokenizer_json(["a", "b"])}
    path = tmp_path_factory.mktemp("words") / "m.onnx"
    export_module(model, inputs, path, inputs="raw", classes=CLASSES, preprocess=spec)
    return path, [{"input_ids": part.numpy()} for part in ids.split(32)]


@pytest.fixture(scope="module")
def filters(tmp_path_factory):
    torch.manual_seed(0)
    model = Filters().eval()
    raw = np.random.default_rng(0).integers(0, 256, (64, 12, 12, 3)).astype(np.uint8)
    path = export_module(
        model, torch.randn(2, 3, 12, 12), tmp_path_factory.mktemp("filters") / "m.onnx", classes=CLASSES
    )
    proto = onnx.load(path)
    put_before(proto, front())
    path.write_bytes(proto.SerializeToString())
    return path, [{"image": raw[:32]}, {"image": raw[32:]}]


def agreement(path, feeds):
    """Share of the predictions that are those of the float32 file."""
    model = OnnxModel(path)
    wanted = [model(feed).argmax(1) for feed in feeds]
    return lambda other: float(
        np.mean(np.concatenate([other(f).argmax(1) == w for f, w in zip(feeds, wanted, strict=True)]))
    )


def lower(made, precision, **keywords):
    path, feeds = made
    options = {"metric": agreement(path, feeds), "metric_name": "agreement", "max_drop": 0.1, **keywords}
    return lower_precision(path, precision, calibration=feeds, **options)


def kinds(content):
    return {value.name: value.data_type for value in onnx.load_from_string(content).graph.initializer}


def test_int8_of_words_takes_the_table_of_words_too(words):
    content, table = lower(words, "int8")
    path, feeds = words
    # On so small a model either may be the faster.
    assert table.chosen in ("int8 dynamic", "int8 static")
    assert [row.name for row in table.candidates][:2] == ["fp32", "int8 dynamic"]
    assert table.candidates[1].holds
    assert table.candidates[1].size_ratio < 0.3
    assert len(content) < 0.3 * path.stat().st_size
    before, after = OnnxModel(path), OnnxModel(content)
    for feed in feeds:
        np.testing.assert_allclose(after(feed), before(feed), atol=0.05 * float(np.abs(before(feed)).max()))
    assert after.meta.classes == CLASSES
    assert after.meta.extra["pyft.precision"] == "int8"
    written = json.loads(after.meta.extra["pyft.precision_table"])
    assert written["chosen"] == table.chosen
    given = after.run(feeds[0])
    assert given["label"].tolist() == [CLASSES[i] for i in given["logits"].argmax(1)]
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)


def test_weights_take_seven_bits(words):
    # Products of 8 by 8 bits overflow the 16-bit sums of CPUs without VNNI.
    proto = to_int8_dynamic(onnx.load(words[0]), [])
    arrays = {v.name: onnx.numpy_helper.to_array(v) for v in proto.graph.initializer if v.data_type == 3}
    matrices = [array for name, array in arrays.items() if array.ndim == 2 and "table" not in name]
    assert matrices
    assert max(int(np.abs(array.astype(int)).max()) for array in matrices) <= 64


def test_int8_of_convolutions_is_static(filters):
    content, table = lower(filters, "int8")
    rows = {row.name: row for row in table.candidates}
    assert "not tried: reaches" in rows["int8 dynamic"].note
    assert table.chosen.startswith("int8 static")
    assert len(content) < 0.5 * filters[0].stat().st_size
    for size in (1, 2, 7):
        assert OnnxModel(content)({"image": filters[1][0]["image"][:size]}).shape == (size, 5)


def test_what_stands_around_the_model_keeps_its_precision(words, filters):
    for (path, _), content in ((made, lower(made, "int8")[0]) for made in (words, filters)):
        before, after = onnx.load(path), onnx.load_from_string(content)
        outside = outer_nodes(before)
        assert outside
        inputs, outputs = ({v.name for v in proto.graph.input} for proto in (before, after))
        assert inputs == outputs
        kept = {node.name: node.op_type for node in after.graph.node}
        assert {name: kept.get(name) for name in outside} == {
            node.name: node.op_type for node in before.graph.node if node.name in outside
        }
        types, now = ({v.name: v.data_type for v in proto.graph.initializer} for proto in (before, after))
        around = [name for name in types if name.startswith(("image/", "text/", "outputs/"))]
        assert around
        assert {name: now[name] for name in around} == {name: types[name] for name in around}


def test_fp16(words):
    content, table = lower(words, "fp16")
    assert table.chosen == "fp16"
    assert len(content) < 0.6 * words[0].stat().st_size
    half = onnx.TensorProto.FLOAT16
    assert kinds(content)["table.weight"] == half
    model = OnnxModel(content)
    assert {value.name: str(value.dtype) for value in model.inputs} == {"input_ids": "int64"}
    assert model(words[1][0]).dtype == np.float32


def test_fp16_keeps_every_digit_around_the_model(words, filters):
    content, _ = lower(words, "fp16")
    given = OnnxModel(content).run(words[1][0])
    np.testing.assert_allclose(given["scores"], torch.from_numpy(given["logits"]).softmax(1).numpy(), atol=1e-6)
    # In front of the model: pixels over a deviation, which fp16 would round to 3 digits.
    proto = onnx.load_from_string(lower(filters, "fp16")[0])
    into = next(node for node in proto.graph.node if node.name == "image/input").output[0]
    proto.graph.output.append(onnx.ValueInfoProto(name=into))
    raw = filters[1][0]["image"]
    found = OnnxModel(proto.SerializeToString()).run({"image": raw}, [into])[into]
    np.testing.assert_array_equal(found, preprocess(raw).numpy())


def test_table_is_measured(words):
    path, _ = words
    _, table = lower(words, "int8")
    base, row = table.candidates[0], table.candidates[-1]
    assert base.num_bytes == pytest.approx(path.stat().st_size, rel=0.01)
    assert [latency.samples for latency in row.latency] == [1, 32]
    assert all(0 < latency.p50 <= latency.p95 for latency in row.latency)
    assert ("slower than fp32" in row.note) == any(latency.ratio > 1 for latency in row.latency)
    text = str(table)
    assert "agreement" in text
    assert "taken" in text
    json.dumps(table.to_dict(), allow_nan=False)


class Sharp(nn.Module):
    """One layer whose inputs span four orders of magnitude, which one scale for all activations cannot hold."""

    def __init__(self):
        super().__init__()
        self.easy = nn.Linear(16, 64)
        self.hard = nn.Linear(64, 64)
        self.last = nn.Linear(64, 64)
        self.head = nn.Linear(64, 5)
        with torch.no_grad():
            self.easy.weight[0] *= 3000
            self.easy.bias.zero_()
            self.hard.weight[:, 0] *= 1e-4

    def forward(self, x):
        return self.head(torch.tanh(self.last(torch.tanh(self.hard(torch.relu(self.easy(x)))))))


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    torch.manual_seed(3)
    model = Sharp().eval()
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    path = export_module(model, x[:4], tmp_path_factory.mktemp("sharp") / "m.onnx")
    return path, [{"input": part.numpy()} for part in x.split(64)]


def node_of(path, weight):
    return next(node.name for node in onnx.load(path).graph.node if f"{weight}.weight" in node.input)


def test_most_sensitive_layer_is_found_and_left_out(sharp):
    path, feeds = sharp
    content, table = lower(sharp, "int8", max_drop=0.04)
    names = [row.name for row in table.candidates]
    assert names[1] == "int8 dynamic"
    assert not table.candidates[1].holds
    assert table.candidates[1].drop > 0.04
    taken = next(row for row in table.candidates if row.name == table.chosen)
    assert taken.drop <= 0.04
    assert taken.excluded == (node_of(path, "hard"),)
    assert agreement(path, feeds)(OnnxModel(content)) == pytest.approx(taken.metric)


def test_groups_are_ranked_by_what_they_bring(sharp):
    path, feeds = sharp
    proto, base = onnx.load(path), OnnxModel(path)

    def moved(other):
        model = OnnxModel(other.SerializeToString())
        return float(np.mean([np.abs(model(feed) - base(feed)).mean() for feed in feeds]))

    ranked = ranked_groups(proto, to_int8_dynamic, moved, 10)
    assert ranked[0] == (node_of(path, "hard"),)


def test_no_more_groups_than_trials(sharp):
    weights = weights_of(onnx.load(sharp[0]))
    assert len(weights) == 4
    assert [len(groups_of(weights * 10, most)) for most in (3, 10, 40)] == [3, 10, 40]
    assert sorted(sum(groups_of(weights, 3), ())) == sorted(weight.node for weight in weights)


def test_refusal_with_the_table(words):
    calls = []

    def falls(model):
        calls.append(model)
        return 0.9 if len(calls) == 1 else 0.5

    with pytest.raises(ExportError, match=r"no file keeps accuracy within max_drop=0.01 of float32") as raised:
        lower(words, "int8", metric=falls, metric_name="accuracy", max_drop=0.01)
    table = raised.value.table
    assert table.chosen is None
    assert {row.name.partition(",")[0] for row in table.candidates} == {"fp32", "int8 dynamic", "int8 static"}
    assert all(row.drop == pytest.approx(0.4) for row in table.candidates[1:])
    assert str(table) in str(raised.value)


class Recurrent(nn.Module):
    """Most weights are in an LSTM, which no way reaches."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, 16)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def test_file_that_would_hardly_shrink_is_refused(tmp_path):
    path = export_module(Recurrent().eval(), torch.randn(2, 6, 16), tmp_path / "m.onnx")
    feeds = [{"input": np.random.default_rng(0).normal(size=(8, 6, 16)).astype(np.float32)}]
    with pytest.raises(ExportError, match=r"int8 dynamic +not tried: reaches \d% of the weights"):
        lower((path, feeds), "int8", metric=lambda model: 1.0)


@pytest.mark.parametrize(
    ("values", "higher", "holds"),
    [((0.9, 0.895), True, True), ((0.9, 0.885), True, False), ((200.0, 201.0), False, True),
     ((200.0, 203.0), False, False), ((0.9, float("nan")), True, False)],
)  # fmt: skip
def test_drop(words, values, higher, holds):
    rest = iter(values)
    last = values[1]
    options = {"metric": lambda model: next(rest, last), "higher_is_better": higher, "max_drop": 0.01}
    if holds:
        assert lower(words, "fp16", **options)[1].chosen == "fp16"
    else:
        with pytest.raises(ExportError, match="no file keeps"):
            lower(words, "fp16", **options)


def test_bad_arguments(words):
    with pytest.raises(ConfigError, match=r"precision='int4': expected 'fp16' or 'int8'"):
        lower(words, "int4")
    with pytest.raises(ConfigError, match=r"max_drop=-1: expected a number of 0 or more"):
        lower(words, "int8", max_drop=-1)
    with pytest.raises(ConfigError, match=r"max_drop=nan"):
        lower(words, "int8", max_drop=float("nan"))
    with pytest.raises(DataError, match="needs samples to be measured on, got none"):
        lower_precision(words[0], "int8", calibration=[], metric=lambda model: 1.0)
