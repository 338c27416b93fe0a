"""One door for all data: files, folders, arrays, Datasets and tables become `Data` with one meaning of the labels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, IterableDataset

from pyft.data.arrays import dataset_samples, loader_dataset, with_tensors
from pyft.data.checks import check_classes, check_samples
from pyft.data.fingerprint import fingerprint
from pyft.data.folders import holds_images, sub_folders
from pyft.data.raw import Raw, listed, nearest
from pyft.data.reading import ROLES, check_set, in_form, is_dataset, one_set, read_arrays
from pyft.data.splits import split_samples
from pyft.data.table_rows import TableForm, TableRows
from pyft.data.tables import TABLE_SUFFIXES
from pyft.data.targets import make_targets
from pyft.data.task import parse_task
from pyft.errors import DataError
from pyft.samples import Data, Kind, Problem, Samples


def load_data(
    data: Any,
    *,
    task: str = "auto",
    val: float | int | None = 0.2,
    stratify: bool = True,
    seed: int = 0,
    text_column: str | None = None,
    label_column: str | None = None,
    form: TableForm | None = None,
) -> Data:
    """Read `data`, fix the meaning of the labels by the training part, and cut off validation where there is none.

    Args:
        data: a .tsv or .csv file; a folder with train.tsv (or .csv; val and test beside it); a folder of images, one
            sub-folder per class, or train/ (val/, test/) with such folders; (X, y) of arrays, tensors or lists of
            texts, paths or pictures; a map-style Dataset giving (x, y); a DataLoader; a DataFrame; or a dict of these
            under "train", "val", "test".
        task: see `parse_task`.
        val: fraction below 1, or number of samples, for validation when `data` brings none; 0 or None: none.
        stratify: keep the shares of the classes in that split.
        seed: of that split.
        text_column: name of the text column of a table; default: found by name.
        label_column: name of the label column of a table; default: found by name.
        form: what is known of a table before it is read; see `TableForm`.

    Raises:
        DataError: the data cannot be used; the message says what, where, and the mend.
        ConfigError: `task` is not known.
    """
    kind, problem = parse_task(task)
    parts, notes = read_parts(data, kind, text_column, label_column, form)
    train = parts["train"]
    notes += train.notes
    if train.labels is None:
        raise DataError(f"{train.name}: training data needs labels; give (X, y), or a table with a label column")
    targets = make_targets(train, problem)
    notes += targets.notes
    sets: dict[str, Samples | None] = {
        "train": Samples(train.kind, train.inputs, torch.from_numpy(targets.values), train.name, train.columns),
        "val": None,
        "test": None,
    }
    for role in ("val", "test"):
        if role in parts:
            sets[role] = _beside(parts[role], train, targets.problem, targets.classes, sets["train"])
            notes += parts[role].notes
    if sets["val"] is None:
        sets["train"], sets["val"], more = _split(sets["train"], targets.problem, val, stratify, seed, targets.classes)
        notes += more
    samples = sets["train"]
    assert samples is not None
    return Data(
        train=samples,
        val=sets["val"],
        test=sets["test"],
        kind=train.kind,
        problem=targets.problem,
        classes=targets.classes,
        fingerprint=fingerprint(sets, targets.problem, targets.classes),
        source=str(data) if isinstance(data, str | os.PathLike) else None,
        notes=tuple(dict.fromkeys(notes)),
    )


def _beside(raw: Raw, train: Raw, problem: Problem, classes: list[str] | None, reference: Samples | None) -> Samples:
    """Validation or test samples, with the labels' meaning and the shapes of the training samples."""
    if raw.kind != train.kind:
        raise DataError(f"{raw.name}: holds {raw.kind} inputs, the training data {train.kind} inputs")
    if raw.labels is None:
        raise DataError(f"{raw.name}: validation and test data need labels")
    targets = make_targets(raw, problem, classes)
    assert reference is not None
    assert reference.targets is not None
    if targets.values.shape[1:] != reference.targets.shape[1:]:
        raise DataError(
            f"{raw.name}: y has rows of shape {tuple(targets.values.shape[1:])}, the training data "
            f"{tuple(reference.targets.shape[1:])}"
        )
    if (
        train.kind == "array"
        and not isinstance(train.inputs, TableRows)
        and raw.inputs[0].shape != train.inputs[0].shape
    ):
        raise DataError(
            f"{raw.name}: samples have shape {tuple(raw.inputs[0].shape)}, the training samples "
            f"{tuple(train.inputs[0].shape)}"
        )
    return Samples(raw.kind, raw.inputs, torch.from_numpy(targets.values), raw.name, raw.columns)


def _split(
    samples: Samples | None, problem: Problem, val: Any, stratify: bool, seed: int, classes: list[str] | None
) -> tuple[Samples, Samples | None, list[str]]:
    assert samples is not None
    assert samples.targets is not None
    if samples.kind != "image":
        # Before the split, so that rows and counts are those of the user's data.
        check_samples(samples, "train")
    if problem == "classification":
        check_classes({"train": samples}, classes or [])
    train, held_out, notes = split_samples(samples.targets, problem, val, stratify=stratify, seed=seed, classes=classes)
    if not len(held_out):
        return samples, None, notes
    return samples.subset(train), samples.subset(held_out), [f"{samples.name}: {note}" for note in notes]


def read_parts(
    data: Any, kind: Kind | None, text_column: str | None, label_column: str | None, form: TableForm | None = None
) -> tuple[dict[str, Raw], list[str]]:
    """The sets that `data` brings, "train" always among them, before labels are read; and notes."""
    notes: list[str] = []
    if isinstance(data, Mapping):
        sources = _named_parts(data)
    elif isinstance(data, str | os.PathLike) and Path(data).is_dir():
        sources, notes = _folder_parts(Path(data), kind)
    else:
        sources = {"train": data}
    parts: dict[str, Raw] = {}
    for role in ("train", "val", "test"):
        if role not in sources:
            continue
        known = form if role == "train" else _form_of(parts["train"])
        raw = read_source(sources[role], kind, text_column, label_column, labels_required=True, columns=known)
        if len(sources) > 1 and raw.name in ("X", "data"):
            raw.name = f"{role} {raw.name}"
        parts[role] = raw
        kind = kind or raw.kind
    if any(isinstance(raw.inputs, TableRows) for raw in parts.values()):
        for raw in parts.values():
            if not isinstance(raw.inputs, TableRows):
                raw.inputs = TableRows.from_matrix(raw.inputs, parts["train"].columns, raw.name)
                raw.columns = raw.inputs.names
    return parts, notes


def _form_of(train: Raw) -> TableForm | None:
    """How the tables beside the training table are read."""
    if isinstance(train.inputs, TableRows):
        return TableForm(train.inputs.names, train.inputs.words, raw=True)
    return None if train.columns is None else TableForm(train.columns)


def _named_parts(data: Mapping[Any, Any]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for key, source in data.items():
        if key not in ROLES:
            raise DataError(
                f"data: unknown key {key!r}; expected 'train', 'val', 'test'{nearest(str(key), list(ROLES))}; "
                "columns go in as pandas.DataFrame(data)"
            )
        if ROLES[key] in parts:
            raise DataError(f"data: the key {key!r} names the {ROLES[key]} set a second time")
        if source is not None:
            parts[ROLES[key]] = source
    if "train" not in parts:
        raise DataError(f"data: the key 'train' is missing; got {listed(list(data))}")
    return {role: parts[role] for role in ("train", "val", "test") if role in parts}


def _folder_parts(folder: Path, kind: Kind | None) -> tuple[dict[str, Path], list[str]]:
    tables = {
        entry.stem.lower(): entry
        for entry in sorted(folder.iterdir())
        if entry.suffix.lower() in TABLE_SUFFIXES and entry.is_file()
    }
    files = {ROLES[stem]: path for stem, path in tables.items() if stem in ROLES}
    names, ignored = sub_folders(folder)
    folders = {ROLES[name.lower()]: folder / name for name in names if name.lower() in ROLES}
    if (
        "train" in folders
        and kind != "text"
        and any(holds_images(folders["train"] / name) for name in sub_folders(folders["train"])[0])
    ):
        others = [name for name in names if name.lower() not in ROLES] + ignored
        return dict(sorted(folders.items())), [
            f"{folder}: not part of the data, ignored: {listed(others)}"
        ] if others else []
    if "train" in files:
        return files, []
    if tables and not any(holds_images(folder / name) for name in names):
        raise DataError(
            f"{folder}: the folder holds {listed([path.name for path in tables.values()])} but no train.tsv or "
            f"train.csv; give the file itself, or name it so"
        )
    return {"train": folder}, []


def read_source(
    source: Any,
    kind: Kind | None,
    text_column: str | None,
    label_column: str | None,
    *,
    labels_required: bool,
    columns: Sequence[str] | TableForm | None = None,
) -> Raw:
    """The samples of one set, labels as they came, numbers as a Tensor; of a table the features `columns`, where known.

    Raises:
        DataError: the source cannot be read, or its type is not supported.
    """
    if isinstance(source, DataLoader):
        dataset, notes = loader_dataset(source)
        raw = dataset_samples(dataset, kind)
        raw.notes = notes + raw.notes
    elif isinstance(source, IterableDataset) or is_dataset(source):
        raw = dataset_samples(source, kind)
    else:
        raw = read_arrays(source, kind, text_column, label_column, labels_required=labels_required, columns=columns)
    return with_tensors(in_form(raw, columns))


def load_samples(
    source: Any,
    *,
    kind: Kind,
    problem: Problem,
    classes: list[str] | None,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: Literal["required", "ignored"] = "required",
    columns: Sequence[str] | TableForm | None = None,
) -> Samples:
    """One set to evaluate or predict, its labels read by the meaning that `classes` fixes.

    Args:
        source: as `data` of `load_data`, one set; with labels "ignored" also bare inputs: a list of texts, a text, an
            image file, a folder of images without class folders, an array X; and for the columns of a table a dict of
            lists, or of single values for one row.
        classes: label names in the order of the class index; None for regression.
        columns: the features of a table that the model takes, in its order, or a `TableForm`; None: all, as they stand.
        labels: "required", or "ignored": targets are None.

    Raises:
        DataError: as `load_data`; a label that `classes` lacks is named with its nearest; a text is blank, or a
            number NaN or infinite. Images are decoded, and so checked, when their batch is made.
    """
    ignored = labels == "ignored"
    source = one_set(source, kind, ignored, columns)
    raw = read_source(source, kind, text_column, label_column, labels_required=not ignored, columns=columns)
    check_set(raw, kind, ignored)
    targets = None if ignored else torch.from_numpy(make_targets(raw, problem, classes).values)
    samples = Samples(raw.kind, raw.inputs, targets, raw.name, raw.columns)
    if raw.kind != "image":
        check_samples(samples, raw.name)
    return samples
