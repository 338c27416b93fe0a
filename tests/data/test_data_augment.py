"""Random changes: a function of (seed, epoch, sample), never of the batch, the threads or a global generator."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from pyft.data.augment import augment_batch, random_crop
from pyft.data.randomness import sample_uniforms
from pyft.errors import ConfigError, DataError

IMAGES = torch.randn(12, 3, 20, 24, generator=torch.Generator().manual_seed(0))
NUMBERS = torch.arange(12)


def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand(()) + float(np.random.rand()) + random.random()


AUGMENTS: list[Any] = ["flip", "crop", "strong", noisy]


@pytest.mark.parametrize("augment", AUGMENTS)
def test_a_sample_does_not_depend_on_its_batch(augment: Any) -> None:
    whole = augment_batch(IMAGES, augment, 3, 5, NUMBERS)
    assert whole.shape == IMAGES.shape
    for part in (torch.tensor([7]), torch.tensor([11, 2, 5]), torch.arange(11, -1, -1)):
        assert torch.equal(augment_batch(IMAGES[part], augment, 3, 5, part), whole[part])


@pytest.mark.parametrize("augment", ["crop", "strong", noisy])
def test_seeds_epochs_and_samples_differ(augment: Any) -> None:
    first = augment_batch(IMAGES, augment, 0, 0, NUMBERS)
    for seed, epoch in ((0, 1), (1, 0)):
        other = augment_batch(IMAGES, augment, seed, epoch, NUMBERS)
        assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    same = augment_batch(IMAGES[:1].expand(12, -1, -1, -1), augment, 0, 0, NUMBERS)
    assert len({tuple(image.flatten().tolist()) for image in same}) == 12


@pytest.mark.parametrize("augment", AUGMENTS)
def test_global_generators_are_left_alone(augment: Any) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = augment_batch(IMAGES, augment, 0, 0, NUMBERS)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1], before[2]) == (np.random.get_state()[1].tolist(), random.getstate())
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    assert torch.equal(augment_batch(IMAGES, augment, 0, 0, NUMBERS), first)


@pytest.mark.parametrize("augment", ["flip", "crop", "strong"])
def test_thread_count_changes_nothing(augment: str) -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(augment_batch(IMAGES, augment, 0, 0, NUMBERS))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_flip_mirrors_about_half() -> None:
    many = torch.randn(1, 3, 4, 5).expand(400, -1, -1, -1)
    result = augment_batch(many, "flip", 0, 0, torch.arange(400))
    flipped = (result == many.flip(-1)).flatten(1).all(1)
    assert bool(((result == many).flatten(1).all(1) ^ flipped).all())
    assert 160 < int(flipped.sum()) < 240


def test_crop_shows_a_part_of_the_image() -> None:
    # The images hold their own coordinates, so the result tells which part was taken.
    across = torch.linspace(-1, 1, 64).view(1, 1, 1, 64).expand(200, 1, 64, 64)
    down = torch.linspace(-1, 1, 64).view(1, 1, 64, 1).expand(200, 1, 64, 64)
    result = augment_batch(torch.cat([across, down], 1), "crop", 0, 0, torch.arange(200))
    span_x = (result[:, 0, 0, -1] - result[:, 0, 0, 0]) / 2
    span_y = (result[:, 1, -1, 0] - result[:, 1, 0, 0]) / 2
    area = (span_x * span_y).abs()
    assert 0.57 < float(area.min()) < 0.65
    assert float(area.max()) > 0.95
    assert 60 < int((span_x < 0).sum()) < 140
    assert bool((span_y > 0).all())
    assert float(result.abs().max()) <= 1.0 + 1e-5


def test_no_crop_is_the_image_itself() -> None:
    # Draws that ask for no mirror, the whole area, no stretch.
    draws = torch.tensor([[0.9, 1.0, 3 / 7, 0.5, 0.5]])
    assert torch.allclose(random_crop(IMAGES[:1], draws), IMAGES[:1], atol=1e-5)


def test_strong_erases_some() -> None:
    result = augment_batch(torch.ones(100, 3, 16, 16), "strong", 0, 0, torch.arange(100))
    erased = (result == 0).all(1).flatten(1).sum(1) / 256
    assert 30 < int((erased > 0).sum()) < 70
    assert float(erased.max()) <= 0.25 + 0.05


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    draws = sample_uniforms(1, 2, np.arange(4000), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.stack([np.histogram(column, 10, (0, 1))[0] for column in draws.T])
    chi_squared = ((counts - 400) ** 2 / 400).sum(1)
    # 99.99 % of the chi-squared distribution with 9 degrees of freedom.
    assert chi_squared.max() < 33.7
    everything = np.concatenate(
        [draws, sample_uniforms(1, 3, np.arange(4000), 4), sample_uniforms(2, 2, np.arange(4000), 4)], 1
    )
    correlation = np.corrcoef(everything.T) - np.eye(12)
    assert np.abs(correlation).max() < 0.07
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.07


def test_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"augment='flipp'.*nearest: 'flip'"):
        augment_batch(IMAGES, "flipp", 0, 0, NUMBERS)
    with pytest.raises(ConfigError, match=r"expected images .* got \(12, 3\)"):
        augment_batch(torch.zeros(12, 3), "flip", 0, 0, NUMBERS)
    with pytest.raises(DataError, match="expected tensors of one shape"):
        augment_batch(IMAGES, lambda x: x[:, : random.randint(2, 9)], 0, 0, NUMBERS)
    assert augment_batch(IMAGES, "none", 0, 0, NUMBERS) is IMAGES
