"""Pictures of a run: learning curves and the confusion matrix."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyft.core.files import write_atomic
from pyft.errors import need


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_run(
    folder: Path, rows: Sequence[dict[str, Any]], confusion: np.ndarray | None, classes: Sequence[str] | None
) -> None:
    """The pictures of a run, into its folder: curves.png, and confusion.png where there is one matrix over classes.

    Args:
        rows: as `draw_curves` takes them.
        confusion: (C, C), or of another shape, or None.
        classes: C names, or None.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    draw_curves(rows, folder / "curves.png")
    if confusion is not None and confusion.ndim == 2 and classes:
        draw_confusion(confusion, classes, folder / "confusion.png")


def draw_curves(rows: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Training loss and validation figures over epochs, as PNG.

    Args:
        rows: one dict per epoch with `stage`, `train_loss` and any `val_*`, as `Result.history`.
        path: of the PNG file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _figure("drawing the learning curves", width=9.0, height=3.6)
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(rows) + 1)
    for name in ("train_loss", "val_loss"):
        if any(name in row for row in rows):
            left.plot(epochs, [row.get(name, np.nan) for row in rows], marker="o", label=name)
    for name in sorted({key for row in rows for key in row if key.startswith("val_") and key != "val_loss"}):
        right.plot(epochs, [row.get(name, np.nan) for row in rows], marker="o", label=name)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        for i in range(1, len(rows)):
            if rows[i].get("stage") != rows[i - 1].get("stage"):
                axes.axvline(i + 0.5, color="grey", linestyle=":")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return _save(figure, path)


def draw_confusion(confusion: np.ndarray, classes: Sequence[str], path: str | Path) -> Path:
    """The confusion matrix, rows true and columns predicted, as PNG. Cells are shares of their row.

    Args:
        confusion: (C, C) counts.
        classes: C names.
        path: of the PNG file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    count = len(classes)
    side = min(4.0 + 0.28 * count, 22.0)
    figure = _figure("drawing the confusion matrix", width=side + 1.0, height=side)
    axes = figure.subplots()
    rows = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(rows, 1)
    image = axes.imshow(shares, vmin=0.0, vmax=1.0, cmap="Blues")
    size = 9 if count <= 12 else 6
    axes.set_xticks(range(count), [str(name)[:30] for name in classes], rotation=90, fontsize=size)
    axes.set_yticks(range(count), [str(name)[:30] for name in classes], fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if count <= 30:
        for i, j in zip(*np.nonzero(confusion), strict=True):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(confusion[i, j]), ha="center", va="center", fontsize=size, color=color)
    figure.colorbar(image, label="share of the true class", fraction=0.04)
    return _save(figure, path)


def _figure(purpose: str, width: float, height: float) -> Any:
    # A figure of its own, without pyplot: no window system, no state shared with the user's plots.
    figure_module = need("matplotlib.figure", "report", purpose)
    return figure_module.Figure(figsize=(width, height), dpi=120, layout="constrained")


def _save(figure: Any, path: str | Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return write_atomic(path, lambda file: file.write(buffer.getvalue()))
