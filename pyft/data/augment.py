"""Random changes of training images. A sample's draw depends on (seed, epoch, sample) alone: never on the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pyft.data.randomness import global_generators_kept, sample_uniforms, seed_global_generators
from pyft.data.raw import nearest
from pyft.errors import ConfigError, DataError

Augment = str | Callable[[torch.Tensor], torch.Tensor]
NAMES = ("none", "flip", "crop", "strong")


def check_augment(augment: Augment) -> None:
    """Raise `ConfigError` unless `augment` is a known name or callable."""
    if not callable(augment) and augment not in NAMES:
        raise ConfigError(
            f"augment={augment!r}: expected one of {', '.join(NAMES)}, or a function of one "
            f"sample{nearest(str(augment), NAMES)}"
        )


def augment_batch(x: torch.Tensor, augment: Augment, seed: int, epoch: int, index: torch.Tensor) -> torch.Tensor:
    """Change each sample of a batch at random.

    Args:
        x: (B, C, H, W) floats, mean about 0 and deviation about 1 for "strong"; any (B, ...) for a function.
        augment: "none"; "flip": left-right, half of the time; "crop": flip and a crop of 60 to 100 % of the area,
            resized back; "strong": crop, brightness, contrast and saturation, and an erased rectangle; or a function
            of one sample (...) giving a tensor, for which `random`, NumPy and torch are seeded per sample.
        index: (B,) int64 sample numbers.

    Raises:
        ConfigError: the name is not known, or `x` is no batch of images.
        DataError: the function gave something of another form.
    """
    check_augment(augment)
    if callable(augment):
        return _by_function(x, augment, seed, epoch, index)
    if augment == "none":
        return x
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or not x.is_floating_point():
        form = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ConfigError(
            f"augment={augment!r}: expected images (B, C, H, W) of floats, got {form}; say augment='none'"
        )
    draws = torch.from_numpy(sample_uniforms(seed, epoch, index.numpy(), 16).astype(np.float32)).to(x.device)
    if augment == "flip":
        return torch.where((draws[:, 0] < 0.5).view(-1, 1, 1, 1), x.flip(-1), x)
    x = random_crop(x, draws[:, :5])
    return erase(jitter(x, draws[:, 5:8]), draws[:, 8:13]) if augment == "strong" else x


def _by_function(
    x: torch.Tensor, function: Callable[[Any], Any], seed: int, epoch: int, index: torch.Tensor
) -> torch.Tensor:
    rows = []
    with global_generators_kept():
        for row, sample in zip(x, index.tolist(), strict=True):
            seed_global_generators(seed, epoch, sample)
            rows.append(function(row))
    if not all(isinstance(row, torch.Tensor) and row.shape == rows[0].shape for row in rows):
        forms = sorted({str(tuple(row.shape)) if isinstance(row, torch.Tensor) else type(row).__name__ for row in rows})
        raise DataError(
            f"augment: the function gave {', '.join(forms)} for samples of one batch; expected tensors of one shape"
        )
    return torch.stack(rows)


def random_crop(x: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Mirror half of the images, and resize a random part of each (60 to 100 % of the area, sides within 3/4 and 4/3).

    Args:
        x: (B, C, H, W).
        draws: (B, 5) in [0, 1).
    """
    batch, _, height, width = x.shape
    side = (0.6 + 0.4 * draws[:, 1]).sqrt()
    stretch = (0.75 + draws[:, 2] * (4 / 3 - 0.75)).sqrt()
    span_x, span_y = (side * stretch).clamp(max=1.0), (side / stretch).clamp(max=1.0)
    shift_x = (1 - span_x) * (2 * draws[:, 3] - 1)
    shift_y = (1 - span_y) * (2 * draws[:, 4] - 1)
    mirror = torch.where(draws[:, 0] < 0.5, -1.0, 1.0)
    # The grid is made by single products, not a matrix product, whose bits may depend on the size of the batch.
    across = _pixel_centres(width, x) * (span_x * mirror).view(-1, 1) + shift_x.view(-1, 1)
    down = _pixel_centres(height, x) * span_y.view(-1, 1) + shift_y.view(-1, 1)
    grid = torch.stack(
        [across[:, None, :].expand(batch, height, width), down[:, :, None].expand(batch, height, width)], dim=-1
    )
    return F.grid_sample(x, grid.to(x.dtype), mode="bilinear", padding_mode="reflection", align_corners=False)


def _pixel_centres(count: int, like: torch.Tensor) -> torch.Tensor:
    """(1, count): centres of pixels, -1 and 1 being the outer edges."""
    return ((torch.arange(count, dtype=torch.float32, device=like.device) * 2 + 1) / count - 1).view(1, -1)


def jitter(x: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Saturation and contrast by a factor 0.7 to 1.3, about grey and about 0; brightness by -0.3 to 0.3.

    Args:
        x: (B, C, H, W), 0 being the mean of the data.
        draws: (B, 3) in [0, 1).
    """
    saturation, contrast, brightness = (draws[:, column].to(x.dtype).view(-1, 1, 1, 1) for column in range(3))
    grey = x[:, :1].clone()
    for channel in range(1, x.shape[1]):
        grey += x[:, channel : channel + 1]
    grey /= x.shape[1]
    saturated = grey + (x - grey) * (0.7 + 0.6 * saturation)
    return saturated * (0.7 + 0.6 * contrast) + (0.6 * brightness - 0.3)


def erase(x: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Set a rectangle (sides 20 to 50 % of the image's) to 0, in half of the images (Zhong et al., arXiv:1708.04896).

    Args:
        x: (B, C, H, W), 0 being the mean of the data.
        draws: (B, 5) in [0, 1).
    """
    _, _, height, width = x.shape
    rows = _inside(height, draws[:, 1], draws[:, 2])
    columns = _inside(width, draws[:, 3], draws[:, 4])
    inside = rows[:, None, :, None] & columns[:, None, None, :] & (draws[:, 0] < 0.5).view(-1, 1, 1, 1)
    return x.masked_fill(inside, 0.0)


def _inside(count: int, size: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """(B, count) bool: the pixels of a stretch of 20 to 50 % of the side."""
    length = ((0.2 + 0.3 * size) * count).round().clamp(min=1)
    start = (place * (count - length + 1)).floor()
    pixels = torch.arange(count, device=size.device).view(1, -1)
    return (pixels >= start.view(-1, 1)) & (pixels < (start + length).view(-1, 1))
