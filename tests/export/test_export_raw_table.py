"""The graph before the model of a table, run by onnxruntime, against the bits of TablePreprocess and scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pyft.data.table_preprocess import TablePreprocess
from pyft.data.table_rows import TableRows
from pyft.errors import ConfigError
from pyft.export.graph import Graph, put_before
from pyft.export.raw_table import table_front

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def alone(front: Graph, opset: int = 18) -> Any:
    """A session that runs the front and nothing else."""
    opsets = [onnx.helper.make_opsetid("", opset)]
    opsets += [onnx.helper.make_opsetid(domain, version) for domain, version in front.opsets.items()]
    graph = onnx.helper.make_graph(front.nodes, "front", front.inputs, front.outputs, front.initializers)
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def some_rows(count: int, seed: int) -> TableRows:
    rng = np.random.default_rng(seed)
    numbers = {
        "age": rng.normal(40, 12, count),
        "relu/x 1": rng.lognormal(12, 3, count),
        "größe": rng.normal(1e6, 0.5, count),
        "constant": np.full(count, 0.1),
    }
    columns: dict[str, np.ndarray] = {name: values.astype(np.float32) for name, values in numbers.items()}
    columns["age"][rng.random(count) < 0.2] = np.nan
    columns["town"] = rng.choice(np.array(["Ulm", "", "São Paulo", "北京", "a b"], dtype=object), count)
    columns["kind"] = rng.choice(np.array(["x", "y"], dtype=object), count)
    return TableRows({name: columns[name] for name in ("age", "town", "relu/x 1", "größe", "kind", "constant")})


@pytest.mark.parametrize("opset", [18, 20, 21])
def test_the_graph_gives_the_bits_of_the_preprocessing(opset: int) -> None:
    made = TablePreprocess().fit(some_rows(500, seed=0))
    session = alone(table_front(made.spec(), ["features"]), opset)
    assert [value.name for value in session.get_inputs()] == list(made.columns)
    for count in (1, 2, 7, 500):
        rows = some_rows(count, seed=count)
        rows.columns["town"][0] = "never seen"
        rows.columns["relu/x 1"][0] = np.nan
        given = session.run(["features"], rows.columns)[0]
        assert given.dtype == np.float32
        np.testing.assert_array_equal(given, made.matrix(rows))
        assert not given[0, [made.feature_names().index(f"town={word}") for word in ("", "Ulm")]].any()


def test_the_graph_agrees_with_scikit_learn() -> None:
    compose = pytest.importorskip("sklearn.compose")
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    train, new = some_rows(400, seed=1), some_rows(50, seed=2)
    new.columns["kind"][3] = "z"
    numbers, words = ["age", "relu/x 1", "größe", "constant"], ["town", "kind"]
    pandas = pytest.importorskip("pandas")
    frames = [pandas.DataFrame({k: v if v.dtype == object else v.astype(float) for k, v in rows.columns.items()})
              for rows in (train, new)]  # fmt: skip
    peer = compose.ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), numbers),
            ("words", OneHotEncoder(handle_unknown="ignore", sparse_output=False), words),
        ]
    ).fit(frames[0])
    made = TablePreprocess().fit(train)
    given = alone(table_front(made.spec(), ["x"])).run(None, new.columns)[0]
    # float32 holds a column around 1e6 with deviation 0.5 in steps of 0.06, so its mean is off by up to that.
    loose = [made.feature_names().index("größe")]
    expected = peer.transform(frames[1])
    np.testing.assert_allclose(given[:, loose], expected[:, loose], atol=0.07)
    np.testing.assert_allclose(np.delete(given, loose, 1), np.delete(expected, loose, 1), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kept", [("age",), ("town",), ("age", "kind")])
def test_tables_of_one_sort_of_columns(kept: tuple[str, ...]) -> None:
    rows = some_rows(30, seed=3).select(kept)
    made = TablePreprocess().fit(rows)
    given = alone(table_front(made.spec(), ["x"])).run(None, rows.columns)[0]
    np.testing.assert_array_equal(given, made.matrix(rows))


def test_before_a_model_whose_inner_values_have_the_names_of_columns() -> None:
    rows = some_rows(40, seed=4).select(["age", "town"])
    rows = TableRows({"weight": rows.columns["age"], "x": rows.columns["town"]})
    made = TablePreprocess().fit(rows)
    width = made.num_features
    weight = np.random.default_rng(0).normal(size=(width, 3)).astype(np.float32)
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "weight"], ["logits"])],
            "model",
            [helper.make_tensor_value_info("x", real, ["batch", width])],
            [helper.make_tensor_value_info("logits", real, ["batch", 3])],
            [onnx.numpy_helper.from_array(weight, "weight")],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    put_before(model, table_front(made.spec(), ["x"]))
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["weight", "x"]
    np.testing.assert_allclose(session.run(None, rows.columns)[0], made.matrix(rows) @ weight, rtol=1e-5, atol=1e-6)


def test_what_cannot_stand_before_a_model() -> None:
    with pytest.raises(ConfigError, match="has seen no training rows"):
        table_front(TablePreprocess().spec(), ["x"])
    with pytest.raises(ConfigError, match="takes one input, this one takes a, b"):
        table_front(TablePreprocess().fit(some_rows(9, seed=0)).spec(), ["a", "b"])
