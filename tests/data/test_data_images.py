"""Reading and scaling of images, compared with Pillow and a float64 formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyft.data.images import ImagePreprocess, read_image
from pyft.data.preprocess import ArrayPreprocess, preprocess_from_spec
from pyft.errors import ConfigError, DataError

Image = pytest.importorskip("PIL.Image", reason="pip install 'pyft[image]'")


def noise(width: int, height: int, seed: int = 0) -> Any:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


@pytest.mark.parametrize(
    ("width", "height", "size", "resize"),
    [(32, 32, 32, None), (60, 41, 32, None), (41, 60, 32, 37), (20, 33, 32, 40), (33, 33, 30, 33), (300, 7, 5, None)],
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_against_pillow_and_float64(width: int, height: int, size: int, resize: int | None, interpolation: str) -> None:
    picture = noise(width, height)
    mean, std, scale = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), 1 / 255
    preprocess = ImagePreprocess(size, resize, mean, std, scale, interpolation)
    short = resize or size
    shape = (max(short, int(short * width / height)), max(short, int(short * height / width)))
    resized = picture if min(width, height) == short else picture.resize(shape, Image.Resampling[interpolation.upper()])
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    pixels = np.asarray(resized, dtype=np.float64)[top : top + size, left : left + size]
    expected = ((pixels * scale - mean) / std).transpose(2, 0, 1)
    result = preprocess(picture)
    assert (result.dtype, tuple(result.shape)) == (torch.float32, (3, size, size))
    assert np.abs(result.numpy() - expected).max() < 2e-6
    many = preprocess.normalise(torch.stack([preprocess.pixels(noise(width, height, n)) for n in range(3)]))
    assert torch.equal(many[0], result)


def test_against_torchvision() -> None:
    transforms = pytest.importorskip("torchvision.transforms", reason="pip install torchvision")
    picture = noise(61, 45)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    reference = transforms.Compose(
        [transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    assert torch.allclose(ImagePreprocess(32, 40)(picture), reference(picture), rtol=0, atol=2e-6)


def test_spec_survives_json() -> None:
    preprocess = ImagePreprocess(24, 30, (0.5, 0.5, 0.5), (0.5, 0.25, 0.1), 1 / 127.5, "lanczos")
    again = preprocess_from_spec(json.loads(json.dumps(preprocess.spec())))
    assert isinstance(again, ImagePreprocess)
    assert torch.equal(again(noise(40, 50)), preprocess(noise(40, 50)))
    assert isinstance(preprocess_from_spec({"kind": "array"}), ArrayPreprocess)
    with pytest.raises(ConfigError, match="unknown kind 'sound'"):
        preprocess_from_spec({"kind": "sound"})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 32, "resize": 16}, "resize=16"),
        ({"size": 8, "std": (1, 1, 0)}, "std above 0"),
        ({"size": 8, "mean": (0.5,)}, "three numbers"),
        ({"size": 8, "interpolation": "area"}, "interpolation='area'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        ImagePreprocess(**arguments)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 4), (255, 0, 0))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 8)
    assert tuple(ImagePreprocess(4).pixels(Image.open(tmp_path / "turned.jpg")).shape) == (3, 4, 4)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    source = noise(9, 9).convert(mode)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    source.save(path)
    picture = read_image(path)
    assert (picture.mode, picture.size) == ("RGB", (9, 9))
    assert np.array_equal(np.asarray(picture), np.asarray(source.convert("RGB")))


def test_16_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x.png")
    read = np.asarray(read_image(tmp_path / "x.png"))[..., 0].astype(np.float64)
    assert np.abs(read - values / 65535 * 255).max() <= 0.5


def test_transparent_palette_gives_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    picture = noise(9, 9).quantize(4)
    picture.save(tmp_path / "x.png", transparency=bytes([0, 255, 128, 255]))
    assert read_image(tmp_path / "x.png").mode == "RGB"
    assert not recwarn.list


def test_unreadable_images(tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "zero.png").write_bytes(b"")
    for name, fault in [
        ("cut.jpg", "truncated"),
        ("text.png", "not an image"),
        ("zero.png", "is empty"),
        ("gone.png", "does not exist"),
    ]:
        with pytest.raises(DataError, match=fault) as caught:
            ImagePreprocess(8)(tmp_path / name)
        assert name in str(caught.value)


def test_image_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(64, 64).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"bomb\.png: .*decompression bomb"):
        read_image(tmp_path / "bomb.png")


def test_pixels_can_be_written_to() -> None:
    """torch warns, once in a process, of arrays that cannot: those that Pillow gives."""
    from pyft.data.pictures import cropped_pixels

    for size in (1, 4):
        assert cropped_pixels(Image.new("RGB", (5, 7)), size, size, "bilinear").flags.writeable


def test_missing_pillow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'pyft\[image\]'"):
        read_image(tmp_path / "x.png")
