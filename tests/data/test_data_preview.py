"""Samples as plain values: what a report shows of them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyft.data.preview import MAX_LETTERS, preview
from pyft.data.table_rows import TableRows
from pyft.errors import DataError
from pyft.samples import Samples


def opened(uri: str) -> Any:
    image = pytest.importorskip("PIL.Image")
    head, _, content = uri.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return image.open(io.BytesIO(base64.b64decode(content)))


def test_texts_are_cut() -> None:
    samples = Samples("text", ["short", "x" * (MAX_LETTERS + 1)], None)
    assert preview(samples, 0) == {"text": "short", "cut": False}
    assert preview(samples, 1) == {"text": "x" * MAX_LETTERS, "cut": True}


def test_a_picture_becomes_a_small_one(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    image.new("RGB", (800, 400), (10, 200, 30)).save(path)
    found = preview(Samples("image", [path], None), 0)
    small = opened(found["picture"])
    assert small.size == (192, 96)
    assert np.abs(np.asarray(small.convert("RGB"), int) - (10, 200, 30)).max() < 6
    assert (found["path"], found["size"]) == (str(path.resolve()), [800, 400])
    inside = preview(Samples("image", [image.open(path)], None), 0)
    assert inside["path"] is None
    with pytest.raises(DataError, match="gone"):
        preview(Samples("image", [tmp_path / "gone.png"], None), 0)


def test_rows_of_a_table_keep_their_names() -> None:
    samples = Samples("array", torch.tensor([[1.5, float("nan")]]), None, columns=("a", "b"))
    found = preview(samples, 0)
    assert found == {"values": [1.5, None], "shape": [2], "columns": ["a", "b"], "picture": None}
    json.dumps(found, allow_nan=False)


def test_rows_with_words_and_gaps() -> None:
    columns = {"town": np.array(["Ulm", ""], dtype=object), "age": np.float32([31, np.nan])}
    samples = Samples("array", TableRows(columns), None, columns=("town", "age"))
    assert preview(samples, 0) == {"values": ["Ulm", 31.0], "shape": [2], "columns": ["town", "age"], "picture": None}
    assert preview(samples, 1)["values"] == ["", None]


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 8, 8)])
def test_arrays_of_the_shape_of_a_picture_are_drawn(shape: tuple[int, ...]) -> None:
    values = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    drawn = np.asarray(opened(preview(Samples("array", values, None), 1)["picture"]), dtype=float)
    sample = values[1].numpy()
    wanted = (sample - sample.min()) / (sample.max() - sample.min()) * 255
    wanted = wanted.reshape(8, 8) if shape[0] != 3 else wanted.transpose(1, 2, 0)
    assert np.abs(drawn - wanted).max() <= 0.5


@pytest.mark.parametrize("values", [torch.zeros(1, 50, 4), torch.zeros(1, 3), torch.full((1, 8, 8), float("inf"))])
def test_other_arrays_are_not(values: torch.Tensor) -> None:
    assert preview(Samples("array", values, None), 0)["picture"] is None


def test_large_arrays_are_not_copied() -> None:
    found = preview(Samples("array", torch.zeros(1, 3, 100, 100), None), 0)
    assert found["values"] is None
    assert found["shape"] == [3, 100, 100]
    assert found["picture"] is not None
