"""How batches get their inputs: from a tensor, from tokens, from image files, or by calling foreign code."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyft.core.memory import free_memory
from pyft.data.arrays import as_tensor
from pyft.data.fingerprint import raw_digests
from pyft.data.images import ImagePreprocess, read_image, to_rgb
from pyft.data.randomness import global_generators_kept, seed_global_generators
from pyft.data.raw import counted
from pyft.data.table_preprocess import TablePreprocess
from pyft.data.table_rows import TableRows
from pyft.data.text import TextPreprocess, gather_tokens
from pyft.errors import DataError

CACHE_SHARE = 4
"""Decoded images are kept while they take at most one part in this many of the free memory."""


class TensorInputs:
    """Rows of a tensor (N, ...)."""

    lengths: np.ndarray | None = None

    def __init__(self, values: torch.Tensor) -> None:
        self.values = as_tensor(values)

    def fetch(self, index: np.ndarray, epoch: int) -> torch.Tensor:
        """(B, ...) float32 or int64."""
        return self.values.index_select(0, torch.from_numpy(index))

    def digests(self) -> list[bytes]:
        """SHA-256 of each sample."""
        rows = self.values.flatten(1).numpy() if self.values.ndim > 1 else self.values.numpy()
        return [hashlib.sha256(row.tobytes()).digest() for row in rows]


class TokenInputs:
    """Texts, tokenised once."""

    def __init__(self, texts: Sequence[str], preprocess: TextPreprocess) -> None:
        self.pad_id = preprocess.pad_id
        self.flat, self.offsets = preprocess.encode_flat(texts)
        self.lengths: np.ndarray | None = np.diff(self.offsets)

    def fetch(self, index: np.ndarray, epoch: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, (B, T) int64."""
        return gather_tokens(self.flat, self.offsets, index, self.pad_id)

    def digests(self) -> list[bytes]:
        """SHA-256 of the token numbers of each text."""
        ends = zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)
        return [hashlib.sha256(self.flat[start:end].tobytes()).digest() for start, end in ends]

    def join(self, other: TokenInputs) -> TokenInputs:
        """These texts and then those of `other`, which has the same preprocessing."""
        both = copy.copy(self)
        both.flat = np.concatenate([self.flat, other.flat])
        both.offsets = np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]])
        both.lengths = np.diff(both.offsets)
        return both


class EncodedInputs:
    """Texts, encoded once by a preprocessing of the user's with `encode` and `collate`."""

    def __init__(self, texts: Sequence[str], preprocess: Any) -> None:
        self.rows = list(preprocess.encode(list(texts)))
        if len(self.rows) != len(texts):
            raise DataError(f"preprocess: encode gave {len(self.rows)} rows for {counted(len(texts), 'text')}")
        self.collate = preprocess.collate
        self.lengths: np.ndarray | None = np.array([len(row) for row in self.rows], dtype=np.int64)

    def fetch(self, index: np.ndarray, epoch: int) -> Any:
        """What `collate` makes of the rows."""
        return self.collate([self.rows[number] for number in index])

    def digests(self) -> list[bytes]:
        """SHA-256 of the encoding of each text."""
        return [hashlib.sha256(np.ascontiguousarray(row).tobytes()).digest() for row in self.rows]

    def join(self, other: EncodedInputs) -> EncodedInputs:
        """These texts and then those of `other`, which has the same preprocessing."""
        both = copy.copy(self)
        both.rows = [*self.rows, *other.rows]
        both.lengths = np.array([len(row) for row in both.rows], dtype=np.int64)
        return both


class TableInputs:
    """Rows of a table, imputed and scaled once; a batch's one-hot features are made when it is fetched."""

    lengths: np.ndarray | None = None

    def __init__(self, rows: TableRows, preprocess: TablePreprocess) -> None:
        self.preprocess = preprocess
        self.numbers, self.codes = preprocess.encode(rows)

    def fetch(self, index: np.ndarray, epoch: int) -> torch.Tensor:
        """(B, F) float32."""
        return torch.from_numpy(self.preprocess.gather(self.numbers[index], self.codes[index]))

    def digests(self) -> list[bytes]:
        """SHA-256 of what the model is given of each row, and of how wide that is."""
        width = str(self.preprocess.num_features).encode()
        rows = zip(self.numbers, self.codes, strict=True)
        return [hashlib.sha256(width + one.tobytes() + codes.tobytes()).digest() for one, codes in rows]


class Decoder:
    """Runs `decode(item)` of many items in a few threads, ahead of need. `decode` must draw nothing at random."""

    def __init__(self, items: Sequence[Any], decode: Callable[[Any], Any]) -> None:
        self.items = items
        self.decode = decode
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[Any]] = {}

    def begin(self, numbers: Sequence[int]) -> None:
        """Start to decode the items `numbers`."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max(2, min(4, os.cpu_count() or 2)), thread_name_prefix="pyft-decode")
        for number in numbers:
            if number not in self._coming:
                self._coming[number] = self._pool.submit(self.decode, self.items[number])

    def get(self, number: int) -> Any:
        """The decoded item; waits for it, or decodes it now."""
        future = self._coming.pop(number, None)
        return self.decode(self.items[number]) if future is None else future.result()

    def stop(self) -> None:
        """Give up what was begun and end the threads."""
        pool, self._pool = self._pool, None
        self._coming.clear()
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


class ImageInputs:
    """Images through `ImagePreprocess`: decoded by threads, kept as uint8 while they fit in memory."""

    lengths: np.ndarray | None = None

    def __init__(self, images: Sequence[Any], preprocess: ImagePreprocess) -> None:
        self.preprocess = preprocess
        self.decoder = Decoder(images, preprocess.pixels)
        shape = (len(images), 3, preprocess.size, preprocess.size)
        fits = int(np.prod(shape, dtype=np.int64)) * CACHE_SHARE <= free_memory()
        self.kept = torch.empty(shape, dtype=torch.uint8) if fits else None
        self.have = np.zeros(len(images), dtype=bool)

    def ahead(self, index: np.ndarray) -> None:
        """Begin to decode a batch that will be fetched."""
        missing = index[~self.have[index]]
        if len(missing):
            self.decoder.begin(missing.tolist())

    def fetch(self, index: np.ndarray, epoch: int) -> torch.Tensor:
        """(B, 3, size, size) float32."""
        if self.kept is None:
            self.ahead(index)
            return self.preprocess.normalise(torch.stack([self.decoder.get(number) for number in index.tolist()]))
        missing = index[~self.have[index]]
        if len(missing):
            self.decoder.begin(missing.tolist())
            for number in missing.tolist():
                self.kept[number] = self.decoder.get(number)
                self.have[number] = True
        return self.preprocess.normalise(self.kept.index_select(0, torch.from_numpy(index)))

    def stop(self) -> None:
        """End the threads."""
        self.decoder.stop()

    def digests(self) -> list[bytes]:
        """SHA-256 of each file, or of the picture, and of what is done to it."""
        spec = json.dumps(self.preprocess.spec(), sort_keys=True).encode()
        return [hashlib.sha256(spec + one).digest() for one in raw_digests(self.decoder.items)]


class PictureStore:
    """RGB pictures of files, decoded by threads, kept while they fit in memory."""

    def __init__(self, images: Sequence[Any]) -> None:
        self.decoder = Decoder(
            images, lambda image: read_image(image) if isinstance(image, str | Path) else to_rgb(image)
        )
        self.kept: dict[int, Any] = {}
        self.room = free_memory() // CACHE_SHARE

    def ahead(self, index: np.ndarray) -> None:
        """Begin to decode a batch that will be asked for."""
        missing = [number for number in index.tolist() if number not in self.kept]
        if missing:
            self.decoder.begin(missing)

    def __getitem__(self, number: int) -> Any:
        if number in self.kept:
            return self.kept[number].copy()
        picture = self.decoder.get(number)
        size = picture.width * picture.height * 4
        if size <= self.room:
            self.room -= size
            self.kept[number] = picture
            return picture.copy()
        return picture


class CalledInputs:
    """Samples that foreign code makes: a Dataset's items, or a preprocessing function of the user's.

    It may draw at random: `random`, NumPy and torch are seeded by (seed, epoch, sample) around each call, and get
    their states back. It therefore runs in the calling thread only.
    """

    lengths: np.ndarray | None = None

    def __init__(self, items: Any, call: Callable[[Any], Any] | None, seed: int) -> None:
        self.items = items
        self.call = call
        self.seed = seed

    def ahead(self, index: np.ndarray) -> None:
        """Begin to decode a batch that will be fetched, where that draws nothing at random."""
        if isinstance(self.items, PictureStore):
            self.items.ahead(index)

    def fetch(self, index: np.ndarray, epoch: int) -> torch.Tensor:
        """(B, ...) float32 or int64."""
        self.ahead(index)
        rows = []
        with global_generators_kept():
            for number in index.tolist():
                seed_global_generators(self.seed, epoch, number)
                item = self.items[number]
                # A function may work in place; the samples must stay as they are.
                item = item.clone() if isinstance(item, torch.Tensor) else item
                rows.append(_row(item if self.call is None else self.call(item), number))
        shapes = {tuple(row.shape) for row in rows}
        if len(shapes) > 1:
            raise DataError(
                f"preprocess: samples of one batch have the shapes {', '.join(map(str, sorted(shapes)))}; "
                f"resize, crop or pad them to one"
            )
        return torch.stack(rows)

    def stop(self) -> None:
        """End the threads."""
        if isinstance(self.items, PictureStore):
            self.items.decoder.stop()

    def digests(self) -> list[bytes]:
        """SHA-256 of what is made of each sample in epoch 0: what a function does shows in nothing else."""
        count = len(self.items.decoder.items) if isinstance(self.items, PictureStore) else len(self.items)
        rows = (self.fetch(np.array([number]), 0) for number in range(count))
        return [hashlib.sha256(f"{row.dtype} {row.shape}".encode() + row.numpy().tobytes()).digest() for row in rows]


class PairedInputs:
    """The samples of one source and then those of another."""

    def __init__(self, first: Any, second: Any, count: int) -> None:
        self.first, self.second, self.count = first, second, count
        self.lengths: np.ndarray | None = None

    def fetch(self, index: np.ndarray, epoch: int) -> torch.Tensor:
        """(B, ...) float32 or int64."""
        late = index >= self.count
        parts = [
            source.fetch(numbers, epoch)
            for source, numbers in ((self.first, index[~late]), (self.second, index[late] - self.count))
            if len(numbers)
        ]
        back = np.argsort(np.argsort(late, kind="stable"), kind="stable")
        return torch.cat(parts).index_select(0, torch.from_numpy(back))

    def digests(self) -> list[bytes]:
        """SHA-256 of each sample."""
        return [*self.first.digests(), *self.second.digests()]


def join_inputs(first: Any, second: Any, count: int) -> Any:
    """The samples of `first`, of which there are `count`, and then those of `second`."""
    if type(first) is type(second) and hasattr(first, "join"):
        return first.join(second)
    return PairedInputs(first, second, count)


def _row(value: Any, number: int) -> torch.Tensor:
    if isinstance(value, torch.Tensor | np.ndarray):
        return as_tensor(value)
    raise DataError(
        f"preprocess: expected a Tensor for each sample, got {type(value).__name__} for sample {number}; "
        f"end it with a conversion to a Tensor"
    )
