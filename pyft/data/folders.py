"""Folders of images in the torchvision ImageFolder layout: one sub-folder per class."""

from __future__ import annotations

import os
from pathlib import Path

from pyft.data.raw import Raw, counted, listed
from pyft.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
_NOT_CLASSES = ("__MACOSX", "__pycache__")


def is_hidden(name: str) -> bool:
    """Folders and files that tools leave behind (`.ipynb_checkpoints`, `.DS_Store`, `__MACOSX`): never a class.

    >>> is_hidden(".ipynb_checkpoints"), is_hidden("daisy")
    (True, False)
    """
    return name.startswith(".") or name in _NOT_CLASSES


def sub_folders(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the sub-folders, sorted, and of those that are ignored."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be read: {error.strerror or error}") from None
    return [name for name in names if not is_hidden(name)], [name for name in names if is_hidden(name)]


def image_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Image files below `folder`, in the order of their names, and the other visible files.

    Links are followed; a folder that contains itself is visited once.
    """
    images: list[Path] = []
    others: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not is_hidden(name))
        if real in seen:
            continue
        seen.add(real)
        for name in sorted(files):
            if not is_hidden(name):
                (images if name.lower().endswith(IMAGE_SUFFIXES) else others).append(Path(place) / name)
    return images, others


def holds_images(folder: Path) -> bool:
    """Whether at least one image file lies below `folder`."""
    return bool(image_files(folder)[0])


def folder_samples(folder: Path, *, labels_required: bool = True) -> Raw:
    """The images of a folder with one sub-folder per class, sorted by class and name.

    Without `labels_required`, images that lie directly in the folder are taken too, without labels.

    Raises:
        DataError: there is no class folder, or no image.
    """
    names, ignored = sub_folders(folder)
    notes = [f"{folder}: not a class, ignored: {listed(ignored)}"] if ignored else []
    inputs: list[Path] = []
    labels: list[str] = []
    others: list[Path] = []
    empty: list[str] = []
    for name in names:
        images, rest = image_files(folder / name)
        inputs += images
        labels += [name] * len(images)
        others += rest
        if not images:
            empty.append(name)
    direct = sorted(
        entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(entry.name)
    )
    if not inputs and direct and not labels_required:
        return Raw("image", direct, None, folder.name, notes=notes)
    if direct:
        raise DataError(
            f"{folder}: {counted(len(direct), 'image')} outside any class folder (first {direct[0].name!r}); "
            f"put each image into a sub-folder named like its class"
        )
    if not inputs:
        raise DataError(
            f"{folder}: no image found; expected one sub-folder per class with files such as name.jpg, or "
            f"train.tsv, or train/ with one of these"
        )
    if others:
        notes.append(
            f"{folder}: {counted(len(others), 'file')} without an image suffix ignored, first {others[0].name!r}"
        )
    raw = Raw(
        "image", inputs, labels, folder.name, class_names=[name for name in names if name not in empty], notes=notes
    )
    if empty:
        raw.notes.append(f"{folder}: {counted(len(empty), 'class folder')} without an image: {listed(empty)}")
    return raw
