"""Bad input to finetune: one clear error before any training, no folder left behind, the model as it came."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

import pyft
from pyft.errors import ConfigError, DataError, PyftError

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(60) % 3


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 7))


class Textual(nn.Module):
    """Takes tokens; needs to be told how texts become tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 4), nn.Linear(4, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(input_ids).mean(1))


class PerStep(nn.Module):
    """Gives (B, T, C) where (B, C) is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)[:, None].expand(-1, 5, -1)


class NotANumber(nn.Module):
    """Gives NaN from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) / 0.0 * 0.0


class Stream(IterableDataset):
    """Cannot be read twice in another order."""

    def __iter__(self) -> Iterator[Any]:
        yield X[0], 0


def check(
    tmp_path: Path, model: Any, data: Any, error: type[PyftError], match: str, keywords: dict[str, Any] | None = None
) -> None:
    """finetune raises `error` with `match` in it, and leaves no trace."""
    out = tmp_path / "run"
    before = _state(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=match) as caught:
        pyft.finetune(model, data, **{"out": out, "progress": False, "export": None, "epochs": 1, **(keywords or {})})
    assert "\n" not in str(caught.value)
    assert not out.exists()
    if isinstance(model, nn.Module):
        after = _state(model)
        assert [name for name, _ in before] == [name for name, _ in after]
        for (_, (one, grad, mode)), (_, (two, other_grad, other_mode)) in zip(before, after, strict=True):
            assert one is two
            assert (grad, mode) == (other_grad, other_mode)


def _state(model: nn.Module) -> list[tuple[str, Any]]:
    parameters = [(name, (value, value.requires_grad, None)) for name, value in model.named_parameters()]
    return parameters + [(name, (module, None, module.training)) for name, module in model.named_modules()]


def with_nan(column: int = 2) -> torch.Tensor:
    spoiled = X.clone()
    spoiled[17, column] = float("nan")
    return spoiled


ARRAYS: dict[str, tuple[Callable[[], nn.Module], Any, type[PyftError], str, dict[str, Any]]] = {
    "one class only": (mlp, (X, torch.zeros(60).long()), DataError, "label '0'.*two classes", {}),
    "NaN in inputs": (mlp, (with_nan(), Y), DataError, "NaN or infinite.*row 17, column 2", {"val": 0}),
    "inf in targets": (mlp, (X, np.r_[np.ones(59), np.inf]), DataError, "NaN, infinite", {}),
    "as many labels as samples": (mlp, (X, Y[:50]), DataError, "60.*50|50.*60", {}),
    "no samples": (mlp, (X[:0], Y[:0]), DataError, "no sample|empty", {}),
    "a label that training lacks": (mlp, {"train": (X, Y), "val": (X[:4], [0, 1, 2, 8])}, DataError, "'8'", {}),
    "labels beyond the outputs": (mlp, (X, torch.arange(60) % 10), ConfigError, r"\(4, 10\) is expected",
                                  {"head": None}),
    "not (X, y)": (mlp, (X, Y, Y), DataError, r"expected \(X, y\)", {}),
    "an iterable dataset": (mlp, Stream(), DataError, "map-style", {}),
    "no training set": (mlp, {"val": (X, Y)}, DataError, "'train' is missing", {}),
    "other inputs than the model takes": (mlp, (X[:, :3], Y), ConfigError, r"fails on a batch.*\(4, 3\) float32", {}),
    "weights in half precision": (lambda: mlp().half(), (X, Y), ConfigError,
                                  r"weights in torch\.float16: call model\.float\(\)", {}),
    "weights in float64": (lambda: mlp().double(), (X, Y), ConfigError, r"float64: call model\.float\(\)", {}),
    "whole numbers for a model of numbers": (mlp, (X.long(), Y), ConfigError, r"X\.astype\('float32'\)", {}),
    "one sample": (mlp, (X[:1], Y[:1]), DataError, "the one sample has the label '0'", {}),
    "columns beside no sets": (mlp, {"a": [1.0, 2.0], "label": ["u", "v"]}, DataError, r"pandas\.DataFrame", {}),
    "outputs that do not fit": (PerStep, (X, Y), ConfigError, r"\(4, 5, 3\)", {"head": None}),
    "NaN from the model": (NotANumber, (X, Y), ConfigError, "gives NaN or inf for the first samples", {}),
    "all frozen": (mlp, (X, Y), ConfigError, "^freeze: all parameters are frozen in stage", {"freeze": "*"}),
    "a glob that matches nothing": (mlp, (X, Y), ConfigError, "'encoder.*'.*matches no", {"freeze": "encoder.*"}),
    "no such head": (mlp, (X, Y), ConfigError, "head='classifier'", {"head": "classifier"}),
    "no such strategy": (mlp, (X, Y), ConfigError, "strategy must be", {"strategy": "slow"}),
    "head strategy without a head": (mlp, (X, torch.arange(60) % 7), ConfigError, "needs a head",
                                     {"head": None, "strategy": "head"}),
    "no such task": (mlp, (X, Y), ConfigError, "task='flowers'", {"task": "flowers"}),
    "no such metric": (mlp, (X, Y), ConfigError, "metric='acuracy': expected one of accuracy", {"metric": "acuracy"}),
    "patience without validation": (mlp, (X, Y), ConfigError, "patience=2 needs validation", {"patience": 2, "val": 0}),
    "no such device": (mlp, (X, Y), ConfigError, "device='tpu9'", {"device": "tpu9"}),
    "no such export": (mlp, (X, Y), ConfigError, "export='tflite'", {"export": "tflite"}),
    "no such resume": (mlp, (X, Y), ConfigError, "resume", {"resume": "maybe"}),
    "nothing to resume": (mlp, (X, Y), ConfigError, "there is no run in", {"resume": True}),
    "no epoch": (mlp, (X, Y), ConfigError, "epochs", {"epochs": 0}),
    "negative lr": (mlp, (X, Y), ConfigError, "lr must be", {"lr": -1.0}),
    "no batch": (mlp, (X, Y), ConfigError, "batch_size", {"batch_size": 0}),
    "no such optimizer": (mlp, (X, Y), ConfigError, "optimizer must be", {"optimizer": "adam"}),
    "no such augmentation": (mlp, (X, Y), ConfigError, "augment='spin'", {"augment": "spin"}),
    "an augmentation for pictures": (mlp, (X, Y), ConfigError, "augment='flip'", {"augment": "flip"}),
    "max_length for numbers": (mlp, (X, Y), ConfigError, "max_length=9", {"max_length": 9}),
    "class weights of other number": (mlp, (X, Y), ConfigError, "class_weight", {"class_weight": [1.0, 2.0]}),
    "a loss of another problem": (mlp, (X, Y), ConfigError, "loss='mse'", {"loss": "mse"}),
    "a loss that is no scalar": (mlp, (X, Y), ConfigError, "scalar", {"loss": lambda p, t: p.sum(1)}),
    "a preprocessing that is none": (mlp, (X, Y), ConfigError, "preprocess", {"preprocess": 7}),
    "a share above one": (mlp, (X, Y), PyftError, "val", {"val": 1.5}),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_and_arguments(name: str, tmp_path: Path) -> None:
    model, data, error, match, keywords = ARRAYS[name]
    check(tmp_path, model(), data, error, match, keywords)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


TABLES = {
    "an empty file": ("", "empty"),
    "a header only": ("text\tlabel\n", "no sample|no row|empty|header"),
    "no label column": ("text\tother\tmore\n" + "hello\tx\t1\nbye\ty\t2\n" * 9, "label_column"),
    "one class": ("text\tlabel\nhello\tx\nbye\tx\nwhat\tx\n", "two classes"),
    "a blank text": ("text\tlabel\nhello\tx\n  \ty\nwhat\tx\nwhy\ty\n", "blank|empty.*line 3"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, tmp_path: Path) -> None:
    text, match = TABLES[name]
    check(tmp_path, Textual(), write(tmp_path / "train.tsv", text), DataError, match)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    check(tmp_path, Textual(), str(tmp_path / "tain.tsv"), DataError, r"tain\.tsv")


def test_a_table_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes(b"text\tlabel\n\xff\xfe\x00bad\tx\n")
    check(tmp_path, Textual(), path, DataError, r"train\.tsv")


def test_a_column_of_another_name(tmp_path: Path) -> None:
    path = write(tmp_path / "train.tsv", "text\tlabel\nhello\tx\nbye\ty\n")
    check(tmp_path, Textual(), path, DataError, "'intnt'.*label", {"label_column": "intnt"})


def test_texts_without_a_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "train.tsv", "text\tlabel\n" + "hello\tx\nbye\ty\n" * 5)
    check(tmp_path, Textual(), path, ConfigError, r"preprocess.*tokenizer\.json")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    check(tmp_path, str(tmp_path / "nothing"), (X, Y), ConfigError, "there is no such folder")
    check(tmp_path, 5, (X, Y), ConfigError, "int")


def test_a_label_in_validation_that_training_lacks(tmp_path: Path) -> None:
    train = write(tmp_path / "train.tsv", "text\tlabel\n" + "hello\tgreeting\nbye\tparting\n" * 5)
    val = write(tmp_path / "val.tsv", "text\tlabel\nhello there\tgreeting\nwhat\tqestion\nwhy\tqestion\n")
    check(tmp_path, Textual(), {"train": train, "val": val}, DataError, r"val\.tsv.*'qestion' \(2 samples\)")


def test_images_that_are_none(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pip install 'pyft[image]'")
    for name in ("daisy", "rose"):
        (tmp_path / "flowers" / name).mkdir(parents=True)
        for number in range(3):
            image.new("RGB", (8, 8), (number * 40, 9, 9)).save(tmp_path / "flowers" / name / f"{number}.png")
    write(tmp_path / "flowers" / "rose" / "broken.png", "no picture")
    (tmp_path / "flowers" / "daisy" / "empty.jpg").touch()
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    check(tmp_path, model, tmp_path / "flowers", DataError, r"2 of \d images.*empty\.jpg.*broken\.png")


def test_an_out_that_cannot_be_used(tmp_path: Path) -> None:
    file = write(tmp_path / "file", "mine")
    with pytest.raises(ConfigError, match="is a file"):
        pyft.finetune(mlp(), (X, Y), out=file)
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "thesis.txt", "years of work")
    with pytest.raises(ConfigError, match="not of a run"):
        pyft.finetune(mlp(), (X, Y), out=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    model = mlp()
    head = model[3]
    with pytest.raises(ConfigError, match="cannot be made"):
        pyft.finetune(model, (X, Y), out=file / "run", progress=False, export=None)
    assert model[3] is head
    assert head.out_features == 7


def test_a_fault_at_the_first_step_leaves_no_folder(tmp_path: Path) -> None:
    """A loss that fails in training mode only passes all checks before; the folder without a step is worth nothing."""

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise RuntimeError("not today")
            return self.head(x)

    options: dict[str, Any] = {"progress": False, "export": None, "strategy": "full"}
    for precision in ("fp32", "auto"):
        with pytest.raises(RuntimeError, match="not today"):
            pyft.finetune(Failing(), (X, Y), out=tmp_path / "run", precision=precision, **options)
        assert not (tmp_path / "run").exists()
