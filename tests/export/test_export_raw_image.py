"""Resize, crop and scaling in the graph against Pillow, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")
image_module = pytest.importorskip("PIL.Image", reason="pip install 'pyft[image]'")

from lone_graphs import session_of  # noqa: E402

from pyft.data.images import FILTERS, ImagePreprocess  # noqa: E402
from pyft.errors import ConfigError  # noqa: E402
from pyft.export.onnx import export_module  # noqa: E402
from pyft.export.raw_image import image_front  # noqa: E402
from pyft.export.run import OnnxModel  # noqa: E402

# (height, width): one pixel, lines, no change, larger and smaller, wide and tall, halves in the crop and the size.
SIZES = [(1, 1), (1, 9), (23, 1), (40, 40), (40, 45), (61, 40), (20, 20), (3, 4), (80, 80), (120, 121), (375, 500)]
SIZES += [(500, 333), (208, 100), (100, 208), (640, 33), (41, 119), (37, 300)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise, half of it of 0 and 255 alone, where filters overshoot."""
    generator = np.random.default_rng([seed, height, width])
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(pixels > 127, 255, 0).astype(np.uint8) if generator.random() < 0.5 else pixels


def made(session, *pictures: np.ndarray) -> np.ndarray:
    return session.run(None, {"image": np.stack(pictures)})[0]


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("size", "resize"), [(1, 1), (7, 9), (16, 16), (33, 40), (64, 65)])
def test_every_filter_gives_the_bits_of_pillow(interpolation: str, size: int, resize: int) -> None:
    preprocess = ImagePreprocess(size, resize, interpolation=interpolation)
    session = session_of(image_front(preprocess.spec(), ["input"]))
    for height, width in SIZES:
        pixels = picture(height, width, size)
        expected = preprocess(image_module.fromarray(pixels)).numpy()
        np.testing.assert_array_equal(made(session, pixels)[0], expected, err_msg=f"{height}x{width}")


def test_a_large_photograph() -> None:
    preprocess = ImagePreprocess(224, 256, interpolation="bicubic")
    session = session_of(image_front(preprocess.spec(), ["input"]))
    pixels = picture(2000, 3000)
    np.testing.assert_array_equal(made(session, pixels)[0], preprocess(image_module.fromarray(pixels)).numpy())


def test_a_batch_is_each_picture_alone() -> None:
    preprocess = ImagePreprocess(20, 24, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), scale=1 / 127)
    session = session_of(image_front(preprocess.spec(), ["input"]))
    pictures = [picture(50, 70, seed) for seed in range(3)]
    expected = np.stack([preprocess(image_module.fromarray(pixels)).numpy() for pixels in pictures])
    np.testing.assert_array_equal(made(session, *pictures), expected)


def test_the_order_of_the_passes_follows_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow 13 resizes some tall pictures along columns first, which rounds otherwise; before, never."""
    spec = ImagePreprocess(32, 40).spec()
    tall = picture(300, 90, 1)
    sessions = []
    for version in ("12.2.0", "13.0.0"):
        monkeypatch.setattr("PIL.__version__", version)
        sessions.append(session_of(image_front(spec, ["input"])))
    results = [made(session, tall) for session in sessions]
    assert not np.array_equal(*results)
    level = 1 / 255 / np.array([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    assert (np.abs(results[0] - results[1]) <= 1.01 * level).all()
    np.testing.assert_array_equal(*(made(session, picture(90, 300)) for session in sessions))


def test_the_whole_file_takes_pictures_of_any_size(tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    preprocess = ImagePreprocess(16, 18)
    path = export_module(
        net,
        torch.randn(2, 3, 16, 16),
        tmp_path / "m.onnx",
        inputs="raw",
        preprocess=preprocess.spec(),
        classes=["a", "b"],
    )
    model = OnnxModel(path)
    assert [(v.name, v.dtype, v.shape) for v in model.inputs] == [
        ("image", np.dtype(np.uint8), ("batch", "height", "width", 3))
    ]
    assert model.meta.inputs_form == "raw"
    assert model.meta.extra["pillow.version"] == image_module.__version__
    for count, size in ((1, (40, 30)), (2, (16, 16)), (7, (9, 200))):
        pictures = [picture(*size, seed) for seed in range(count)]
        inputs = torch.stack([preprocess(image_module.fromarray(pixels)) for pixels in pictures])
        expected = net(inputs).detach().numpy()
        given = model.run({"image": np.stack(pictures)})
        np.testing.assert_allclose(given["logits"], expected, atol=1e-6)
        assert given["label"].tolist() == [["a", "b"][index] for index in expected.argmax(1)]


def test_what_it_cannot_stand_before(tmp_path) -> None:
    spec = ImagePreprocess(8).spec()
    with pytest.raises(ConfigError, match=r"takes one input, this one takes a, b: give inputs='tensor'"):
        image_front(spec, ["a", "b"])
    with pytest.raises(ConfigError, match=r"kind 'callable'"):
        export_module(
            nn.Flatten(), torch.rand(1, 3, 8, 8), tmp_path / "m.onnx", inputs="raw", preprocess={"kind": "callable"}
        )
