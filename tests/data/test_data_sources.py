"""Arrays, Datasets, DataLoaders, DataFrames and dicts as data; tasks; the fingerprint."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from pyft.data.batches import Batches
from pyft.data.checks import check_data
from pyft.data.sources import load_data, load_samples, parse_task
from pyft.errors import ConfigError, DataError

X = np.arange(24, dtype=np.float32).reshape(12, 2)
Y = np.array([0, 1] * 6)


def targets_of(data: Any) -> list[Any]:
    return data.train.targets.tolist()


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("auto", (None, None)),
        ("text-classification", ("text", "classification")),
        ("image_classification", ("image", "classification")),
        ("tabular-regression", ("array", "regression")),
        ("multilabel", (None, "multilabel")),
        ("text-multilabel", ("text", "multilabel")),
        ("Regression", (None, "regression")),
    ],
)
def test_parse_task(task: str, expected: tuple[str | None, str | None]) -> None:
    assert parse_task(task) == expected


def test_parse_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"task='text-clasification'.*nearest: 'text-classification'"):
        parse_task("text-clasification")


@pytest.mark.parametrize(
    ("y", "task", "problem", "classes", "expected"),
    [
        (np.array([0, 1, 2, 1]), "auto", "classification", ["0", "1", "2"], [0, 1, 2, 1]),
        (torch.tensor([3, 10, 3, 7]), "auto", "classification", ["3", "7", "10"], [0, 2, 0, 1]),
        (["b", "a", "b", "c"], "auto", "classification", ["a", "b", "c"], [1, 0, 1, 2]),
        (np.array(["b", "a", "b", "c"], dtype=object), "auto", "classification", ["a", "b", "c"], [1, 0, 1, 2]),
        ([True, False, True, False], "auto", "classification", ["0", "1"], [1, 0, 1, 0]),
        (np.array([[0], [1], [1], [0]]), "auto", "classification", ["0", "1"], [0, 1, 1, 0]),
        (np.array([0.0, 1.0, 1.0, 0.0]), "classification", "classification", ["0", "1"], [0, 1, 1, 0]),
        (np.array([[1, 0], [0, 1], [0, 1], [1, 0]]), "classification", "classification", ["0", "1"], [0, 1, 1, 0]),
        (np.array([0.5, 1.5, 2.0, 3.0]), "auto", "regression", None, [0.5, 1.5, 2.0, 3.0]),
        (np.array([4, 5, 6, 7]), "regression", "regression", None, [4.0, 5.0, 6.0, 7.0]),
        (np.array([[0.5], [1.5], [2.0], [3.0]]), "auto", "regression", None, [0.5, 1.5, 2.0, 3.0]),
        (
            np.array([[1, 1], [0, 1], [0, 0], [1, 0]]),
            "auto",
            "multilabel",
            ["0", "1"],
            [[1, 1], [0, 1], [0, 0], [1, 0]],
        ),
        ([["b"], ["a", "b"], [], ["a"]], "auto", "multilabel", ["a", "b"], [[0, 1], [1, 1], [0, 0], [1, 0]]),
    ],
)
def test_meaning_of_labels(y: Any, task: str, problem: str, classes: list[str] | None, expected: list[Any]) -> None:
    data = load_data((X[:4], y), task=task, val=0)
    assert (data.kind, data.problem, data.classes, targets_of(data)) == ("array", problem, classes, expected)
    assert data.train.targets is not None
    assert data.train.targets.dtype == (torch.int64 if problem == "classification" else torch.float32)


@pytest.mark.parametrize(
    ("y", "task", "expected"),
    [
        ([0, 1, -1, -1], "auto", r"2 labels negative, first -1 at row 2"),
        ([0, 1, 2**40, 0], "auto", "1 label beyond 1000000"),
        (np.array([0, 1, 2**64 - 1, 0], dtype=np.uint64), "auto", "1 label beyond 1000000"),
        ([0.5, 1.0, 1.0, 0.0], "classification", "1 label not a whole number, first 0.5 at row 0"),
        ([0.5, float("nan"), float("inf"), 0.0], "auto", "2 targets NaN, infinite .* first at row 1"),
        ([0.0, float("nan"), 1.0, 0.0], "classification", "1 label not a whole number, first nan at row 1"),
        (["a", None, "b", "a"], "auto", "1 label missing, first at row 1"),
        (["a", 1, "b", "a"], "auto", "labels are of mixed types: str at row 0, int at row 1"),
        (np.zeros((4, 2, 2)), "auto", r"y has shape \(4, 2, 2\)"),
        ([0, 1, 0], "auto", "X has 4 samples, y has 3 labels"),
        (np.array([[1, 1], [0, 1], [0, 0], [1, 0]]), "classification", "classification needs y of shape"),
        (np.array(1), "auto", "expected 4 labels"),
        (np.array(["2020-01-01"] * 4, dtype="datetime64[D]"), "auto", "neither names nor numbers"),
    ],
)
def test_bad_labels(y: Any, task: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load_data((X[:4], y), task=task, val=0)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (np.array([[1, "a"], [2, "b"]], dtype=object), "object array of shape"),
        ([np.zeros(2), np.zeros(3)], "different shapes or hold no numbers"),
        ([torch.zeros(2), torch.zeros(3)], "different shapes or hold no numbers"),
        (np.zeros((0, 3)), "there is no sample"),
        ([], "there is no sample"),
        (np.float32(3), "expected an array, tensor, or list"),
        (np.array([1 + 2j, 3]), "complex numbers"),
        (np.array([["a"], ["b"]], dtype="S1"), "got an array of dtype"),
        (["a text", 3], "row 1 is int, row 0 is str"),
        (np.array([[1e39], [0.0]]), "1 value beyond float32"),
        (["gone.png", "away.jpg"], "2 of 2 image files missing: 'gone.png'"),
    ],
)
def test_bad_inputs(x: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load_data((x, [0, 1][: len(x) if hasattr(x, "__len__") else 1]), val=0)


def test_nan_in_inputs_is_counted_and_placed() -> None:
    x = X.copy()
    x[3, 1], x[3, 0], x[7, 0] = np.nan, np.inf, np.nan
    with pytest.raises(
        DataError,
        match=r"X \(train\): 3 inputs NaN or infinite, in 2 rows, first at row "
        "3, column 0",
    ):
        check_data(load_data((x, Y), val=0))


def test_sparse_matrix_is_refused() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(DataError, match=r"sparse matrices are not supported; pass X\.toarray"):
        load_data((sparse.csr_matrix(X), Y))


def test_dtypes_and_layout_of_arrays() -> None:
    big_endian = X.astype(">f8")[::-1]
    assert torch.equal(load_data((big_endian, Y), val=0).train.inputs, torch.from_numpy(X[::-1].copy()))  # type: ignore[arg-type]
    for given, wanted in [
        (np.int32, torch.int64),
        (np.uint8, torch.float32),
        (np.float16, torch.float32),
        (bool, torch.float32),
    ]:
        assert load_data((X.astype(given), Y), val=0).train.inputs[0].dtype == wanted
    frozen = X.copy()
    frozen.flags.writeable = False
    assert torch.equal(load_data((frozen, Y), val=0).train.inputs, torch.from_numpy(X))  # type: ignore[arg-type]
    wanting = torch.from_numpy(X).requires_grad_()
    assert not load_data((wanting, Y), val=0).train.inputs.requires_grad  # type: ignore[union-attr]
    assert any("channels last" in note for note in load_data((np.zeros((4, 8, 8, 3)), [0, 1, 0, 1]), val=0).notes)


def test_texts_and_labels() -> None:
    data = load_data((["a b", "c d", "e", "f"], ["x", "y", "x", "y"]), val=0)
    assert (data.kind, data.classes) == ("text", ["x", "y"])
    assert load_data((np.array(["a b", "c d"]), [0, 1]), val=0).kind == "text"
    with pytest.raises(DataError, match=r"the task or model takes image inputs|2 of 2 image files missing"):
        load_data((["a b", "c d"], [0, 1]), task="image-classification")
    with pytest.raises(DataError, match="the task or model takes array inputs, but X holds texts"):
        load_data((["a b", "c d"], [0, 1]), task="tabular-classification")
    with pytest.raises(DataError, match=r"X \(train\): 2 of 3 texts blank, first at row 1"):
        check_data(load_data((["a", " ", ""], [0, 1, 0]), val=0))


def test_pairs_given_in_another_way() -> None:
    with pytest.raises(DataError, match=r"there are no labels; give \(X, y\)"):
        load_data(X)
    with pytest.raises(DataError, match="got a tuple of 3"):
        load_data((X, Y, X))
    with pytest.raises(DataError, match=r"give \{'train': \(X, y\)"):
        load_data(((X, Y), (X, Y)))
    with pytest.raises(DataError, match="expected a path, a folder"):
        load_data(3)
    with pytest.raises(DataError, match="can only be read in a row"):
        load_data(iter([1, 2]))
    assert targets_of(load_data([X, Y], val=0)) == Y.tolist()
    assert targets_of(load_data([(row, int(label)) for row, label in zip(X, Y, strict=True)], val=0)) == Y.tolist()


def test_dict_of_sets() -> None:
    data = load_data({"train": (X, Y), "valid": (X[:3], [1, 1, 1]), "test": (X[:2], [0, 0])})
    assert data.val is not None
    assert data.val.targets is not None
    assert data.test is not None
    # Validation lacks class 0: its labels must not shift.
    assert data.val.targets.tolist() == [1, 1, 1]
    assert len(data.train) == 12
    with pytest.raises(
        DataError,
        match=r"val X: 1 label that the training data lacks: '2' \(2 samples\), first at "
        "row 1",
    ):
        load_data({"train": (X, Y), "val": (X[:3], [0, 2, 2])})
    with pytest.raises(DataError, match=r"unknown key 'tset'.*nearest: 'test'"):
        load_data({"train": (X, Y), "tset": (X, Y)})
    with pytest.raises(DataError, match="the key 'train' is missing"):
        load_data({"val": (X, Y)})
    with pytest.raises(DataError, match=r"samples have shape \(1,\), the training samples \(2,\)"):
        load_data({"train": (X, Y), "val": (X[:, :1], Y)})
    with pytest.raises(DataError, match="X: the task or model takes array inputs, but X holds texts"):
        load_data({"train": (X, Y), "val": (["a", "b"], [0, 1])})
    with pytest.raises(DataError, match="expected one set, got a dict"):
        load_samples({"test": (X, Y)}, kind="array", problem="classification", classes=["0", "1"])


def test_numbers_as_positions_of_named_classes() -> None:
    fixed: Any = {"kind": "array", "problem": "classification", "classes": ["cat", "dog"]}
    samples = load_samples((X, Y), **fixed)
    assert samples.targets is not None
    assert samples.targets.tolist() == Y.tolist()
    with pytest.raises(DataError, match=r"1 label outside 0\.\.1, first 2 at row 3"):
        load_samples((X[:4], [0, 1, 0, 2]), **fixed)
    assert load_samples(X, labels="ignored", **fixed).targets is None
    with pytest.raises(DataError, match="X: 1 input NaN or infinite, in 1 row, first at row 1, column 0"):
        load_samples((np.array([[0.0, 1.0], [np.nan, 2.0]]), [0, 1]), **fixed)
    with pytest.raises(DataError, match="data: 1 of 2 texts blank, first at row 1"):
        load_samples(["a", ""], kind="text", problem="classification", classes=["0", "1"], labels="ignored")


class Noisy(Dataset[Any]):
    """Gives an input that differs on each read, as a Dataset with random transforms does."""

    def __init__(self, draw: Any, count: int = 10) -> None:
        self.draw = draw
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return torch.tensor([number, self.draw()], dtype=torch.float32), number % 2


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), lambda: np.random.rand(), random.random])
def test_random_dataset_draws_by_seed_epoch_and_sample(draw: Any) -> None:
    data = load_data(Noisy(draw), val=0)
    assert any("another form each time" in note for note in data.notes)

    def epoch(seed: int, number: int, batch_size: int) -> dict[int, float]:
        found = {}
        for batch in Batches(data.train, None, batch_size, seed=seed).epoch(number):
            found.update(zip(batch.index.tolist(), batch.inputs[:, 1].tolist(), strict=True))  # type: ignore[index]
        return found

    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = epoch(0, 0, 4)
    assert len(set(first.values())) == 10
    assert epoch(0, 0, 3) == first
    assert all(first[sample] != value for other in (epoch(0, 1, 4), epoch(1, 0, 4)) for sample, value in other.items())
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1], before[2]) == (np.random.get_state()[1].tolist(), random.getstate())


def test_dataset_kinds() -> None:
    tensors = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    assert isinstance(load_data(tensors, val=0).train.inputs, torch.Tensor)
    part = Subset(tensors, [1, 3, 4])
    assert targets_of(load_data(part, val=0)) == [1, 1, 0]

    class Named(Noisy):
        classes = ("cat", "dog", "eel")

    data = load_data({"train": Named(lambda: 0.0), "val": Subset(Named(lambda: 0.0), [1, 3])})
    assert data.classes == ["cat", "dog", "eel"]
    assert data.val is not None
    assert data.val.targets is not None
    assert data.val.targets.tolist() == [1, 1]
    # As torchvision's ImageFolder on a validation folder that lacks a class: 0 then means another one.
    lacking = Named(lambda: 0.0)
    lacking.classes = ("dog", "eel")  # type: ignore[misc]
    data = load_data({"train": Named(lambda: 0.0), "val": lacking})
    assert data.val is not None
    assert data.val.targets is not None
    assert data.val.targets.tolist() == [1, 2] * 5
    texts = [{"text": f"words {n}", "label": n % 2, "id": n} for n in range(6)]

    class Rows(Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, number: int) -> Any:
            return texts[number]

    assert load_data(Rows(), val=0).kind == "text"
    assert list(load_data(Rows(), val=0).train.inputs) == [row["text"] for row in texts]


def test_split_of_a_lazy_dataset() -> None:
    data = load_data(Noisy(lambda: 0.0, 20), val=0.25)
    assert data.val is not None
    read = {int(data.val.inputs[n][0]): int(data.val.targets[n]) for n in range(5)}  # type: ignore[index]
    assert len(read) == 5
    assert all(label == number % 2 for number, label in read.items())
    assert load_data(Noisy(lambda: 0.0, 20), val=0.25).fingerprint == data.fingerprint
    assert load_data(Noisy(lambda: 1.0, 20), val=0.25).fingerprint != data.fingerprint


def test_bad_datasets() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield X[0], 0

    for stream in (Stream(), DataLoader(Stream())):
        with pytest.raises(DataError, match=r"is an IterableDataset.*give a map-style Dataset"):
            load_data(stream)
    with pytest.raises(DataError, match="expected a Dataset whose items are"):
        load_data(TensorDataset(torch.zeros(3, 2), torch.zeros(3), torch.zeros(3)))
    with pytest.raises(DataError, match=r"sample 1 has shape \(3,\), sample 0 has \(2,\)"):
        load_data([(np.zeros(2), 0), (np.zeros(3), 1)])
    with pytest.raises(DataError, match="the input of sample 1 holds NaN"):
        load_data([(np.zeros(2), 0), (np.full(2, np.nan), 1)])
    with pytest.raises(DataError, match="the input of sample 0 is object"):
        load_data([(object(), 0), (object(), 1)])
    with pytest.raises(DataError, match="a Dataset item has the keys 'input_ids', 'mask'"):
        load_data(ListDataset([{"input_ids": [1], "mask": [1]}]))
    with pytest.raises(DataError, match="the Dataset is empty"):
        load_data(ListDataset([]))


class ListDataset(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        return self.items[number]


def test_dataloader_gives_its_dataset() -> None:
    tensors = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    data = load_data(DataLoader(tensors, batch_size=5, shuffle=True), val=0)
    assert targets_of(data) == Y.tolist()
    assert any("are not used: pyft makes the batches itself" in note for note in data.notes)
    some = load_data(DataLoader(tensors, sampler=SubsetRandomSampler([4, 5, 7])), val=0)
    assert sorted(some.train.inputs[:, 0].tolist()) == [8.0, 10.0, 14.0]  # type: ignore[index]


class Frame:
    """The part of a DataFrame that pyft uses."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.data = columns
        self.columns = list(columns)

    def __getitem__(self, name: str) -> Any:
        return np.asarray(self.data[name])

    def to_numpy(self) -> Any:
        return np.stack([np.asarray(column) for column in self.data.values()], 1)


def test_data_frame() -> None:
    data = load_data(Frame({"a": [1.5, 2.5, 3.5, 4.0], "b": [1, 2, 3, 4], "target": [0, 1, 0, 1]}), val=0)
    assert (data.kind, data.problem) == ("array", "classification")
    assert data.train.inputs[1].tolist() == [2.5, 2.0]
    words = load_data(Frame({"text": np.array(["a", "b"], object), "label": np.array(["x", "y"], object)}), val=0)
    assert (words.kind, words.classes) == ("text", ["x", "y"])
    with pytest.raises(DataError, match="the text column 'text' is empty in 1 row, first at row 1"):
        load_data(Frame({"text": np.array(["a", float("nan")], object), "label": [0, 1]}), val=0)
    with pytest.raises(DataError, match=r"DataFrame: the column 'a' holds 1 value infinite.*first at row 0"):
        load_data(Frame({"a": [float("inf"), 1.0], "label": [0, 1]}), val=0)


def test_real_pandas_frame() -> None:
    pandas = pytest.importorskip("pandas", reason="pip install pandas")
    frame = pandas.DataFrame({"text": ["a", "b", "c"], "label": pandas.Categorical(["x", "y", "x"])})
    data = load_data(frame, val=0)
    assert (data.kind, data.classes, targets_of(data)) == ("text", ["x", "y"], [0, 1, 0])
    assert targets_of(load_data((frame["text"], frame["label"]), val=0)) == [0, 1, 0]


def test_fingerprint_sees_every_change(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    y = np.arange(40) % 3
    base = load_data((x, y)).fingerprint
    assert load_data((x.copy(), y.copy())).fingerprint == base
    changed, relabelled = x.copy(), y.copy()
    changed[5, 1] += 1e-6 + abs(changed[5, 1]) * 1e-6
    relabelled[7] = (relabelled[7] + 1) % 3
    others = [
        load_data((changed, y)),
        load_data((x, relabelled)),
        load_data((x, y), seed=1),
        load_data((x, y), val=0.3),
    ]
    others += [load_data((x, [f"name{n}" for n in y])), load_data((x[::-1], y[::-1]))]
    assert len({base, *(data.fingerprint for data in others)}) == 7
    unsplit = [load_data((x, labels), val=0).fingerprint for labels in (y, relabelled)]
    assert unsplit[0] != unsplit[1]
    texts = ["ab", "c", "d", "e"]
    shifted = ["a", "bc", "d", "e"]
    assert load_data((texts, [0, 1, 0, 1]), val=0).fingerprint != load_data((shifted, [0, 1, 0, 1]), val=0).fingerprint


def test_source_and_kind_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,label\na,x\nb,y\n")
    assert load_data(str(path), val=0).source == str(path)
    assert load_data((X, Y)).source is None


def test_a_bad_row_is_named_by_its_place_in_the_users_data() -> None:
    x, y = torch.randn(40, 3), torch.arange(40) % 2
    x[17, 2] = float("nan")
    with pytest.raises(DataError, match=r"\b17\b"):
        load_data((x, y), val=0.5, seed=1)


def test_one_class_is_counted_over_all_of_the_users_data() -> None:
    with pytest.raises(DataError, match="all 10 samples"):
        load_data((torch.randn(10, 2), ["a"] * 10), val=0.2)
