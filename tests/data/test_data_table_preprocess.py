"""Tables of numbers and words as features: against scikit-learn, and what is refused, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyft.data.batches import Batches
from pyft.data.sources import load_data, load_samples
from pyft.data.table_preprocess import TablePreprocess
from pyft.data.table_rows import TableForm, TableRows
from pyft.errors import ConfigError, DataError
from pyft.samples import Data

PEOPLE = "age,town,income,y\n31,Ulm,1000,no\n,Bonn,2000.5,yes\n47,,n/a,no\n52,Ulm,1500,yes\n28,Köln,900,no\n"


def rows_of(data: Data) -> TableRows:
    assert isinstance(data.train.inputs, TableRows)
    return data.train.inputs


def words(*values: str) -> np.ndarray:
    return np.array(values, dtype=object)


def load(path: Path, content: str, **keywords: Any) -> Data:
    path.write_text(content, encoding="utf-8")
    return load_data(path, **{"label_column": "y", "val": 0, **keywords})


def sklearn_features(train: Any, new: Any, numbers: list[str], names: list[str]) -> np.ndarray:
    """Imputed, scaled and one-hot by scikit-learn, numbers first."""
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    peer = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), numbers),
            ("words", OneHotEncoder(handle_unknown="ignore", sparse_output=False), names),
        ]
    )
    return peer.fit(train).transform(new)


def test_california_housing_as_scikit_learn_sees_it(shared_data: Path) -> None:
    pandas = pytest.importorskip("pandas")
    source = shared_data / "california_housing" / "housing.csv"
    data = load_data(source, label_column="median_house_value", val=0.3, seed=4)
    assert data.val is not None
    made = TablePreprocess().fit(rows_of(data), data.train.name)
    frame = pandas.read_csv(source)
    # The rows of the split, found in the file by their targets and longitudes.
    for samples in (data.train, data.val):
        assert isinstance(samples.inputs, TableRows)
    train, val = (
        pandas.DataFrame(
            {name: column if column.dtype == object else column.astype(float) for name, column in one.columns.items()}
        )
        for one in (data.train.inputs, data.val.inputs)
    )
    assert len(train) + len(val) == len(frame)
    names = [name for name in frame.columns if name not in ("median_house_value", "ocean_proximity")]
    for samples, rows in ((data.train, train), (data.val, val)):
        given = torch.cat([batch.inputs for batch in Batches(samples, made, 4096, shuffle=False).epoch(0)])
        expected = sklearn_features(train, rows, names, ["ocean_proximity"])
        assert given.dtype == torch.float32
        np.testing.assert_allclose(given.numpy(), expected, rtol=2e-5, atol=2e-5)
    assert made.feature_names()[7:10] == ["median_income", "ocean_proximity=<1H OCEAN", "ocean_proximity=INLAND"]
    count = int(np.isnan(rows_of(data).columns["total_bedrooms"]).sum())
    assert 0 < count < 207
    assert any(f"'total_bedrooms' misses {count} of 14448 numbers" in note for note in made.notes)


def test_cells_of_a_file(tmp_path: Path) -> None:
    data = load(tmp_path / "people.csv", PEOPLE)
    rows = rows_of(data)
    assert (data.kind, data.classes, rows.names, rows.words) == ("array", ["no", "yes"], ("age", "town", "income"),
                                                                 ("town",))  # fmt: skip
    assert rows.gaps() == {"age": 1, "income": 1}
    assert rows[2] == {"age": 47.0, "town": "", "income": pytest.approx(np.nan, nan_ok=True)}
    made = TablePreprocess().fit(rows)
    assert made.feature_names() == ["age", "income", "town=", "town=Bonn", "town=Köln", "town=Ulm"]
    given = made.matrix(rows)
    filled = np.array([[31, 1000], [39, 2000.5], [47, 1250], [52, 1500], [28, 900]])
    np.testing.assert_allclose(given[:, :2], (filled - filled.mean(0)) / filled.std(0), rtol=1e-5, atol=1e-6)
    assert given[:, 2:].tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    alone = made({"town": "Ulm", "age": 31, "income": 1000.0})
    np.testing.assert_array_equal(alone.numpy(), given[0])


def test_frames_and_dicts_are_read_as_files_are(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    data = load(tmp_path / "people.csv", PEOPLE)
    frame = pandas.read_csv(tmp_path / "people.csv")
    frame["age"] = frame["age"].astype("Int64")
    as_pair = load_data((frame.drop(columns="y"), frame["y"].tolist()), val=0)
    as_frame = load_data(frame, label_column="y", val=0)
    for other in (as_frame, as_pair):
        assert other.train.columns == ("age", "town", "income")
        for name, values in rows_of(data).columns.items():
            np.testing.assert_array_equal(rows_of(other).columns[name], values)
    form = TableForm(("age", "town", "income"), ("town",), raw=True)
    columns = {"income": [1, None], "more": [0, 0], "town": ["Ulm", None], "age": [2, 3]}
    read = load_samples(columns, kind="array", problem="classification", classes=None, labels="ignored", columns=form)
    assert [list(row.values())[:2] for row in read.inputs] == [[2.0, "Ulm"], [3.0, ""]]
    with pytest.raises(DataError, match=r"'income' has 2 rows, 'town' has 1"):
        load_samples({**columns, "town": ["a"]}, kind="array", problem="classification", classes=None,
                     labels="ignored", columns=form)  # fmt: skip


def test_columns_that_the_source_or_the_user_calls_words(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    content = "plz,x,y\n01067,1,a\n89073,2,b\n01067,3,a\n"
    form = TablePreprocess(words=["plz"], leave_out=["x"]).form()
    data = load(tmp_path / "plz.csv", content, form=form)
    assert rows_of(data).columns["plz"].tolist() == ["01067", "89073", "01067"]
    assert rows_of(data).names == ("plz",)
    frame = pandas.DataFrame({"plz": pandas.Categorical([7, 8, 7]), "day": pandas.to_datetime(["2020-01-01"] * 3)})
    rows = rows_of(load_data(frame.assign(y=["a", "b", "a"]), label_column="y", val=0))
    assert rows.columns["plz"].tolist() == ["7", "8", "7"]
    assert rows.columns["day"][0].startswith("2020-01-01")
    with pytest.raises(DataError, match=r"leave_out: plz\.csv has no column 'plx'.*nearest: 'plz'"):
        load(tmp_path / "plz.csv", content, form=TablePreprocess(leave_out=["plx"]).form())


def test_words_and_gaps_of_the_other_sets(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,b,y\n1,2,x\n3,4,z\n5,6,x\n")
    (tmp_path / "test.csv").write_text("y,spare,b,a\nx,q,20,10\nz,q,,30\n")
    data = load_data(tmp_path, val=0)
    assert data.test is not None
    assert isinstance(data.train.inputs, TableRows)
    made = TablePreprocess().fit(data.train.inputs)
    batch = next(iter(Batches(data.test, made, 4, shuffle=False).epoch(0)))
    filled = np.array([[10, 20], [30, 4]])
    np.testing.assert_allclose(batch.inputs.numpy(), (filled - [3, 4]) / np.std([1, 3, 5]), rtol=1e-6)
    (tmp_path / "test.csv").write_text("y,b,a\nx,2,red\nz,3,4\nx,4,5\n")
    with pytest.raises(DataError, match=r"test\.csv: the column 'a' holds 1 cell without a number, first at line 2"):
        load_data(tmp_path, val=0)


def test_what_training_has_not_seen() -> None:
    made = TablePreprocess().fit(TableRows({"town": words("Ulm", "Bonn")}))
    new = TableRows({"town": words("Ulm", "", "Rom", "Rom")})
    assert made.matrix(new).tolist() == [[0, 1], [0, 0], [0, 0], [0, 0]]
    assert made.surprises(new, "new.csv") == [
        "new.csv: 3 of 4 values of 'town' did not occur in training ('', 'Rom') and count as no value"
    ]
    assert made.surprises(TableRows({"town": words("Ulm")}), "new.csv") == []


@pytest.mark.parametrize("count", [1, 2, 5])
def test_constant_columns(count: int) -> None:
    values = np.full(count, 0.1, dtype=np.float32)
    made = TablePreprocess().fit(TableRows({"x": values, "gap": np.where(np.arange(count) == 0, 7, np.nan)}))
    assert (
        made.matrix(TableRows({"x": values, "gap": values})).tolist() == [[0, np.float32(np.float32(0.1) - 7)]] * count
    )
    new = made.matrix(TableRows({"x": np.float32([1.1]), "gap": np.float32([np.nan])}))
    np.testing.assert_allclose(new, [[1.0, 0.0]], atol=1e-6)


def test_json_keeps_every_bit() -> None:
    rng = np.random.default_rng(0)
    rows = TableRows(
        {"a": rng.lognormal(3, 9, 99).astype(np.float32), "b": words(*(f"wört {n % 3}" for n in range(99)))}
    )
    made = TablePreprocess().fit(rows)
    again = TablePreprocess.from_spec(json.loads(json.dumps(made.spec())))
    assert again.matrix(rows).tobytes() == made.matrix(rows).tobytes()
    assert again.feature_names() == made.feature_names()
    options = TablePreprocess(words=["a"], leave_out=["b"], max_words=7)
    other = TablePreprocess.from_spec(json.loads(json.dumps(options.spec())))
    assert (other.words, other.leave_out, other.max_words, other.fitted) == (("a",), ("b",), 7, False)
    with pytest.raises(ConfigError, match="is not whole"):
        TablePreprocess.from_spec({"kind": "table", "columns": ["a"]})


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (
            words(*(f"id{n}" for n in range(30))),
            r"'c' holds 30 different words in 30 rows, such as 'id0': an id or free",
        ),
        (words(*(f"w{n % 300}" for n in range(900))), r"'c' holds 300 .* more than 256; .*leave_out=\['c'\].*=300\)"),
        (np.full(4, np.nan, dtype=np.float32), r"'c' is empty in all 4 training rows; leave it out"),
    ],
)
def test_columns_that_are_no_features(column: np.ndarray, expected: str) -> None:
    with pytest.raises(DataError, match=rf"t\.csv: the column {expected}"):
        TablePreprocess().fit(TableRows({"c": column}), "t.csv")


def test_many_words_where_the_user_allows_them() -> None:
    rows = TableRows({"c": words(*(f"w{n % 300}" for n in range(900)))})
    assert TablePreprocess(max_words=300).fit(rows).num_features == 300


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"words": "plz"}, "words='plz': expected a list"),
        ({"leave_out": [3]}, "leave_out="),
        ({"max_words": 0}, "max_words=0"),
        ({"max_words": True}, "max_words=True"),
    ],
)
def test_bad_options(keywords: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        TablePreprocess(**keywords)


def test_a_preprocessing_without_training_rows() -> None:
    with pytest.raises(ConfigError, match="has seen no training rows"):
        TablePreprocess().matrix(TableRows({"a": np.float32([1])}))


def test_arrays_as_tables() -> None:
    x = np.array([[1.0, np.nan], [3.0, 5.0], [8.0, 7.0]])
    with pytest.raises(DataError, match=r"1 input NaN or infinite.*preprocess='table'"):
        load_data((x, [0, 1, 0]), val=0.4)
    data = load_data((x, [0, 1, 0]), val=0, form=TableForm(raw=True))
    assert data.train.columns == ("x0", "x1")
    made = TablePreprocess().fit(rows_of(data))
    filled = np.array([[1.0, 6.0], [3.0, 5.0], [8.0, 7.0]])
    np.testing.assert_allclose(
        made.matrix(rows_of(data)), (filled - filled.mean(0)) / filled.std(0), rtol=1e-5, atol=1e-6
    )
    form = made.form()
    new = load_samples(np.ones((2, 2)), kind="array", problem="classification", classes=None, labels="ignored",
                       columns=form)  # fmt: skip
    assert isinstance(new.inputs, TableRows)
    for wrong, expected in ((np.ones((2, 3)), "has 3 columns, the model takes 2: 'x0', 'x1'"),
                            (np.full((1, 2), np.inf), "the column 'x0' is infinite at row 0"),
                            (np.ones((2, 2, 2)), r"expected a table of numbers \(N, F\)")):  # fmt: skip
        with pytest.raises(DataError, match=expected):
            load_samples(wrong, kind="array", problem="classification", classes=None, labels="ignored", columns=form)
    with_words = TableForm(("a", "b"), ("b",), raw=True)
    with pytest.raises(DataError, match="holds numbers without names, the model takes words in 'b'"):
        load_samples(x, kind="array", problem="classification", classes=None, labels="ignored", columns=with_words)


def test_the_fingerprint_and_the_digests_see_every_cell(tmp_path: Path) -> None:
    base = load(tmp_path / "p.csv", PEOPLE)
    assert load(tmp_path / "q.csv", PEOPLE).fingerprint == base.fingerprint
    changed = [
        PEOPLE.replace(*pair) for pair in (("Bonn", "Bern"), ("47", ""), ("2000.5", "2000.25"), ("town", "Town"))
    ]
    assert len({base.fingerprint, *(load(tmp_path / "q.csv", text).fingerprint for text in changed)}) == 5
    made = TablePreprocess().fit(rows_of(base))
    digests = [Batches(base.train, made, 2).source.digests() for _ in range(2)]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 5
    wider = TablePreprocess().fit(TableRows.join([rows_of(base), TableRows({"age": np.float32([31]), "town": words("Z"),
                                                                         "income": np.float32([1])})]))  # fmt: skip
    assert not set(digests[0]) & set(Batches(base.train, wider, 2).source.digests())


def test_large_numbers_that_float32_blurs_are_told(tmp_path: Path) -> None:
    content = "time,town,y\n" + "".join(f"{1_700_000_000 + n},a{n % 2},{n % 2}\n" for n in range(9))
    data = load(tmp_path / "t.csv", content)
    assert any("float32 blurs the numbers of 'time'" in note for note in data.notes)


def test_rows_for_a_function_of_the_users(tmp_path: Path) -> None:
    data = load(tmp_path / "p.csv", PEOPLE)
    with pytest.raises(ConfigError, match=r"p\.csv holds words or missing numbers; give the TablePreprocess"):
        Batches(data.train, None, 2)
    batches = Batches(data.train, lambda row: torch.tensor([float(len(row["town"])), row["age"]]), 5, shuffle=False)
    assert next(iter(batches.epoch(0))).inputs[:, 0].tolist() == [3, 4, 0, 3, 4]
