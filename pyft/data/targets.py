"""Labels as they came, to targets: class numbers, 0/1 rows, or numbers to predict."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyft.data.raw import Raw, counted, listed, nearest
from pyft.errors import DataError
from pyft.samples import Problem

LARGEST_LABEL = 1_000_000
_SEVERAL = re.compile(r"[|;,]")


@dataclass(frozen=True)
class Targets:
    """Targets of one set.

    Attributes:
        values: as `Samples.targets`, an array.
        classes: label names in the order of the class index; None for regression.
        notes: lines worth telling the user.
    """

    values: NDArray[Any]
    problem: Problem
    classes: list[str] | None
    notes: list[str] = field(default_factory=list)


def make_targets(raw: Raw, problem: Problem | None, classes: list[str] | None = None) -> Targets:
    """Turn `raw.labels` into targets; `classes` fixes their meaning, where it is known already.

    Without `problem`: text labels and whole numbers are classes, other numbers are regression targets, rows of 0 and 1
    are multilabel. Whole numbers 0..C-1 stay as they are; other labels are sorted, numbers as numbers.

    Raises:
        DataError: a label is missing, negative, beyond a million, unknown to `classes`, or does not fit `problem`.
    """
    labels = plain_labels(raw)
    guessed = problem is None
    if problem is None:
        problem = guess_problem(labels, raw)
    if problem == "regression":
        return _regression(labels, raw)
    if problem == "multilabel":
        return _multilabel(labels, raw, classes)
    return _classification(labels, raw, classes, guessed)


def plain_labels(raw: Raw) -> Any:
    """Labels as list of str, list of lists of str, or array (N,) or (N, K) of numbers; (N, 1) becomes (N,).

    Raises:
        DataError: labels are of mixed or unknown types, or have more than two dimensions.
    """
    labels = raw.labels
    if hasattr(labels, "detach"):
        tensor = labels.detach().cpu()
        # NumPy has no bfloat16.
        labels = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    elif hasattr(labels, "to_numpy"):
        labels = labels.to_numpy()
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "OUS":
        labels = labels.tolist() if labels.ndim == 1 or labels.shape[-1:] != (1,) else labels[..., 0].tolist()
    if isinstance(labels, list | tuple):
        labels = _listed_labels(list(labels), raw)
    if not isinstance(labels, np.ndarray):
        return labels
    if labels.dtype.kind not in "iufb":
        raise DataError(
            f"{raw.name}: labels of dtype {labels.dtype} are neither names nor numbers; "
            f"convert them with .astype(str) or .astype(int)"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2):
        raise DataError(
            f"{raw.name}: y has shape {labels.shape}; expected (N,), or (N, K) for multilabel or several regression "
            f"targets"
        )
    return labels


def _listed_labels(labels: list[Any], raw: Raw) -> Any:
    if all(isinstance(label, str) for label in labels):
        return labels
    missing = [
        row for row, label in enumerate(labels) if label is None or (isinstance(label, float) and label != label)
    ]
    if missing and any(isinstance(label, str) or label is None for label in labels):
        raise DataError(
            f"{raw.name}: {counted(len(missing), 'label')} missing, first at {raw.where(missing[0])}; "
            f"label these samples or leave them out"
        )
    if all(
        isinstance(label, list | tuple | set | frozenset) and all(isinstance(name, str) for name in label)
        for label in labels
    ):
        return [sorted(label) for label in labels]
    other = next(
        (row for row, label in enumerate(labels) if isinstance(label, str) != isinstance(labels[0], str)), None
    )
    if other is not None:
        raise DataError(
            f"{raw.name}: labels are of mixed types: {type(labels[0]).__name__} at {raw.where(0)}, "
            f"{type(labels[other]).__name__} at {raw.where(other)}; use names or numbers throughout"
        )
    try:
        return np.asarray([label.tolist() if hasattr(label, "tolist") else label for label in labels])
    except ValueError:
        raise DataError(
            f"{raw.name}: the rows of y have different lengths; expected (N,), (N, K), or lists of names"
        ) from None


def guess_problem(labels: Any, raw: Raw) -> Problem:
    """What kind of problem the labels pose: see `make_targets`."""
    if isinstance(labels, list):
        if labels and isinstance(labels[0], list):
            return "multilabel"
        numbers = _parsed(labels) if raw.from_table else None
        return "classification" if numbers is None or _whole_numbers(labels) else "regression"
    if labels.ndim == 2:
        return "multilabel" if bool(np.isin(labels, (0, 1)).all()) else "regression"
    return "regression" if labels.dtype.kind == "f" else "classification"


def _parsed(labels: Sequence[str]) -> np.ndarray | None:
    try:
        return np.array([float(label) for label in labels], dtype=np.float64)
    except ValueError:
        return None


def _whole_numbers(labels: Sequence[str]) -> bool:
    return all(re.fullmatch(r"[+-]?\d+", label) for label in labels)


def _regression(labels: Any, raw: Raw) -> Targets:
    notes = []
    if isinstance(labels, list):
        numbers = _parsed(labels) if labels and isinstance(labels[0], str) else None
        if numbers is None:
            row = next(
                (row for row, label in enumerate(labels) if not isinstance(label, str) or _parsed([label]) is None), 0
            )
            raise DataError(
                f"{raw.name}: regression needs numbers as targets, got {labels[row]!r} at {raw.where(row)}; "
                f"for names use task='classification'"
            )
        labels = numbers
    wild = np.argwhere(~np.isfinite(labels) | (np.abs(labels.astype(np.float64)) > np.finfo(np.float32).max))
    if len(wild):
        row = int(wild[0][0])
        raise DataError(
            f"{raw.name}: {counted(len(wild), 'target')} NaN, infinite or beyond float32, first at "
            f"{raw.where(row)}; mend these rows or leave them out"
        )
    distinct = np.unique(labels)
    if (
        labels.ndim == 1
        and len(distinct) <= 20
        and len(distinct) * 5 <= len(labels)
        and bool((distinct == np.round(distinct)).all())
    ):
        notes.append(
            f"{raw.name}: the targets are {len(distinct)} different whole numbers, taken as numbers to predict; "
            f"if they are classes say task='classification'"
        )
    return Targets(labels.astype(np.float32), "regression", None, notes)


def _multilabel(labels: Any, raw: Raw, classes: list[str] | None) -> Targets:
    if isinstance(labels, list):
        rows = [
            [part.strip() for part in _SEVERAL.split(label) if part.strip()] if isinstance(label, str) else label
            for label in labels
        ]
        names = classes or sorted({name for row in rows for name in row})
        if not names:
            raise DataError(f"{raw.name}: no sample has a label; multilabel needs at least one label name")
        unknown = [(number, name) for number, row in enumerate(rows) for name in row if name not in set(names)]
        if unknown:
            raise _unknown_labels(raw, [name for _, name in unknown], unknown[0][0], names)
        place = {name: position for position, name in enumerate(names)}
        values = np.zeros((len(rows), len(names)), dtype=np.float32)
        for number, row in enumerate(rows):
            values[number, [place[name] for name in row]] = 1.0
        return Targets(values, "multilabel", names)
    if labels.ndim != 2 or not bool(np.isin(labels, (0, 1)).all()):
        raise DataError(
            f"{raw.name}: multilabel needs y of shape (N, C) holding 0 and 1, or lists of names; "
            f"got shape {labels.shape}, dtype {labels.dtype}"
        )
    names = classes or raw.class_names or [str(number) for number in range(labels.shape[1])]
    if len(names) != labels.shape[1]:
        raise DataError(
            f"{raw.name}: y has {labels.shape[1]} columns, the data it belongs to has {len(names)} labels "
            f"({listed(names)})"
        )
    notes = []
    if classes is None and labels.shape[1] > 1 and bool((labels.sum(1) == 1).all()):
        notes.append(
            f"{raw.name}: each row of y has exactly one 1; if these are one-hot classes say task='classification'"
        )
    return Targets(labels.astype(np.float32), "multilabel", list(names), notes)


def _classification(labels: Any, raw: Raw, classes: list[str] | None, guessed: bool) -> Targets:
    if isinstance(labels, list) and labels and isinstance(labels[0], list):
        raise DataError(f"{raw.name}: y holds lists of names; say task='multilabel', or give one name per sample")
    if isinstance(labels, list):
        return _named_classes([str(label) for label in labels], raw, classes, guessed)
    if labels.ndim == 2:
        if not bool((np.isin(labels, (0, 1)).all(1) & (labels.sum(1) == 1)).all()):
            raise DataError(
                f"{raw.name}: classification needs y of shape (N,), or one-hot rows; got shape {labels.shape}; "
                f"for several labels say task='multilabel'"
            )
        names = raw.class_names or [str(number) for number in range(labels.shape[1])]
        raw.class_names = names if len(names) == labels.shape[1] else None
        labels = labels.argmax(1)
    numbers = _class_numbers(labels, raw)
    if raw.class_names is not None:
        names = _checked_names(numbers, raw)
        return _named_classes([names[number] for number in numbers.tolist()], raw, classes, guessed)
    if classes is not None:
        return _known_numbers(numbers, raw, classes)
    distinct = np.unique(numbers)
    _check_not_ids(len(distinct), len(numbers), raw, guessed)
    names = [str(number) for number in distinct.tolist()]
    notes = []
    if distinct.tolist() != list(range(len(distinct))):
        notes.append(
            f"{raw.name}: the labels {listed(names)} are not 0..{len(names) - 1}; they are numbered in this order"
        )
    return Targets(np.searchsorted(distinct, numbers).astype(np.int64), "classification", names, notes)


def _class_numbers(labels: np.ndarray, raw: Raw) -> np.ndarray:
    """(N,) int64 labels out of an array of whole numbers."""
    if labels.dtype.kind == "f":
        wrong = np.flatnonzero(~np.isfinite(labels) | (labels != np.round(labels)))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{raw.name}: {counted(len(wrong), 'label')} not a whole number, first {labels[row]} at "
                f"{raw.where(row)}; "
                f"classes are 0..C-1 or names; for numbers to predict say task='regression'"
            )
    for outside, what in ((labels < 0, "negative"), (labels > LARGEST_LABEL, f"beyond {LARGEST_LABEL}")):
        rows = np.flatnonzero(outside)
        if len(rows):
            raise DataError(
                f"{raw.name}: {counted(len(rows), 'label')} {what}, first {labels[rows[0]]} at "
                f"{raw.where(int(rows[0]))}; classes are 0..C-1; "
                f"leave out unlabelled samples, or give names: y.astype(str)"
            )
    return labels.astype(np.int64)


def _checked_names(numbers: np.ndarray, raw: Raw) -> list[str]:
    names = raw.class_names or []
    beyond = np.flatnonzero(numbers >= len(names))
    if len(beyond):
        raise DataError(
            f"{raw.name}: {counted(len(beyond), 'label')} beyond the {len(names)} classes the data names, first "
            f"{numbers[beyond[0]]} at {raw.where(int(beyond[0]))}"
        )
    return names


def _known_numbers(numbers: np.ndarray, raw: Raw, classes: list[str]) -> Targets:
    """Numbers are names where the classes are numbers ('1', '2', '5'), else positions."""
    if all(name.isdecimal() for name in classes):
        return _named_classes([str(number) for number in numbers.tolist()], raw, classes, False)
    rows = np.flatnonzero(numbers >= len(classes))
    if len(rows):
        raise DataError(
            f"{raw.name}: {counted(len(rows), 'label')} outside 0..{len(classes) - 1}, first {numbers[rows[0]]} at "
            f"{raw.where(int(rows[0]))}; the classes are {listed(classes)}"
        )
    return Targets(numbers, "classification", classes)


def _named_classes(labels: list[str], raw: Raw, classes: list[str] | None, guessed: bool) -> Targets:
    notes = []
    if classes is None:
        distinct = set(labels)
        _check_not_ids(len(distinct), len(labels), raw, guessed)
        classes = raw.class_names or _sorted_names(distinct)
        folded: dict[str, str] = {}
        for name in classes:
            twin = folded.setdefault(name.casefold(), name)
            if twin != name:
                notes.append(f"{raw.name}: the labels {twin!r} and {name!r} differ in case only and are two classes")
    place = {name: position for position, name in enumerate(classes)}
    unknown = [row for row, label in enumerate(labels) if label not in place]
    if unknown:
        raise _unknown_labels(raw, [labels[row] for row in unknown], unknown[0], classes)
    values = np.fromiter((place[label] for label in labels), dtype=np.int64, count=len(labels))
    return Targets(values, "classification", list(classes), notes)


def _sorted_names(names: set[str]) -> list[str]:
    # Names that are equal as numbers ("1", "01") still need one order, whatever order the set gives.
    return sorted(names, key=lambda name: (int(name), name)) if _whole_numbers(list(names)) else sorted(names)


def _check_not_ids(distinct: int, count: int, raw: Raw, guessed: bool) -> None:
    if guessed and count >= 20 and distinct * 2 > count:
        raise DataError(
            f"{raw.name}: {distinct} different labels in {count} samples are not classes; "
            f"for numbers to predict say task='regression'; "
            f"for a table check label_column=; to take them as classes say task='classification'"
        )


def _unknown_labels(raw: Raw, labels: list[str], row: int, classes: Sequence[str]) -> DataError:
    names = list(dict.fromkeys(labels))
    found = ", ".join(f"{name!r} ({counted(labels.count(name), 'sample')})" for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return DataError(
        f"{raw.name}: {counted(len(names), 'label')} that the training data lacks: {found}{more}, first at "
        f"{raw.where(row)}{nearest(names[0], classes)}; "
        f"known: {listed(classes)}; correct the labels, or add such samples to the training data"
    )
