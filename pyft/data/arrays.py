"""What torch holds in memory: Tensors, map-style Datasets, and arrays and lists as Tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from pyft.data.pairs import as_array, pair_arrays
from pyft.data.pictures import is_picture
from pyft.data.randomness import global_generators_kept, seed_global_generators
from pyft.data.raw import Raw, listed
from pyft.data.table_rows import TableForm
from pyft.data.tables import LABEL_NAMES, TEXT_NAMES
from pyft.errors import DataError
from pyft.samples import Kind

_INPUT_NAMES = (*TEXT_NAMES, "image", "img", "pixel_values", "x", "input", "inputs")


class LazyInputs:
    """The inputs of a Dataset, read each time they are asked for; index -> Tensor, or picture.

    Attributes:
        source: anything with `source[i]` giving (x, y) or a mapping.
        digests: SHA-256 of each input as it was when first read, for the fingerprint.
    """

    def __init__(self, source: Any, digests: list[bytes]) -> None:
        self.source = source
        self.digests = digests

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, number: int) -> Any:
        x = item_pair(self.source[number])[0]
        return x if is_picture(x) else as_tensor(x)


def as_tensor(value: Any) -> torch.Tensor:
    """Numbers as a CPU tensor: real numbers to float32, whole numbers to int64, bool and uint8 to float32.

    uint8 holds pictures, hence float; wider integers are token or category numbers for an embedding.

    >>> as_tensor([1, 2]).dtype, as_tensor([0.5]).dtype
    (torch.int64, torch.float32)
    """
    if not isinstance(value, torch.Tensor):
        array = as_array(value)
        ordinary = np.ascontiguousarray(array).reshape(array.shape)
        return torch.from_numpy(ordinary if ordinary.flags.writeable else ordinary.copy())
    tensor = value.detach().cpu()
    if tensor.is_complex():
        raise DataError("complex numbers are not supported; give real and imaginary part as two features")
    whole = not tensor.is_floating_point() and tensor.dtype not in (torch.uint8, torch.bool)
    return tensor.to(torch.int64 if whole else torch.float32)


def with_tensors(raw: Raw) -> Raw:
    """Numbers, which the readers give as arrays, as a Tensor."""
    if isinstance(raw.inputs, np.ndarray):
        raw.inputs = as_tensor(raw.inputs)
    return raw


def pair_samples(
    x: Any, y: Any, kind: Kind | None, name: str = "X", columns: Sequence[str] | TableForm | None = None
) -> Raw:
    """`pair_arrays` with numbers as a Tensor."""
    return with_tensors(pair_arrays(x, y, kind, name, columns))


def item_pair(item: Any) -> tuple[Any, Any]:
    """(x, y) of a Dataset's item: a pair, or a mapping with one input and one label by name.

    Raises:
        DataError: it is neither.
    """
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    if isinstance(item, Mapping):
        x = next((item[name] for name in _INPUT_NAMES if name in item), None)
        y = next((item[name] for name in LABEL_NAMES if name in item), None)
        if x is not None and y is not None:
            return x, y
        raise DataError(
            f"data: a Dataset item has the keys {listed(list(item))}; "
            f"expected (x, y), or a text or image and a label by name"
        )
    raise DataError(f"data: expected a Dataset whose items are (x, y), got an item of type {type(item).__name__}")


def loader_dataset(loader: DataLoader[Any]) -> tuple[Any, list[str]]:
    """The dataset behind a DataLoader and what of the loader is not used."""
    if isinstance(loader.dataset, IterableDataset):
        raise DataError(_iterable_mend("the DataLoader's dataset"))
    notes = [
        "the DataLoader's batch size, order and collate_fn are not used: pyft makes the batches itself (batch_size=)"
    ]
    dataset: Any = loader.dataset
    if isinstance(loader.sampler, SubsetRandomSampler):
        dataset = Subset(dataset, [int(number) for number in loader.sampler.indices])
        notes.append(f"the DataLoader's sampler picks {len(dataset)} samples of its Dataset; only these are used")
    elif isinstance(loader.sampler, WeightedRandomSampler):
        notes.append(
            "the DataLoader's sampling weights are not used; class_weight='balanced' weighs the classes in the loss"
        )
    return dataset, notes


def _iterable_mend(what: str) -> str:
    return (
        f"data: {what} is an IterableDataset, which has no length and no order to shuffle or resume; "
        f"give a map-style Dataset (__len__ and __getitem__), or arrays: (X, y)"
    )


def dataset_samples(dataset: Any, kind: Kind | None, name: str = "data") -> Raw:
    """The samples of a map-style Dataset giving (x, y). Every item is read once, for labels and checks.

    Texts are kept; pictures and arrays are read again in every epoch, so that the Dataset's own random changes act.

    Raises:
        DataError: it is an IterableDataset, empty, an item is no (x, y), shapes differ, or a value is NaN or infinite.
    """
    if isinstance(dataset, IterableDataset):
        raise DataError(_iterable_mend("it"))
    tensors = _plain_tensors(dataset)
    class_names = _dataset_classes(dataset)
    if tensors is not None:
        raw = pair_samples(tensors[0], tensors[1], kind, name)
        raw.class_names = class_names
        return raw
    count = len(dataset)
    if not count:
        raise DataError(f"{name}: the Dataset is empty")
    if isinstance(item_pair(dataset[0])[0], str | Path):
        pairs = [item_pair(dataset[number]) for number in range(count)]
        raw = pair_samples([x for x, _ in pairs], _collected([y for _, y in pairs]), kind, name)
    else:
        raw = _walked(dataset, count, name)
    raw.class_names = class_names
    return raw


def _plain_tensors(dataset: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The two tensors behind a TensorDataset, or a Subset of one."""
    if isinstance(dataset, Subset):
        tensors = _plain_tensors(dataset.dataset)
        numbers = torch.as_tensor([int(number) for number in dataset.indices], dtype=torch.int64)
        return None if tensors is None else (tensors[0][numbers], tensors[1][numbers])
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
        return dataset.tensors[0], dataset.tensors[1]
    return None


def _dataset_classes(dataset: Any) -> list[str] | None:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        return list(names)
    return None


def _collected(labels: list[Any]) -> Any:
    """Labels of single items as one list or array."""
    if all(isinstance(label, str) for label in labels):
        return labels
    values = [label.detach().cpu().numpy() if isinstance(label, torch.Tensor) else label for label in labels]
    try:
        return np.asarray(values)
    except ValueError:
        raise DataError(
            "data: the Dataset's labels have different shapes; expected one class number, or K numbers, for each"
        ) from None


def _walked(dataset: Any, count: int, name: str) -> Raw:
    labels: list[Any] = []
    digests: list[bytes] = []
    first: Any = None
    notes: list[str] = []
    with global_generators_kept():
        for number in range(count):
            seed_global_generators(0, 0, number)
            x, y = item_pair(dataset[number])
            x = x if is_picture(x) else _item_tensor(x, name, number)
            if number == 0:
                first = x
            _check_item(x, first, name, number)
            labels.append(y)
            digests.append(_item_digest(x))
        changing = _changing(lambda number: item_pair(dataset[number])[0], min(count, 4))
    if changing:
        notes.append(
            f"{name}: the Dataset gives a sample another form each time it is read; "
            f"a validation split taken from it changes too"
        )
    kind: Kind = "image" if is_picture(first) else "array"
    return Raw(kind, LazyInputs(dataset, digests), _collected(labels), name, notes=notes)


def _item_tensor(x: Any, name: str, number: int) -> torch.Tensor:
    try:
        return as_tensor(x)
    except (DataError, ValueError, TypeError) as error:
        raise DataError(
            f"{name}: the input of sample {number} is {type(x).__name__}, expected a Tensor, array, text or picture "
            f"({error})"
        ) from None


def _check_item(x: Any, first: Any, name: str, number: int) -> None:
    if is_picture(x) != is_picture(first):
        raise DataError(
            f"{name}: sample {number} is {type(x).__name__}, sample 0 is {type(first).__name__}; "
            f"expected one type for all"
        )
    if is_picture(x):
        return
    if x.shape != first.shape:
        raise DataError(
            f"{name}: sample {number} has shape {tuple(x.shape)}, sample 0 has {tuple(first.shape)}; "
            f"pad, crop or resize them to one shape"
        )
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise DataError(
            f"{name}: the input of sample {number} holds NaN or infinity; "
            f"mend it in the Dataset or leave the sample out"
        )


def _item_digest(x: Any) -> bytes:
    content = x.tobytes() if is_picture(x) else x.contiguous().view(-1).numpy().tobytes()
    return hashlib.sha256(content).digest()


def _changing(read: Callable[[int], Any], count: int) -> bool:
    """Whether reading a sample under other seeds gives something else."""
    for number in range(count):
        forms = set()
        for seed in range(4):
            seed_global_generators(seed, 0, number)
            x = read(number)
            forms.add(_item_digest(x if is_picture(x) else as_tensor(x)))
        if len(forms) > 1:
            return True
    return False
