"""Metrics as plain text that fits 80 columns."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

WIDTH = 80
MAX_CLASSES = 20
PER_LINE = 3


def values_lines(values: Mapping[str, float]) -> list[str]:
    """The values, three to a line."""
    cells = [f"{name.replace('_', ' '):<17}{_number(value):>8}" for name, value in values.items()]
    return ["  ".join(cells[i : i + PER_LINE]) for i in range(0, len(cells), PER_LINE)]


def class_lines(per_class: list[dict[str, Any]]) -> list[str]:
    """One line per class; of many classes the worst by F1, and how many were left out."""
    shown, left_out = per_class, 0
    if len(per_class) > MAX_CLASSES:
        # A class that never occurs has an F1 of 0 that says nothing about the model.
        met = [row for row in per_class if row["support"]]
        shown = sorted(met, key=lambda row: row["f1"])[:MAX_CLASSES]
        left_out = len(per_class) - len(shown)
    names = [fit(str(row["name"]), WIDTH - 4 * 10) for row in shown]
    width = max([cells(name) for name in names] + [len("class")])
    lines = [_pad("class", width) + "".join(f"{head:>10}" for head in ("precision", "recall", "f1", "support"))]
    for name, row in zip(names, shown, strict=True):
        numbers = "".join(f"{row[key]:>10.4f}" for key in ("precision", "recall", "f1"))
        lines.append(f"{_pad(name, width)}{numbers}{row['support']:>10,}")
    if left_out:
        lines.append(f"(the {len(shown)} classes with the lowest f1; {left_out} more in to_dict())")
    return lines


def confused_lines(pairs: Iterable[tuple[str, str, int]]) -> list[str]:
    """The pairs of classes mistaken most often."""
    rows = [f"  {fit(true, 30)} -> {fit(predicted, 30)}: {count:,}" for true, predicted, count in pairs]
    return ["most confused (true -> predicted: times)", *rows] if rows else []


def fit(text: str, width: int) -> str:
    """The text on one line, cut to `width` terminal cells."""
    text = " ".join(text.split())
    if cells(text) <= width:
        return text
    kept = ""
    for letter in text:
        if cells(kept + letter) > width - 3:
            break
        kept += letter
    return kept + "..."


def cells(text: str) -> int:
    """Terminal cells of a text: East Asian wide letters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - cells(text))


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"
