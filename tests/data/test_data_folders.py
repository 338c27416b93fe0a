"""Folders of images: classes, splits, hidden folders, and images that are none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyft.data.checks import check_data
from pyft.data.sources import load_data, load_samples
from pyft.errors import DataError

Image = pytest.importorskip("PIL.Image", reason="pip install 'pyft[image]'")


def draw(path: Path, shade: int = 0, size: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(shade).integers(0, 255, (size, size, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(["ant", "bee", "cow"]):
        for shade in range(4):
            draw(tmp_path / "pictures" / name / f"{shade}.jpg", shade + 10 * number)
    return tmp_path / "pictures"


def labelled(samples: Any, classes: list[str] | None) -> list[tuple[str, str]]:
    return [
        (path.parent.name, (classes or [])[target])
        for path, target in zip(samples.inputs, samples.targets.tolist(), strict=True)
    ]


def test_classes_are_the_sub_folders(folder: Path) -> None:
    data = load_data(folder, val=0.25)
    assert (data.kind, data.problem, data.classes) == ("image", "classification", ["ant", "bee", "cow"])
    assert data.val is not None
    assert (len(data.train), len(data.val)) == (9, 3)
    for samples in (data.train, data.val):
        assert all(name == label for name, label in labelled(samples, data.classes))
    assert check_data(data) == []


def test_checkpoint_folders_are_no_class(folder: Path) -> None:
    draw(folder / ".ipynb_checkpoints" / "0-checkpoint.jpg")
    draw(folder / "ant" / ".ipynb_checkpoints" / "0-checkpoint.jpg")
    draw(folder / "__MACOSX" / "x.jpg")
    (folder / "ant" / ".DS_Store").write_bytes(b"x")
    (folder / "ant" / "._0.jpg").write_bytes(b"x")
    (folder / "bee" / "notes.txt").write_text("x")
    data = load_data(folder, val=0)
    assert data.classes == ["ant", "bee", "cow"]
    assert len(data.train) == 12
    assert any("ignored: '.ipynb_checkpoints', '__MACOSX'" in note for note in data.notes)
    assert any("1 file without an image suffix ignored, first 'notes.txt'" in note for note in data.notes)


def test_validation_folder_that_lacks_a_class_shifts_no_label(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(folder, root / "train")
    shutil.copytree(folder, root / "valid")
    shutil.copytree(folder, root / "test")
    shutil.rmtree(root / "valid" / "ant")
    shutil.rmtree(root / "test" / "bee")
    draw(root / "test" / ".ipynb_checkpoints" / "x.jpg")
    data = load_data(root)
    assert data.classes == ["ant", "bee", "cow"]
    for samples, names in ((data.val, {"bee", "cow"}), (data.test, {"ant", "cow"})):
        pairs = labelled(samples, data.classes)
        assert {name for name, _ in pairs} == names
        assert all(name == label for name, label in pairs)
    alone = load_samples(root / "valid", kind="image", problem="classification", classes=data.classes)
    assert all(name == label for name, label in labelled(alone, data.classes))


def test_class_in_validation_that_training_lacks(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(folder, root / "train")
    shutil.copytree(folder, root / "val")
    (root / "val" / "bee").rename(root / "val" / "beee")
    with pytest.raises(
        DataError,
        match=r"val: 1 label that the training data lacks: 'beee' \(4 samples\).*nearest: "
        "'bee'",
    ):
        load_data(root)


def test_folders_without_a_use(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image found; expected one sub-folder per class"):
        load_data(tmp_path / "empty")
    draw(tmp_path / "flat" / "a.png")
    with pytest.raises(DataError, match="1 image outside any class folder"):
        load_data(tmp_path / "flat")
    with pytest.raises(DataError, match=r"needs a \.tsv or \.csv file"):
        load_data(folder, task="text-classification")
    shutil.rmtree(folder / "bee")
    shutil.rmtree(folder / "cow")
    with pytest.raises(DataError, match="all 4 samples have the label 'ant'; a classifier needs two classes"):
        check_data(load_data(folder, val=0))


def test_empty_class_folder_is_told(folder: Path) -> None:
    (folder / "dog").mkdir()
    data = load_data(folder, val=0)
    assert data.classes == ["ant", "bee", "cow"]
    assert any("1 class folder without an image: 'dog'" in note for note in data.notes)


def test_links_and_deeper_folders(folder: Path) -> None:
    draw(folder / "ant" / "more" / "deep.png", 99)
    (folder / "ant" / "loop").symlink_to(folder / "ant", target_is_directory=True)
    data = load_data(folder, val=0)
    assert [path.name for path in data.train.inputs if path.parts[-2] == "more"] == ["deep.png"]
    assert len(data.train) == 13


def test_bad_images_are_named_and_counted(folder: Path) -> None:
    whole = (folder / "ant" / "0.jpg").read_bytes()
    (folder / "ant" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "bee" / "1.jpg").write_text("no image at all")
    (folder / "cow" / "2.jpg").write_bytes(b"")
    png = draw(folder / "cow" / "broken.png")
    png.write_bytes(png.read_bytes()[:-200])
    with pytest.raises(DataError) as caught:
        check_data(load_data(folder, val=0))
    message = str(caught.value)
    assert "4 of 13 images unreadable" in message
    for name, fault in [
        ("0.jpg", "damaged or truncated"),
        ("1.jpg", "not an image"),
        ("2.jpg", "empty"),
        ("broken.png", "truncated"),
    ]:
        assert name in message
        assert fault in message


def test_image_that_vanishes_after_listing(folder: Path) -> None:
    data = load_data(folder, val=0)
    (folder / "ant" / "0.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 12 images unreadable: .*0\.jpg: the file does not exist"):
        check_data(data)


def test_list_of_paths_and_pictures(folder: Path) -> None:
    paths = sorted(folder.glob("*/*.jpg"))
    names = [path.parent.name for path in paths]
    data = load_data((paths, names), val=0)
    assert (data.kind, data.classes) == ("image", ["ant", "bee", "cow"])
    assert load_data(([str(path) for path in paths], names), val=0).train.inputs == data.train.inputs
    pictures = [Image.open(path) for path in paths]
    assert load_data((pictures, names), val=0).kind == "image"
    assert check_data(load_data((pictures, names), val=0)) == []
    assert load_data([(picture, name) for picture, name in zip(pictures, names, strict=True)], val=0).kind == "image"
    flat = load_samples(paths[:2], kind="image", problem="classification", classes=data.classes, labels="ignored")
    assert (list(flat.inputs), flat.targets) == (paths[:2], None)


def test_folder_without_classes_to_predict(tmp_path: Path) -> None:
    draw(tmp_path / "new" / "b.png")
    draw(tmp_path / "new" / "a.jpg")
    samples = load_samples(
        tmp_path / "new", kind="image", problem="classification", classes=["x", "y"], labels="ignored"
    )
    assert [path.name for path in samples.inputs] == ["a.jpg", "b.png"]
    assert samples.targets is None


def test_same_image_in_test_and_training_is_told(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(folder, root / "train")
    draw(root / "test" / "ant" / "new.jpg", 77)
    shutil.copy(folder / "cow" / "3.jpg", root / "test" / "cow.jpg")
    (root / "test" / "cow").mkdir()
    (root / "test" / "cow.jpg").rename(root / "test" / "cow" / "renamed.jpg")
    warnings = check_data(load_data(root, val=0))
    assert any("test (test): 1 of 2 images also are in training" in warning for warning in warnings)


def test_fingerprint_follows_content_not_place_or_time(folder: Path, tmp_path: Path) -> None:
    base = load_data(folder).fingerprint
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    assert load_data(moved).fingerprint == base
    path = moved / "ant" / "0.jpg"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert load_data(moved).fingerprint != base


def test_flowers5(shared_data: Path) -> None:
    data = load_data(shared_data / "flowers5")
    assert data.classes == ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    assert data.val is not None
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (640, 160, 400)
    assert np.bincount(data.val.targets).tolist() == [32] * 5  # type: ignore[arg-type]
    for samples in (data.train, data.val, data.test):
        assert all(name == label for name, label in labelled(samples, data.classes))
    assert check_data(data) == []
