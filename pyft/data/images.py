"""Images to tensors: reading, resizing, cropping and scaling, the same in training, evaluation and after export."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyft.data.arrays import is_picture
from pyft.errors import ConfigError, DataError, need

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")

# What Pillow's decoders raise on damaged files.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def read_image(path: str | Path) -> Any:
    """A PIL image in RGB, turned upright by its EXIF orientation.

    16-bit grey is scaled to 8 bits; transparency is dropped; of an animation the first picture is taken.

    Raises:
        DataError: the file is missing, truncated, or not an image.
        MissingExtraError: Pillow is not installed.
    """
    image_module = need("PIL.Image", "image", "reading images")
    try:
        with image_module.open(path) as image:
            return to_rgb(image)
    except (*_DECODE_ERRORS, image_module.DecompressionBombError) as error:
        raise DataError(f"{path}: {_fault(path, error)}; replace or remove it") from None


def to_rgb(image: Any) -> Any:
    """A loaded PIL image in RGB, upright. See `read_image`."""
    ops = need("PIL.ImageOps", "image", "reading images")
    image.load()
    image = ops.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("a float picture has no fixed range; save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _from_16_bit(image: Any) -> Any:
    """Pillow's own conversion clips at 255, which makes most 16-bit pictures white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("a 32-bit picture has no fixed range; save it with 8 or 16 bits")
    module = need("PIL.Image", "image", "reading images")
    return module.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")


def _fault(path: str | Path, error: BaseException) -> str:
    if not os.path.exists(path):
        return "the file does not exist"
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "the file is empty"
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image"
    return f"damaged or truncated ({error})"


def image_fault(image: Any) -> str | None:
    """Why a path or PIL image cannot be decoded, in a few words; None when it can.

    Args:
        image: path, or PIL image.
    """
    image_module = need("PIL.Image", "image", "reading images")
    try:
        if is_picture(image):
            image.load()
            return "it has no pixels" if 0 in image.size else None
        with image_module.open(image) as opened:
            # A JPEG is then decoded at an eighth of its size, which reads, and so checks, all of its data.
            opened.draft("RGB", (1, 1))
            opened.load()
            return "a float picture has no fixed range" if opened.mode == "F" else None
    except (*_DECODE_ERRORS, image_module.DecompressionBombError) as error:
        return "damaged" if is_picture(image) else _fault(image, error)


class ImagePreprocess:
    """Resize the shorter side, crop the centre, scale, subtract `mean`, divide by `std`.

    Args:
        size: height and width of the result, pixels.
        resize: length of the shorter side before the crop, pixels; default: `size`.
        mean: of each of R, G, B, after scaling; default: ImageNet's.
        std: as `mean`.
        scale: factor of the pixel values 0..255.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos", Pillow's antialiased filters.

    Raises:
        ConfigError: a size is not positive, `resize` is below `size`, or `std` is not positive.

    The result is (pixel * scale - mean) / std in float32, as torchvision's Resize, CenterCrop, ToTensor, Normalize.
    """

    def __init__(
        self,
        size: int,
        resize: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        scale: float = 1 / 255,
        interpolation: str = "bilinear",
    ) -> None:
        self.size = int(size)
        self.resize = self.size if resize is None else int(resize)
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.scale = float(scale)
        self.interpolation = interpolation
        if self.size < 1 or self.resize < self.size:
            raise ConfigError(f"size={size}, resize={resize}: expected 1 <= size <= resize, in pixels")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(f"mean={mean}, std={std}: expected three numbers each, std above 0")
        if interpolation not in FILTERS:
            raise ConfigError(f"interpolation={interpolation!r}: expected one of {', '.join(FILTERS)}")

    def pixels(self, image: Any) -> torch.Tensor:
        """(3, size, size) uint8: the picture resized and cropped, not yet scaled.

        Args:
            image: PIL image or path.

        Raises:
            DataError: it cannot be read.
        """
        if is_picture(image):
            try:
                image = to_rgb(image)
            except _DECODE_ERRORS as error:
                raise DataError(f"picture: damaged or of an unknown form ({error})") from None
        else:
            image = read_image(image)
        width, height = image.size
        short = min(width, height)
        if short != self.resize:
            # torchvision's rule: the longer side is cut to a whole pixel.
            size = tuple(self.resize if side == short else int(self.resize * side / short) for side in (width, height))
            image = image.resize(
                size, getattr(need("PIL.Image", "image", "resizing images").Resampling, self.interpolation.upper())
            )
        left, top = (round((side - self.size) / 2) for side in image.size)
        array = np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) uint8 to float32: (pixel * scale - mean) / std."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return pixels.to(torch.float32).mul_(self.scale).sub_(mean).div_(std)

    def __call__(self, image: Any) -> torch.Tensor:
        """(3, size, size) float32 of a PIL image or path."""
        return self.normalise(self.pixels(image)[None])[0]

    def spec(self) -> dict[str, Any]:
        """All that `from_spec` needs, as JSON values."""
        return {
            "kind": "image",
            "size": self.size,
            "resize": self.resize,
            "mean": list(self.mean),
            "std": list(self.std),
            "scale": self.scale,
            "interpolation": self.interpolation,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> ImagePreprocess:
        """The preprocessing that `spec()` described."""
        return cls(**{name: value for name, value in spec.items() if name != "kind"})
