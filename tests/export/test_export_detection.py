"""Boxes after suppression, in pixels of the picture that was given, against NumPy."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")
image_module = pytest.importorskip("PIL.Image", reason="pip install 'pyft[image]'")

import pyft  # noqa: E402
from pyft.data.images import ImagePreprocess  # noqa: E402
from pyft.errors import ConfigError  # noqa: E402
from pyft.export.detection import boxes_and_logits  # noqa: E402
from pyft.export.onnx import export_module  # noqa: E402
from pyft.export.run import OnnxModel  # noqa: E402

SIZE, RESIZE = 32, 40
CLASSES = ["red", "white", "platelet"]


class Grid(nn.Module):
    """A box and class logits per cell of a grid, from the picture under it."""

    def __init__(self, form: str = "dict") -> None:
        super().__init__()
        self.form = form
        self.conv = nn.Conv2d(3, 4 + len(CLASSES), 8, stride=4, padding=2)

    def forward(self, x):
        found = self.conv(x).flatten(2).transpose(1, 2)
        offset, logits = found[..., :4], found[..., 4:]
        side = x.shape[-1] // 4
        cells = torch.arange(side, dtype=x.dtype) * 4 + 2
        y, x_center = torch.meshgrid(cells, cells, indexing="ij")
        center = torch.stack([x_center.flatten(), y.flatten()], dim=1)
        half = 5 + offset[..., 2:].tanh() * 3
        center = center + offset[..., :2].tanh()
        boxes = torch.cat([center - half, center + half], dim=-1)
        return {"boxes": boxes, "logits": logits} if self.form == "dict" else (boxes, logits)


def suppressed(boxes: np.ndarray, scores: np.ndarray, iou: float, score: float, most: int) -> list[int]:
    """Greedy suppression of one class: indexes of the boxes that stay, best first."""
    order = [i for i in np.argsort(-scores, kind="stable") if scores[i] > score]
    kept: list[int] = []
    for i in order:
        if len(kept) == most:
            break
        a = boxes[i]
        for j in kept:
            b = boxes[j]
            inner = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
            if inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner) > iou:
                break
        else:
            kept.append(i)
    return kept


def expected(model: Grid, preprocess: ImagePreprocess, pictures: list, limits: dict) -> dict[str, np.ndarray]:
    rows = []
    with torch.no_grad():
        boxes, logits = boxes_and_logits(model(torch.stack([preprocess(picture) for picture in pictures])))
    scores = logits.sigmoid().numpy()
    for number, picture in enumerate(pictures):
        width, height = picture.size
        short = min(width, height)
        new = np.array([int(RESIZE * side / short) for side in (width, height)])
        corner = np.array([round((side - SIZE) / 2) for side in new])
        for label in range(len(CLASSES)):
            for i in suppressed(boxes[number].numpy(), scores[number, :, label], **limits):
                place = (boxes[number, i].numpy().astype(np.float64).reshape(2, 2) + corner) * ([width, height] / new)
                rows.append((number, label, scores[number, i, label], *place.ravel()))
    table = np.array(rows).reshape(-1, 7)
    return {"image": table[:, 0], "label": table[:, 1], "score": table[:, 2], "boxes": table[:, 3:]}


def detector(form: str = "dict") -> Grid:
    torch.manual_seed(3)
    model = Grid(form).eval()
    with torch.no_grad():
        model.conv.weight.mul_(3)
    return model


def pictures() -> list:
    folder = Path(os.environ.get("PYFT_TEST_DATA", "../shared/data"), "bccd")
    paths = sorted(folder.rglob("*.jpg"))[:3]
    if not paths:
        pytest.skip(f"no pictures in {folder}")
    return [image_module.open(path).convert("RGB") for path in paths]


@pytest.mark.parametrize("form", ["dict", "pair"])
def test_boxes_of_real_pictures(form: str, tmp_path: Path) -> None:
    model, preprocess, shown = detector(form), ImagePreprocess(SIZE, RESIZE), pictures()
    limits = {"iou": 0.4, "score": 0.3, "max_boxes": 5}
    path = pyft.export_onnx(
        model, tmp_path / "m.onnx", data=shown, preprocess=preprocess, task="detection", classes=CLASSES,
        detection=limits,
    )  # fmt: skip
    file = OnnxModel(path)
    assert [value.name for value in file.inputs] == ["image"]
    found = file.run({"image": np.stack([np.asarray(picture) for picture in shown])})
    limits = {"iou": 0.4, "score": 0.3, "most": 5}
    wanted = expected(model, preprocess, shown, limits)
    assert len(wanted["boxes"]) > 20
    np.testing.assert_array_equal(found["box_image"], wanted["image"])
    np.testing.assert_array_equal(found["box_label_index"], wanted["label"])
    np.testing.assert_allclose(found["box_score"], wanted["score"], atol=1e-5)
    np.testing.assert_allclose(found["boxes"], wanted["boxes"], atol=1e-2)
    assert found["box_label"].tolist() == [CLASSES[int(label)] for label in wanted["label"]]
    # Some boxes reach beyond the crop, none far beyond the picture.
    assert found["boxes"].max() < max(shown[0].size) + 200
    tall = image_module.fromarray(np.asarray(shown[0])[:, :90])
    found, wanted = file.run({"image": np.asarray(tall)[None]}), expected(model, preprocess, [tall], limits)
    np.testing.assert_allclose(found["boxes"], wanted["boxes"], atol=1e-2)


def test_a_picture_without_boxes_gives_none(tmp_path: Path) -> None:
    path = export_module(
        detector(), torch.randn(2, 3, SIZE, SIZE), tmp_path / "m.onnx", task="detection", detection={"score": 1.0}
    )
    found = OnnxModel(path).run({"input": np.zeros((2, 3, SIZE, SIZE), np.float32)})
    assert found["boxes"].shape == (0, 4)
    assert found["box_image"].shape == (0,)
    assert "box_label" not in found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"iou": 1.5}, "iou=1.5, expected a number from 0 to 1"),
        ({"score": True}, "score=True"),
        ({"max_boxes": 0}, "max_boxes=0, expected a whole number"),
        ({"nms": 1}, "unknown 'nms'; expected iou, max_boxes, score"),
    ],
)
def test_limits_that_do_not_fit(given: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_module(detector(), torch.randn(1, 3, SIZE, SIZE), tmp_path / "m.onnx", task="detection", detection=given)


def test_outputs_that_are_no_boxes() -> None:
    with pytest.raises(ConfigError, match=r"must give boxes .* got Tensor"):
        boxes_and_logits(torch.zeros(1, 2, 4))
    with pytest.raises(ConfigError, match=r"got \(1, 2, 5\) and \(1, 2, 3\)"):
        boxes_and_logits((torch.zeros(1, 2, 5), torch.zeros(1, 2, 3)))
