"""What must be true of data before any training, and what is worth a warning."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pyft.data.fingerprint import file_digests
from pyft.data.images import image_fault
from pyft.data.raw import counted, listed
from pyft.data.unusable import check_finite, check_texts
from pyft.errors import DataError
from pyft.samples import Data, Samples

RARE = 6
"""A class is called rare when the largest class has more than this many times its samples."""


def check_data(data: Data) -> list[str]:
    """Check all sets of `data`; return warnings (imbalance, contradictory labels, test samples seen in training).

    Raises:
        DataError: a set is empty; there is one class only; validation or test holds a label that training lacks; an
            input or target is NaN or infinite; an image cannot be read; a text is blank.
    """
    sets = {
        role: samples
        for role, samples in (("train", data.train), ("val", data.val), ("test", data.test))
        if samples is not None
    }
    for role, samples in sets.items():
        check_samples(samples, role, data)
    warnings: list[str] = []
    if data.problem == "classification":
        warnings += check_classes(sets, data.classes or [])
    elif data.problem == "multilabel":
        warnings += _check_multilabel(sets["train"], data.classes or [])
    elif bool((data.train.targets == data.train.targets[0]).all()):  # type: ignore[index, union-attr]
        raise DataError(
            f"{data.train.name}: all {len(data.train)} targets are the same number; there is nothing to learn"
        )
    return warnings + _repeated(sets)


def check_samples(samples: Samples, role: str, data: Data | None = None) -> None:
    """Check one set by itself.

    Raises:
        DataError: see `check_data`.
    """
    where = samples.name if samples.name == role else f"{samples.name} ({role})"
    if not len(samples):
        raise DataError(f"{where}: there is no sample in it")
    targets = samples.targets
    if targets is not None:
        if len(targets) != len(samples):
            raise DataError(
                f"{where}: {counted(len(samples), 'input')}, {counted(len(targets), 'target')}; each input needs one"
            )
        check_finite(targets, where, "target")
        if data is not None and data.problem == "classification":
            _check_range(targets, where, len(data.classes or []))
    if samples.kind == "text":
        check_texts(samples.inputs, where)
    elif isinstance(samples.inputs, torch.Tensor):
        check_finite(samples.inputs, where, "input")
    elif samples.kind == "image" and isinstance(samples.inputs, list):
        check_images(samples.inputs, where)


def _check_range(targets: torch.Tensor, where: str, num_classes: int) -> None:
    outside = ((targets < 0) | (targets >= num_classes)).nonzero().flatten()
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"{where}: {counted(len(outside), 'label')} outside 0..{num_classes - 1}, first {int(targets[row])} at "
            f"row {row}"
        )


def check_images(inputs: list[Any], where: str) -> None:
    """Decode every image once, in a few threads, and name those that cannot be.

    Args:
        inputs: paths or PIL images.

    Raises:
        DataError: at least one is missing, truncated, or not an image.
    """
    with ThreadPoolExecutor(4) as pool:
        faults = [(row, fault) for row, fault in enumerate(pool.map(image_fault, inputs)) if fault]
    if not faults:
        return
    shown = "; ".join(
        f"{inputs[row] if isinstance(inputs[row], Path) else f'row {row}'}: {fault}" for row, fault in faults[:5]
    )
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    raise DataError(
        f"{where}: {len(faults)} of {counted(len(inputs), 'image')} unreadable: {shown}{more}; replace or remove them"
    )


def check_classes(sets: dict[str, Samples], classes: list[str]) -> list[str]:
    counts = {role: torch.bincount(samples.targets, minlength=len(classes)) for role, samples in sets.items()}  # type: ignore[arg-type]
    train = sets["train"]
    present = (counts["train"] > 0).nonzero().flatten().tolist()
    if len(present) < 2:
        only = classes[present[0]] if present and present[0] < len(classes) else "none"
        raise DataError(
            f"{train.name}: {'the one sample has' if len(train) == 1 else f'all {len(train)} samples have'} the label "
            f"{only!r}; a classifier needs two classes or more"
        )
    for role, samples in sets.items():
        lacking = ((counts["train"] == 0) & (counts[role] > 0)).nonzero().flatten().tolist()
        if lacking:
            named = ", ".join(
                f"{classes[number]!r} ({counted(int(counts[role][number]), 'sample')})" for number in lacking[:5]
            )
            raise DataError(
                f"{samples.name} ({role}): {counted(len(lacking), 'label')} that training lacks: {named}; "
                f"add such samples to training, or stratify=True"
            )
    return _imbalance(counts["train"][present], [classes[number] for number in present], train.name)


def _imbalance(counts: torch.Tensor, classes: list[str], where: str) -> list[str]:
    largest = int(counts.max())
    rare = [(classes[number], int(counts[number])) for number in (counts * RARE < largest).nonzero().flatten().tolist()]
    if not rare:
        return []
    named = ", ".join(f"{name!r} {count}" for name, count in sorted(rare, key=lambda item: item[1])[:5])
    return [
        f"{where}: the classes are imbalanced: {named}, the largest {largest}; "
        f"look at macro-F1, and consider class_weight='balanced'"
    ]


def _check_multilabel(train: Samples, classes: list[str]) -> list[str]:
    assert train.targets is not None
    totals = train.targets.sum(0)
    never = [classes[number] for number in (totals == 0).nonzero().flatten().tolist()]
    always = [classes[number] for number in (totals == len(train)).nonzero().flatten().tolist()]
    if len(never) + len(always) == len(classes):
        raise DataError(
            f"{train.name}: every label is the same in all samples (never: {listed(never)}; "
            f"always: {listed(always)}); nothing to learn"
        )
    warnings = [f"{train.name}: never positive: {listed(never)}"] if never else []
    return warnings + ([f"{train.name}: positive in every sample: {listed(always)}"] if always else [])


def _repeated(sets: dict[str, Samples]) -> list[str]:
    """Warnings for samples of validation or test that also are in training, and for contradictory labels."""
    train = sets["train"]
    if train.kind == "text":
        keys = {role: [" ".join(text.casefold().split()) for text in samples.inputs] for role, samples in sets.items()}
        what = "texts"
    elif train.kind == "image" and all(
        isinstance(samples.inputs, list) and isinstance(samples.inputs[0], Path) for samples in sets.values()
    ):
        keys = _image_keys(sets)
        what = "images"
    else:
        return []
    known = set(keys["train"])
    warnings = []
    for role in sets:
        seen = 0 if role == "train" else sum(key in known for key in keys[role])
        if seen:
            warnings.append(
                f"{sets[role].name} ({role}): {seen} of {len(keys[role])} {what} also are in training; "
                f"the metrics will look better than they are"
            )
    return warnings + _contradictions(keys["train"], train, what)


def _image_keys(sets: dict[str, Samples]) -> dict[str, list[str]]:
    """One key per image, equal for equal content; only files that share their size with another are read."""
    paths = {role: [Path(path) for path in samples.inputs] for role, samples in sets.items()}
    sizes = {role: [path.stat().st_size for path in files] for role, files in paths.items()}
    common = Counter(size for values in sizes.values() for size in values)
    keys: dict[str, list[str]] = {}
    for role, files in paths.items():
        twins = [row for row, size in enumerate(sizes[role]) if common[size] > 1]
        digests = dict(zip(twins, file_digests([files[row] for row in twins]), strict=True))
        keys[role] = [digests.get(row, f"{role} {row}") for row in range(len(files))]
    return keys


def _contradictions(keys: list[str], train: Samples, what: str) -> list[str]:
    if train.targets is None or train.targets.ndim != 1 or train.targets.is_floating_point():
        return []
    labels: dict[str, int] = {}
    clashing = {
        key for key, label in zip(keys, train.targets.tolist(), strict=True) if labels.setdefault(key, label) != label
    }
    if not clashing:
        return []
    example = f", for instance {next(key for key in keys if key in clashing)[:80]!r}" if what == "texts" else ""
    return [f"{train.name}: {len(clashing)} {what} occur with different labels{example}"]
