"""Reading of .tsv and .csv files: what is accepted, and the one clear error for what is not."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyft.data.checks import check_data
from pyft.data.sources import load_data, load_samples
from pyft.data.table_rows import TableRows
from pyft.data.tables import read_table
from pyft.errors import DataError

ROWS = [("where is my card", "card"), ("top up failed", "top_up"), ("card lost", "card"), ("add money", "top_up")]


def write_tsv(
    path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label"), end: str = "\n"
) -> Path:
    path.write_bytes(end.join("\t".join(row) for row in [header, *rows]).encode() + end.encode())
    return path


def texts_and_labels(path: Path) -> list[tuple[str, str]]:
    data = load_data(path, val=0)
    assert data.classes is not None
    assert data.train.targets is not None
    return [
        (text, data.classes[target])
        for text, target in zip(data.train.inputs, data.train.targets.tolist(), strict=True)
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_mark(tmp_path: Path, end: str, mark: bytes) -> None:
    path = write_tsv(tmp_path / "train.tsv", ROWS, end=end)
    path.write_bytes(mark + path.read_bytes())
    assert list(read_table(path).columns) == ["text", "label"]
    assert texts_and_labels(path) == ROWS


def test_tsv_keeps_quotes_and_odd_line_separators(tmp_path: Path) -> None:
    rows = [('he said "hi', "a"), ("one\u2028two\x0cthree\x85four", "b"), ("  blank kept  ", "a"), ("it's", "b")]
    assert texts_and_labels(write_tsv(tmp_path / "train.tsv", rows)) == rows


def test_csv_quotes_commas_and_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(b'label,text\r\na,"one, ""two""\nthree"\r\n\r\nb,plain\r\n')
    assert texts_and_labels(path) == [('one, "two"\nthree', "a"), ("plain", "b")]
    assert read_table(path).lines == [2, 5]


text_cells = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(text_cells, text_cells.filter(str.strip)), min_size=1, max_size=8))
def test_csv_reads_back_what_python_wrote(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "table.csv"
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("text", "label"), *rows])
    path.write_bytes(buffer.getvalue().encode())
    table = read_table(path)
    assert list(zip(table.columns["text"], table.columns["label"], strict=True)) == rows


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"text\tlabel\n", "header only"),
        (b"text\tlabel\na b\tx\nc d\n", "line 3 has 1 field, the header has 2"),
        (b"text\tlabel\na\tx\ny\n\nb\tx\ty\n", "line 3 has 1 field"),
        (b"text\tlabel\na\tx\n\xffb\ty\n", r"line 3 is not UTF-8 \(byte 0xff\)"),
        ("text\tlabel\na\tx\n".encode("utf-16"), "UTF-16"),
        (b"text\tlabel\na\0b\tx\n", "line 2 holds a NUL byte"),
        (b"text\ttext\na\tx\n", "names a column more than once: 'text'"),
        (b"text,label\na,x\nb,y\n", "holds no tab but commas"),
        (b"text\tlabel\na\tx\n  \ty\n", "the text column 'text' is empty in 1 row, first at line 3"),
        (b"text\tlabel\na\t \nb\ty\n\nc\t\n", "the label column 'label' is empty in 2 rows, first at line 2"),
        (b"when\twhere\thow\na\tb\tc\n", "no label column found: it has 'when', 'where', 'how'"),
        (b"is it here\tyes\nno it is\tno\nmaybe so\tyes\n", "looks like a sample, not a header"),
    ],
)
def test_bad_tsv(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        load_data(path, val=0)
    assert "train.tsv" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'text,label\na,x\n"open,y\nmore,z\n', "record that begins at line 3 is not valid CSV"),
        (b"text;label\na;x\nb;y\n", "holds no comma but semicolons"),
        (b"text,label\na,b,x\n", "line 2 has 3 fields, the header has 2"),
    ],
)
def test_bad_csv(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected):
        load_data(path, val=0)


def test_missing_path_names_the_nearest(tmp_path: Path) -> None:
    write_tsv(tmp_path / "train.tsv", ROWS)
    with pytest.raises(DataError, match=r"no such file or folder.*trian\.tsv.*nearest: 'train\.tsv'"):
        load_data(tmp_path / "trian.tsv")
    with pytest.raises(DataError, match=r"the folder .* does not exist"):
        load_data(tmp_path / "nowhere" / "train.tsv")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tsv(tmp_path / "train.tsv", ROWS)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"train\.tsv: cannot be read: Permission denied"):
        load_data(path)


def test_other_suffix(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "train.xlsx", ROWS)
    with pytest.raises(DataError, match=r"expected a \.tsv or \.csv file.*\.xlsx"):
        load_data(path)


def test_columns_by_name_order_and_argument(tmp_path: Path) -> None:
    swapped = write_tsv(tmp_path / "a.tsv", [(label, text) for text, label in ROWS], ("Intent", "Utterance"))
    assert texts_and_labels(swapped) == ROWS
    unnamed = write_tsv(tmp_path / "b.tsv", ROWS, ("col1", "col2"))
    assert texts_and_labels(unnamed) == ROWS
    wide = write_tsv(tmp_path / "c.tsv", [("1", *row, "x") for row in ROWS], ("id", "words", "topic", "note"))
    data = load_data(wide, text_column="words", label_column="topic", val=0)
    assert list(data.train.inputs) == [text for text, _ in ROWS]
    assert any("not used: 'id', 'note'" in note for note in data.notes)
    with pytest.raises(DataError, match=r"label_column='topik': c.tsv has no such column; it has .* nearest: 'topic'"):
        load_data(wide, label_column="topik")
    with pytest.raises(DataError, match="no text column found"):
        load_data(wide, label_column="topic", task="text-classification")
    with pytest.raises(DataError, match="the same column 'topic'"):
        load_data(wide, text_column="topic", label_column="topic")


def test_numeric_table(tmp_path: Path) -> None:
    path = tmp_path / "iris.csv"
    path.write_text(",a,b,species\n0,1,2.5,x\n1,3,4,y\n2,5,6e1,x\n3,7,8,y\n")
    data = load_data(path, label_column="species", val=0)
    assert (data.kind, data.problem, data.classes) == ("array", "classification", ["x", "y"])
    assert np.array_equal(
        np.asarray(data.train.inputs), np.array([[1, 2.5], [3, 4], [5, 60], [7, 8]], dtype=np.float32)
    )
    assert any("only numbers the rows" in note for note in data.notes)


def test_features_go_by_name_not_by_place(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,b,y\n1,2,x\n3,4,z\n5,6,x\n7,8,z\n")
    (tmp_path / "test.csv").write_text("y,b,spare,a\nx,20,0,10\nz,40,1,30\n")
    data = load_data(tmp_path, val=0)
    assert data.test is not None
    assert data.train.columns == data.test.columns == ("a", "b")
    assert np.asarray(data.test.inputs).tolist() == [[10, 20], [30, 40]]
    assert any("not used: 'spare'" in note for note in data.notes)
    (tmp_path / "test.csv").write_text("y,B,a\nx,20,10\nz,40,30\n")
    with pytest.raises(DataError, match=r"test\.csv: 1 feature column that the model was trained on is missing: 'b'"):
        load_data(tmp_path, val=0)


def test_labels_are_not_looked_at_where_they_are_not_needed(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text("text,label\nhello,card\nyou,\n")
    fixed = {"kind": "text", "problem": "classification", "classes": ["card", "top_up"]}
    assert load_samples(path, labels="ignored", **fixed).targets is None  # type: ignore[arg-type]
    with pytest.raises(DataError, match="label column 'label' is empty in 1 row"):
        load_samples(path, **fixed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "a,b,y\n1,2,x\n3,4,x\n5,6,z\n7,?,z\n",
            r"the column 'b' holds 1 cell without a number, first at line 5 \('\?'\).*words=\['b'\]",
        ),
        (
            "a,b,y\n1,2,x\n3,nan,z\n5,inf,z\n",
            r"'b' holds 1 value infinite or beyond float32, first at line 4",
        ),
        ("a,b,y\n1,2,x\n3,1e300,z\n", "beyond float32"),
    ],
)
def test_bad_numeric_table(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "train.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=expected):
        load_data(path, val=0, task="tabular-classification")


def test_labels_of_a_table(tmp_path: Path) -> None:
    ten = write_tsv(tmp_path / "ten.tsv", [(f"text {n}", str(n % 11)) for n in range(44)])
    assert load_data(ten, val=0).classes == [str(n) for n in range(11)]
    twins = write_tsv(tmp_path / "twins.tsv", [(f"text {n}", ("1", "01", "001", "2")[n % 4]) for n in range(8)])
    assert load_data(twins, val=0).classes == ["001", "01", "1", "2"]
    scores = write_tsv(tmp_path / "scores.tsv", [(f"text {n}", f"{n / 4}") for n in range(20)])
    data = load_data(scores, val=0)
    assert data.problem == "regression"
    assert data.train.targets is not None
    assert data.train.targets.tolist() == [n / 4 for n in range(20)]
    tags = write_tsv(tmp_path / "tags.tsv", [("a", "x|y"), ("b", "y; z"), ("c", "z")])
    data = load_data(tags, task="text-multilabel", val=0)
    assert data.classes == ["x", "y", "z"]
    assert data.train.targets is not None
    assert data.train.targets.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
    with pytest.raises(DataError, match=r"regression needs numbers as targets, got 'card' at line 2"):
        load_data(write_tsv(tmp_path / "names.tsv", ROWS), task="text-regression", val=0)
    free = write_tsv(tmp_path / "free.tsv", [("topic", f"a text number {n}") for n in range(30)], ("one", "two"))
    with pytest.raises(DataError, match=r"30 different labels in 30 samples are not classes.*label_column="):
        load_data(free, val=0)


def test_folder_with_tables(tmp_path: Path) -> None:
    write_tsv(tmp_path / "train.tsv", ROWS)
    write_tsv(tmp_path / "dev.tsv", ROWS[:1])
    write_tsv(tmp_path / "test.tsv", ROWS[1:3])
    data = load_data(tmp_path)
    assert data.val is not None
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (4, 1, 2)
    # dev.tsv lacks 'top_up': the labels must not move.
    assert data.val.targets is not None
    assert data.val.targets.tolist() == [0]
    (tmp_path / "train.tsv").rename(tmp_path / "all.tsv")
    with pytest.raises(DataError, match=r"no train\.tsv or train\.csv"):
        load_data(tmp_path)


def test_unknown_label_in_validation(tmp_path: Path) -> None:
    write_tsv(tmp_path / "train.tsv", ROWS)
    write_tsv(tmp_path / "val.tsv", [("a", "card"), ("b", "top-up"), ("c", "top-up"), ("d", "crad")])
    with pytest.raises(
        DataError,
        match=r"val\.tsv: 2 labels that the training data lacks: 'top-up' \(2 samples\), "
        r"'crad' \(1 sample\), first at line 3; nearest: 'top_up'",
    ):
        load_data(tmp_path)


def test_load_samples_reads_labels_by_the_given_classes(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "more.tsv", [("a", "top_up"), ("b", "top_up")])
    samples = load_samples(path, kind="text", problem="classification", classes=["card", "top_up"])
    assert samples.targets is not None
    assert samples.targets.tolist() == [1, 1]
    with pytest.raises(DataError, match="label that the training data lacks: 'top_up'"):
        load_samples(path, kind="text", problem="classification", classes=["card", "money"])
    bare = tmp_path / "bare.csv"
    bare.write_text("text\nhello\nyou\n")
    fixed = {"kind": "text", "problem": "classification", "classes": ["card", "top_up"]}
    assert load_samples(bare, labels="ignored", **fixed).targets is None  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no label column found"):
        load_samples(bare, **fixed)  # type: ignore[arg-type]
    assert list(load_samples("just one text", labels="ignored", **fixed).inputs) == ["just one text"]  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no such file"):
        load_samples("gone.tsv", labels="ignored", **fixed)  # type: ignore[arg-type]


def test_banking77(shared_data: Path) -> None:
    data = load_data(shared_data / "banking77")
    lines = (shared_data / "banking77" / "train.tsv").read_text(encoding="utf-8").split("\n")[1:-1]
    labels = dict(line.split("\t") for line in lines)
    assert data.val is not None
    assert data.test is not None
    assert data.classes == sorted({line.split("\t")[1] for line in lines})
    assert (len(data.train) + len(data.val), len(data.val), len(data.test), len(data.classes)) == (
        10003,
        2001,
        3080,
        77,
    )
    assert data.train.targets is not None
    for text, target in zip(data.train.inputs[:500], data.train.targets[:500].tolist(), strict=True):
        assert labels[text] == data.classes[target]
    warnings = check_data(load_data(shared_data / "banking77", val=0))
    assert any("7 of 3080 texts also are in training" in warning for warning in warnings)


def test_sms_spam_is_told_to_be_imbalanced(shared_data: Path) -> None:
    data = load_data(shared_data / "sms_spam" / "train.tsv", val=0)
    assert data.classes == ["ham", "spam"]
    assert len(data.train) == 4127
    assert any("imbalanced" in warning and "'spam'" in warning for warning in check_data(data))


def test_california_housing_traps(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "california_housing" / "housing.csv"
    with pytest.raises(DataError, match=r"no label column found: it has 'longitude'.*label_column="):
        load_data(source)
    mixed = load_data(source, label_column="median_house_value", val=0)
    assert isinstance(mixed.train.inputs, TableRows)
    assert (mixed.train.inputs.words, mixed.train.inputs.gaps()) == (("ocean_proximity",), {"total_bedrooms": 207})
    with open(source, newline="") as file:
        rows = [row[:-1] for row in csv.reader(file)]
    numeric = tmp_path / "numeric.csv"
    full = [row for row in rows if row[4]]
    with open(numeric, "w", newline="") as file:
        csv.writer(file).writerows(full)
    data = load_data(numeric, label_column="median_house_value", val=0)
    assert data.problem == "regression"
    assert data.train.targets is not None
    expected = np.array(full[1:], dtype=np.float64)
    assert np.array_equal(np.asarray(data.train.inputs), expected[:, :8].astype(np.float32))
    assert np.array_equal(data.train.targets.numpy(), expected[:, 8].astype(np.float32))
    assert check_data(data) == []
