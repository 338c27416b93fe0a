"""Checkpoints are whole or not there, and a full disk costs nothing that was there before."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from pyft.errors import CheckpointError
from pyft.training.checkpoint import (
    load_checkpoint,
    load_weights,
    put_weights,
    read_weights,
    save_checkpoint,
    save_weights,
    take_weights,
)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_round_trip(tmp_path: Path) -> None:
    content = {"tensor": torch.arange(3), "numbers": [1, 2.5, None], "nested": {"text": "x", "pair": (1, 2)}}
    loaded = load_checkpoint(save_checkpoint(tmp_path / "last.pt", content))
    assert torch.equal(loaded.pop("tensor"), torch.arange(3))
    assert loaded == {"numbers": [1, 2.5, None], "nested": {"text": "x", "pair": (1, 2)}, "format": 1}


@pytest.mark.parametrize("what", ["checkpoint", "weights"])
def test_a_full_disk_keeps_the_last_good_one(what: str, tiny_disk: Path) -> None:
    small, large = {"w": torch.ones(1000)}, {"w": torch.ones(100_000)}
    save, load = (save_checkpoint, load_checkpoint) if what == "checkpoint" else (save_weights, read_weights)
    path = save(tiny_disk / "last", small)
    with pytest.raises(CheckpointError, match=r"No space left on device.*last good one is kept") as caught:
        save(path, large)
    assert str(path) in str(caught.value)
    assert torch.equal(load(path)["w"], torch.ones(1000))
    assert [entry.name for entry in tiny_disk.iterdir()] == ["last"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="there was none before"):
        save_checkpoint(tmp_path / "file" / "last.pt", {})


def test_missing_damaged_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "last.pt")
    path = save_checkpoint(tmp_path / "last.pt", {"w": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        load_checkpoint(path)
    torch.save({"w": 1}, path)
    with pytest.raises(CheckpointError, match="format"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no weights at"):
        read_weights(tmp_path / "best.safetensors")
    (tmp_path / "best.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        read_weights(tmp_path / "best.safetensors")


class Touch:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"format": 1, "evil": Touch(tmp_path / "touched")}, tmp_path / "last.pt")
    (tmp_path / "touched").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "touched").exists()


def test_weights_of_views_and_of_shared_memory(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    module = nn.Module()
    module.a = nn.Parameter(flat[:4])
    module.b = nn.Parameter(flat[4:].reshape(2, 4).t())
    module.c = nn.Parameter(flat.view(3, 4))
    module.register_buffer("d", torch.ones(1).expand(5))
    places = [*module.named_parameters(), *module.named_buffers()]
    path = save_weights(tmp_path / "best.safetensors", take_weights(places))
    # Four tensors, not four times the storage that three of them share.
    assert os.path.getsize(path) < 1000
    for name, tensor in read_weights(path).items():
        assert torch.equal(tensor, dict(places)[name])


def test_weights_go_to_their_names_or_nowhere(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'2\.weight', which the model lacks"):
        put_weights(model, {"0.weight": torch.ones(3, 2), "2.weight": torch.ones(1)}, "file")
    with pytest.raises(CheckpointError, match=r"\(2, 3\) in file but \(3, 2\)"):
        put_weights(model, {"1.bias": torch.ones(2), "0.weight": torch.ones(2, 3)}, "file")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    path = save_weights(tmp_path / "w.safetensors", {"0.weight": torch.full((3, 2), 7.0)})
    assert load_weights(path, model) == ["0.weight"]
    assert bool((model[0].weight == 7.0).all())
    assert torch.equal(model[1].weight, before["1.weight"])
