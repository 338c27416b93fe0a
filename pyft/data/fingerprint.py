"""SHA-256 over data: the same bytes, labels and split give the same fingerprint, wherever the files lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from pyft.core.files import sha256_file
from pyft.data.arrays import LazyInputs
from pyft.data.table_rows import TableRows
from pyft.errors import DataError
from pyft.samples import Problem, Samples

_PIECE = 1 << 16


def fingerprint(sets: dict[str, Samples | None], problem: Problem, classes: list[str] | None) -> str:
    """Hexadecimal SHA-256 over inputs, targets, the split and the classes.

    Files count with folder name, file name, size and content; texts and arrays with all of their bytes.

    Args:
        sets: "train", "val", "test" -> samples, or None.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256(json.dumps([problem, classes]).encode())
    for role, samples in sets.items():
        if samples is None:
            continue
        digest.update(json.dumps([role, samples.kind, len(samples)]).encode())
        _add_inputs(digest, samples.inputs)
        if samples.targets is not None:
            _add_tensor(digest, samples.targets)
    return digest.hexdigest()


def _add_inputs(digest: Any, inputs: Any) -> None:
    if isinstance(inputs, torch.Tensor):
        _add_tensor(digest, inputs)
    elif isinstance(inputs, LazyInputs | Subset):
        digest.update(b"".join(_lazy_digests(inputs)))
    elif isinstance(inputs, TableRows):
        for name, values in inputs.columns.items():
            digest.update(json.dumps([name, str(values.dtype)]).encode())
            if values.dtype == object:
                _add_texts(digest, values.tolist())
            else:
                digest.update(values.tobytes())
    elif isinstance(inputs[0], str):
        _add_texts(digest, inputs)
    elif isinstance(inputs[0], Path):
        for path, content in zip(inputs, file_digests(inputs), strict=True):
            digest.update(json.dumps([path.parent.name, path.name, content]).encode())
    else:
        for picture in inputs:
            digest.update(json.dumps([picture.mode, picture.size]).encode())
            digest.update(picture.tobytes())


def _add_texts(digest: Any, texts: Sequence[str]) -> None:
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    digest.update(np.array([len(text) for text in encoded], dtype="<i8").tobytes())
    digest.update(b"".join(encoded))


def raw_digests(pictures: Sequence[Any]) -> list[bytes]:
    """What tells each picture from others: size and SHA-256 of a file, or the pixels.

    Raises:
        DataError: a file cannot be read.
    """
    if isinstance(pictures, LazyInputs | Subset):
        return _lazy_digests(pictures)
    places = [number for number, picture in enumerate(pictures) if isinstance(picture, Path)]
    found = dict(zip(places, file_digests([pictures[number] for number in places]), strict=True))
    return [
        found[number].encode()
        if number in found
        else hashlib.sha256(json.dumps([picture.mode, picture.size]).encode() + picture.tobytes()).digest()
        for number, picture in enumerate(pictures)
    ]


def _add_tensor(digest: Any, tensor: torch.Tensor) -> None:
    digest.update(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
    rows = tensor.detach().cpu().contiguous().view(-1)
    for start in range(0, rows.numel(), _PIECE):
        digest.update(rows[start : start + _PIECE].numpy().tobytes())


def _lazy_digests(inputs: Any) -> list[bytes]:
    if isinstance(inputs, Subset):
        inner = _lazy_digests(inputs.dataset)
        return [inner[number] for number in inputs.indices]
    return list(inputs.digests)


def file_digests(paths: Sequence[Path]) -> list[str]:
    """'<size>:<SHA-256>' of each file, read by a few threads.

    Raises:
        DataError: a file cannot be read.
    """
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(_file_digest, paths))


def _file_digest(path: Path) -> str:
    try:
        return f"{path.stat().st_size}:{sha256_file(path)}"
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read: {error.strerror or error}") from None
