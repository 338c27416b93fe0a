"""In-memory inputs: arrays, tensors, lists of texts, paths or pictures, and map-style Datasets."""

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

from pyft.data.features import feature_samples
from pyft.data.folders import IMAGE_SUFFIXES
from pyft.data.pictures import is_picture
from pyft.data.randomness import global_generators_kept, seed_global_generators
from pyft.data.raw import Raw, counted, listed
from pyft.data.table_rows import TableForm
from pyft.data.tables import LABEL_NAMES, TEXT_NAMES, frame_table
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
    tensor = value.detach().cpu() if isinstance(value, torch.Tensor) else _from_numpy(np.asarray(value))
    if tensor.is_complex():
        raise DataError("complex numbers are not supported; give real and imaginary part as two features")
    whole = not tensor.is_floating_point() and tensor.dtype not in (torch.uint8, torch.bool)
    return tensor.to(torch.int64 if whole else torch.float32)


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind not in "iufbc":
        raise DataError(
            f"expected numbers, got an array of dtype {array.dtype}; convert it, for instance with .astype('float32')"
        )
    if array.dtype in (np.uint16, np.uint32, np.uint64):
        array = array.astype(np.int64)
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    ordinary = np.ascontiguousarray(native).reshape(native.shape)
    return torch.from_numpy(ordinary if ordinary.flags.writeable else ordinary.copy())


def is_frame(value: Any) -> bool:
    """Whether `value` is a DataFrame of pandas, polars or another library."""
    return hasattr(value, "columns") and (hasattr(value, "to_numpy") or hasattr(value, "__dataframe__"))


def pair_samples(
    x: Any, y: Any, kind: Kind | None, name: str = "X", columns: Sequence[str] | TableForm | None = None
) -> Raw:
    """Inputs `x` with labels `y` (None: no labels); a DataFrame `x` gives features by name, `columns` where known.

    Raises:
        DataError: `x` is empty, an object array, of rows of different shapes, not numbers, or as long as `y` is not.
    """
    notes: list[str] = []
    names = None
    # A frame of whole numbers only holds token or category numbers, as an array of them does.
    if is_frame(x) and kind in (None, "array") and not _all_whole(x):
        table = feature_samples(frame_table(x, name), columns)
        found, inputs, notes, names = table.kind, table.inputs, table.notes, table.columns
        inputs = as_tensor(inputs) if isinstance(inputs, np.ndarray) else inputs
    else:
        found, inputs = _inputs(x, kind, name, notes)
    if not len(inputs):
        raise DataError(f"{name}: there is no sample in it")
    if y is not None and (not hasattr(y, "__len__") or getattr(y, "ndim", 1) == 0):
        raise DataError(f"y: expected {len(inputs)} labels, got one {type(y).__name__}")
    if y is not None and len(y) != len(inputs):
        raise DataError(
            f"{name} and y: {name} has {counted(len(inputs), 'sample')}, y has {counted(len(y), 'label')}; "
            f"each sample needs one label"
        )
    if kind is not None and kind != found and not (found == "array" and kind in ("text", "image")):
        raise DataError(
            f"{name}: the task asks for {kind} inputs, but {name} holds {_described(found)}; "
            f"leave task='auto', or give {kind} inputs"
        )
    return Raw(found, inputs, y, name, notes=notes, columns=names)


def _all_whole(frame: Any) -> bool:
    return all(getattr(getattr(frame[name], "dtype", None), "kind", "") in "iu" for name in frame.columns)


def _described(kind: Kind) -> str:
    return {"text": "texts", "image": "pictures", "array": "numbers"}[kind]


def _inputs(x: Any, kind: Kind | None, name: str, notes: list[str]) -> tuple[Kind, Any]:
    if isinstance(x, torch.Tensor):
        return "array", _whole_tensor(x, name, notes)
    if hasattr(x, "toarray") and hasattr(x, "nnz"):
        raise DataError(f"{name}: sparse matrices are not supported; pass {name}.toarray()")
    if hasattr(x, "to_numpy"):
        x = x.to_numpy()
    if isinstance(x, np.ndarray) and x.dtype.kind not in "OU":
        return "array", _whole_tensor(x, name, notes)
    if isinstance(x, np.ndarray) and x.ndim != 1:
        raise DataError(
            f"{name}: an object array of shape {x.shape} holds no numbers; "
            f"pass X.astype('float32') if all cells are numbers, else encode the others"
        )
    if not isinstance(x, Sequence | np.ndarray) or isinstance(x, str | bytes):
        raise DataError(
            f"{name}: expected an array, tensor, or list of texts, paths or pictures; got {type(x).__name__}"
        )
    return _listed_inputs(x.tolist() if isinstance(x, np.ndarray) else list(x), kind, name, notes)


def _listed_inputs(items: list[Any], kind: Kind | None, name: str, notes: list[str]) -> tuple[Kind, Any]:
    if items and all(isinstance(item, str) for item in items):
        paths = kind == "image" or (kind is None and all(item.lower().endswith(IMAGE_SUFFIXES) for item in items))
        return ("image", _existing([Path(item) for item in items], name)) if paths else ("text", items)
    if items and all(isinstance(item, Path) for item in items):
        return "image", _existing(items, name)
    if items and all(is_picture(item) for item in items):
        return "image", items
    first_type = type(items[0]).__name__ if items else "nothing"
    other = next((row for row, item in enumerate(items) if type(item).__name__ != first_type), None)
    if other is not None and any(isinstance(item, str | Path) or item is None or is_picture(item) for item in items):
        raise DataError(
            f"{name}: row {other} is {type(items[other]).__name__}, row 0 is {first_type}; "
            f"expected one type for all samples"
        )
    return "array", _whole_tensor(_stacked(items, name), name, notes)


def _existing(paths: list[Path], name: str) -> list[Path]:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{name}: {len(missing)} of {counted(len(paths), 'image file')} missing: {listed(missing, 3)} "
            f"(looked in {Path.cwd()})"
        )
    return paths


def _stacked(items: list[Any], name: str) -> Any:
    try:
        if items and isinstance(items[0], torch.Tensor):
            return torch.stack([as_tensor(item) for item in items])
        return np.asarray(items)
    except (ValueError, TypeError, RuntimeError):
        raise DataError(
            f"{name}: the rows have different shapes or hold no numbers ({_shapes(items)}); "
            f"pad or crop them to one shape"
        ) from None


def _shapes(items: list[Any]) -> str:
    shapes = [tuple(np.shape(item)) for item in items if isinstance(item, torch.Tensor | np.ndarray)]
    if not shapes:
        lengths = [len(item) for item in items if hasattr(item, "__len__")]
        return f"lengths {listed(sorted(set(lengths)))}" if lengths else f"of type {type(items[0]).__name__}"
    return f"shapes {listed(list(dict.fromkeys(shapes)), 3)}"


def _whole_tensor(x: Any, name: str, notes: list[str]) -> torch.Tensor:
    if x.ndim == 0:
        raise DataError(f"{name}: expected (N, ...) with one row per sample, got a single number")
    try:
        tensor = as_tensor(x)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    beyond = int((torch.isinf(tensor) & ~_was_infinite(x)).sum()) if tensor.is_floating_point() and _is_double(x) else 0
    if beyond:
        raise DataError(f"{name}: {counted(beyond, 'value')} beyond float32's 3.4e38; scale the column")
    if str(x.dtype).endswith("uint8"):
        notes.append(f"{name} is uint8: the model is given float32 values 0 to 255; pass {name} / 255 for 0 to 1")
    if tensor.ndim == 4 and tensor.shape[-1] in (1, 3, 4) and tensor.shape[1] not in (1, 3, 4):
        notes.append(
            f"{name} has shape {tuple(tensor.shape)}, channels last; "
            f"torch's convolutions expect (N, C, H, W): {name}.transpose(0, 3, 1, 2)"
        )
    return tensor


def _is_double(x: Any) -> bool:
    return str(x.dtype).endswith("float64") or str(x.dtype).startswith(("float128", "longdouble"))


def _was_infinite(x: Any) -> torch.Tensor:
    return torch.isinf(x.detach().cpu()) if isinstance(x, torch.Tensor) else torch.from_numpy(np.isinf(x))


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
