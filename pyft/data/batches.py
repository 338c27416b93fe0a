"""Batches of an epoch: the same for the same (seed, epoch), from any first batch on, whatever else is drawn."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch

from pyft.data.augment import Augment, augment_batch, check_augment
from pyft.data.images import ImagePreprocess
from pyft.data.inputs import (
    CalledInputs,
    EncodedInputs,
    ImageInputs,
    PictureStore,
    TableInputs,
    TensorInputs,
    TokenInputs,
)
from pyft.data.order import batch_sizes, fixed_batches, shuffled_batches
from pyft.data.preprocess import ArrayPreprocess
from pyft.data.raw import counted
from pyft.data.table_preprocess import TablePreprocess
from pyft.data.table_rows import TableRows
from pyft.data.text import TextPreprocess
from pyft.errors import ConfigError, DataError
from pyft.samples import Batch, Samples

_MAKING, _CHANGING = 11, 12
"""Keep the draws of a Dataset or preprocessing function apart from those of `augment`."""


class Batches:
    """The batches of `samples`, epoch by epoch.

    Args:
        samples: see `pyft.samples.Samples`.
        preprocess: `TextPreprocess`, `ImagePreprocess`, `ArrayPreprocess` (None: the same), a fitted
            `TablePreprocess`, an object with `encode` and `collate` for texts, or a function of one picture, array or
            row (a dict) giving a Tensor.
        batch_size: samples per batch; the last is smaller.
        seed: of order and random changes.
        shuffle: other batches in each epoch; then a rest of one sample joins another batch. False: fixed batches.
        bucket: put texts of similar length together, to pad little. With shuffle=False texts are sorted by length
            (`Batch.index` tells which they are); bucket=False keeps the order of the samples.
        augment: see `pyft.data.augment.augment_batch`.
        drop_last: leave out the smaller batch.

    Texts are tokenised here, once. Images are decoded when first needed, by threads, one batch ahead, and kept while
    they take at most a quarter of the free memory.

    Raises:
        ConfigError: batch_size is not positive, or `preprocess` or `augment` does not fit the samples.
        DataError: there is no sample.

    >>> samples = Samples("array", torch.arange(10.0).view(5, 2), torch.arange(5))
    >>> [batch.targets.tolist() for batch in Batches(samples, None, 2, shuffle=False).epoch(0)]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        samples: Samples,
        preprocess: Any,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        bucket: bool = True,
        augment: Augment = "none",
        drop_last: bool = False,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise ConfigError(f"batch_size={batch_size!r}: expected a whole number of 1 or more")
        if not len(samples):
            raise DataError(f"{samples.name}: there is no sample in it")
        check_augment(augment)
        if augment != "none" and samples.kind == "text":
            raise ConfigError("augment: texts cannot be changed at random; say augment='none'")
        self.samples = samples
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.shuffle = shuffle
        self.augment = augment
        self._inputs = _make_inputs(samples, preprocess, self.seed)
        self._lengths = self._inputs.lengths if bucket else None
        self._sizes = batch_sizes(len(samples), self.batch_size, merge_single=shuffle, drop_last=drop_last)

    @property
    def num_batches(self) -> int:
        """Batches per epoch."""
        return len(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def source(self) -> Inputs:
        """Where the inputs come from."""
        return self._inputs

    def index(self, epoch: int, *, bucket: bool = True) -> list[np.ndarray]:
        """The sample numbers of each batch of an epoch: list of int64 (B,). `bucket=False`: whatever their lengths."""
        lengths = self._lengths if bucket else None
        if self.shuffle:
            return shuffled_batches(len(self.samples), self._sizes, lengths, self.seed, epoch)
        return fixed_batches(len(self.samples), self._sizes, lengths)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from batch `start` on, without the work of those before it.

        Raises:
            ConfigError: `start` is negative or beyond the epoch.
            DataError: an image cannot be read, or a function gave no Tensor.
        """
        if not 0 <= start <= self.num_batches:
            raise ConfigError(f"start={start}: expected 0 to {counted(self.num_batches, 'batch', 'batches')}")
        return self.make(self.index(epoch)[start:], epoch)

    def make(self, batches: list[np.ndarray], epoch: int) -> Generator[Batch, None, None]:
        """Batches of these samples, list of int64 (B,), as they come out in an epoch."""
        ahead = getattr(self._inputs, "ahead", None)
        try:
            for place, index in enumerate(batches):
                if ahead is not None:
                    # This batch first, then the next, so that threads decode while the caller computes.
                    for coming in batches[place : place + 2]:
                        ahead(coming)
                yield self._batch(index, epoch)
        finally:
            if ahead is not None:
                self._inputs.stop()  # type: ignore[union-attr]

    def _batch(self, index: np.ndarray, epoch: int) -> Batch:
        numbers = torch.from_numpy(np.ascontiguousarray(index))
        inputs: Any = self._inputs.fetch(index, epoch)
        if self.augment != "none":
            inputs = augment_batch(inputs, self.augment, self.seed + _CHANGING, epoch, numbers)
        targets = None if self.samples.targets is None else self.samples.targets.index_select(0, numbers)
        return Batch(inputs, targets, numbers)


Inputs = TensorInputs | TokenInputs | EncodedInputs | TableInputs | ImageInputs | CalledInputs


def _make_inputs(samples: Samples, preprocess: Any, seed: int) -> Inputs:
    if samples.kind == "text":
        return _text_inputs(samples, preprocess)
    if preprocess is not None and not callable(preprocess):
        raise ConfigError(f"preprocess: expected a function of one sample, got {type(preprocess).__name__}")
    if isinstance(preprocess, TextPreprocess):
        raise ConfigError(f"preprocess: {samples.name} holds {samples.kind} inputs, not texts")
    seed += _MAKING
    if samples.kind == "image":
        return _image_inputs(samples, preprocess, seed)
    if isinstance(preprocess, TablePreprocess):
        return TableInputs(_rows(samples), preprocess)
    own = preprocess is not None and not isinstance(preprocess, ArrayPreprocess)
    if isinstance(samples.inputs, TableRows) and not own:
        raise ConfigError(
            f"preprocess: {samples.name} holds words or missing numbers; give the TablePreprocess that the model was "
            f"trained with, or a function of one row, a dict"
        )
    if isinstance(samples.inputs, torch.Tensor) and not own:
        return TensorInputs(samples.inputs)
    return CalledInputs(samples.inputs, preprocess if own else None, seed)


def _rows(samples: Samples) -> TableRows:
    if isinstance(samples.inputs, TableRows):
        return samples.inputs
    if isinstance(samples.inputs, torch.Tensor):
        return TableRows.from_matrix(samples.inputs, samples.columns, samples.name)
    raise ConfigError(f"preprocess='table': {samples.name} holds {samples.kind} inputs, not the rows of a table")


def _text_inputs(samples: Samples, preprocess: Any) -> Inputs:
    if isinstance(preprocess, TextPreprocess):
        return TokenInputs(samples.inputs, preprocess)  # type: ignore[arg-type]
    if hasattr(preprocess, "encode") and hasattr(preprocess, "collate"):
        return EncodedInputs(samples.inputs, preprocess)  # type: ignore[arg-type]
    raise ConfigError(
        f"preprocess: texts need TextPreprocess.from_folder(...), or an object with encode(texts) -> list of (T,) "
        f"arrays and "
        f"collate(list) -> Tensor or dict of Tensors; got {type(preprocess).__name__}"
    )


def _image_inputs(samples: Samples, preprocess: Any, seed: int) -> Inputs:
    if preprocess is None or isinstance(preprocess, ArrayPreprocess):
        raise ConfigError(
            "preprocess: images need pyft.ImagePreprocess(size), or a function of a PIL image giving a Tensor (C, H, W)"
        )
    if not isinstance(samples.inputs, list):
        return CalledInputs(samples.inputs, preprocess, seed)
    if isinstance(preprocess, ImagePreprocess):
        return ImageInputs(samples.inputs, preprocess)
    return CalledInputs(PictureStore(samples.inputs), preprocess, seed)
