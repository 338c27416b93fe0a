"""Cutting a validation set off the training data: a function of targets and seed, the same on any machine."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from pyft.data.randomness import random_keys
from pyft.data.raw import counted, listed
from pyft.errors import DataError
from pyft.samples import Problem

_SPLIT = 0x5711
"""Keeps the draws of the split apart from those of the batches of the same seed."""


def val_count(val: Any, count: int) -> int:
    """How many of `count` samples a `val` of float fraction or int number asks for; 0 for None and 0.

    Raises:
        DataError: `val` is no number, negative, NaN, a fraction of 1 or more, or leaves one side empty.

    >>> val_count(0.2, 10), val_count(3, 10), val_count(None, 10)
    (2, 3, 0)
    """
    if val is None:
        return 0
    if isinstance(val, bool) or not isinstance(val, int | float | np.integer | np.floating):
        raise DataError(f"val={val!r}: expected a fraction below 1, a number of samples, or 0 for none")
    if isinstance(val, int | np.integer):
        wanted = int(val)
        if wanted < 0 or wanted >= max(count, 1):
            raise DataError(f"val={val}: expected 0 to {count - 1} samples for validation out of {count}")
        return wanted
    if math.isnan(val) or val < 0 or val >= 1:
        raise DataError(f"val={val}: expected a fraction from 0 to below 1, or a whole number of samples")
    wanted = math.floor(val * count + 0.5)
    if val > 0 and (wanted < 1 or wanted >= count):
        raise DataError(
            f"val={val}: {counted(count, 'sample')} cannot be split: {wanted} for validation; "
            f"give more data, your own 'val' set, or val=0"
        )
    return wanted


def split_samples(
    targets: torch.Tensor, problem: Problem, val: Any, *, stratify: bool, seed: int, classes: list[str] | None
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Sample numbers for training and validation, each ascending int64, and notes.

    Stratified: each class gives validation its share, within one sample, and keeps at least one sample in training.
    For multilabel a sample counts for the rarest of its labels; for regression the split is at random.

    Args:
        targets: as `Samples.targets`.
        val: see `val_count`.

    Raises:
        DataError: see `val_count`; or there are too few samples of each class.
    """
    count = len(targets)
    wanted = val_count(val, count)
    keys = random_keys(count, seed, _SPLIT)
    if not wanted:
        return torch.arange(count), torch.empty(0, dtype=torch.int64), []
    if problem == "regression" or not stratify:
        chosen = np.argsort(keys, kind="stable")[:wanted]
        notes: list[str] = []
    else:
        strata = targets.numpy() if problem == "classification" else _rarest_label(targets.numpy())
        chosen, notes = _stratified(strata, keys, wanted, val, classes)
    inside = np.zeros(count, dtype=bool)
    inside[chosen] = True
    return torch.from_numpy(np.flatnonzero(~inside)), torch.from_numpy(np.flatnonzero(inside)), notes


def _rarest_label(targets: np.ndarray) -> np.ndarray:
    """(N,) int64: the rarest label of each (N, C) row; C for rows without a label."""
    totals = targets.sum(0)
    rank = np.where(targets > 0, totals[None, :], np.inf)
    return np.where(targets.any(1), rank.argmin(1), targets.shape[1])


def _stratified(
    strata: np.ndarray, keys: np.ndarray, wanted: int, val: Any, classes: list[str] | None
) -> tuple[np.ndarray, list[str]]:
    present, inverse, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    room = sizes - 1
    if wanted > room.sum():
        raise DataError(
            f"val={val}: {wanted} of {len(strata)} samples cannot go to validation while each of the {len(present)} "
            f"classes keeps one for training "
            f"(at most {room.sum()}); lower val, give more data, or say stratify=False"
        )
    shares = _shares(sizes, room, wanted)
    # Samples by stratum, within it in random order: the first `share` of each stratum are taken.
    order = np.lexsort((keys, inverse))
    rank = np.arange(len(strata)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = order[rank < np.repeat(shares, sizes)]
    return chosen, _split_notes(present, sizes, shares, classes)


def _shares(sizes: np.ndarray, room: np.ndarray, wanted: int) -> np.ndarray:
    """Samples each stratum gives: its proportional part by largest remainder, in whole numbers, at most `room`."""
    total = int(sizes.sum())
    shares = np.minimum(wanted * sizes // total, room)
    remainder = wanted * sizes % total
    while (missing := wanted - int(shares.sum())) > 0:
        open_strata = np.flatnonzero(shares < room)
        by_need = open_strata[np.lexsort((open_strata, -sizes[open_strata], -remainder[open_strata]))]
        shares[by_need[:missing]] += 1
    return shares


def _split_notes(present: np.ndarray, sizes: np.ndarray, shares: np.ndarray, classes: list[str] | None) -> list[str]:
    names = [classes[stratum] if classes and stratum < len(classes) else str(stratum) for stratum in present.tolist()]
    single = [name for name, size in zip(names, sizes.tolist(), strict=True) if size == 1]
    none = [
        name
        for name, size, share in zip(names, sizes.tolist(), shares.tolist(), strict=True)
        if size > 1 and share == 0
    ]
    notes = []
    if single:
        notes.append(
            f"{counted(len(single), 'class', 'classes')} with one sample, kept for training and not validated: "
            f"{listed(single)}"
        )
    if none:
        notes.append(f"{counted(len(none), 'class', 'classes')} too small to give a validation sample: {listed(none)}")
    return notes
