"""Images to tensors: reading, resizing, cropping and scaling, the same in training, evaluation and after export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyft.data.pictures import cropped_pixels, image_fault, read_image, to_rgb
from pyft.errors import ConfigError

__all__ = ["FILTERS", "IMAGENET_MEAN", "IMAGENET_STD", "ImagePreprocess", "image_fault", "read_image", "to_rgb"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")


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
            image: PIL image, path, or uint8 array (H, W, 3).

        Raises:
            DataError: it cannot be read.
        """
        return torch.from_numpy(cropped_pixels(image, self.size, self.resize, self.interpolation))

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
