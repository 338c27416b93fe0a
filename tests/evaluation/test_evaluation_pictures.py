"""The pictures are real PNG files of the figures given; nothing of the user's matplotlib state is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pip install 'pyft[report]'")

from pyft.evaluation.pictures import draw_confusion, draw_curves

ROWS = [
    {"stage": "head", "train_loss": 2.0, "val_loss": 1.5, "val_accuracy": 0.5},
    {"stage": "full", "train_loss": 1.0, "val_loss": 1.2, "val_accuracy": 0.7},
    {"stage": "full", "train_loss": 0.5},
]


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_curves_show_the_figures(tmp_path: Path) -> None:
    first = pixels(draw_curves(ROWS, tmp_path / "a.png"))
    assert first.shape[0] > 300
    assert first.shape[1] > 900
    other = [{**row, "train_loss": 3.0 - row["train_loss"]} for row in ROWS]
    assert not np.array_equal(first, pixels(draw_curves(other, tmp_path / "b.png")))


@pytest.mark.parametrize("rows", [[], [{"stage": "full", "train_loss": float("nan")}]])
def test_curves_of_nearly_nothing(tmp_path: Path, rows: list[dict]) -> None:
    assert draw_curves(rows, tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("count", [1, 2, 77])
def test_confusion_of_few_and_many_classes(tmp_path: Path, count: int) -> None:
    confusion = np.eye(count, dtype=np.int64) * 5
    classes = [f"class {i} with a rather long name" for i in range(count)]
    right = pixels(draw_confusion(confusion, classes, tmp_path / "right.png"))
    wrong = pixels(draw_confusion(np.roll(confusion, 1, axis=1), classes, tmp_path / "wrong.png"))
    assert count == 1 or not np.array_equal(right, wrong)


def test_a_class_without_samples_does_not_divide_by_zero(tmp_path: Path) -> None:
    with np.errstate(all="raise"):
        draw_confusion(np.array([[3, 0], [0, 0]]), ["a", "b"], tmp_path / "c.png")
