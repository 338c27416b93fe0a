"""Checkpoints: whole or not there, and readable without running any code in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from pyft.core.files import write_atomic
from pyft.errors import CheckpointError
from pyft.freezing.parts import bring_up_to_date, refresh_parts

FORMAT = 1


def save_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write tensors, numbers, strings, lists and dicts with `torch.save`, atomically.

    Raises:
        CheckpointError: disk full, no permission, ... The file that was there before is untouched.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save(dict(content, format=FORMAT), file)
        except RuntimeError as error:
            # torch's zip writer hides the system's reason behind its own "unexpected pos".
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    return _guarded(Path(path), write)


def _guarded(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    try:
        return write_atomic(path, write)
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> CheckpointError:
    """The error for a file of the run that could not be written."""
    kept = f"the last good one is kept: {path}" if path.exists() else "there was none before it"
    return CheckpointError(
        f"cannot write {path}: {error.strerror or error}; {kept}. Free some space or mend the folder, then resume"
    )


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; tensors arrive on the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give the last.pt of a run")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {_first_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} is not a checkpoint of format {FORMAT} (found {found}): it comes from elsewhere")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def save_weights(path: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> Path:
    """Write named tensors as safetensors, atomically.

    Raises:
        CheckpointError: disk full, no permission, ... The file that was there before is untouched.
    """
    from safetensors.torch import save

    return _guarded(Path(path), lambda file: file.write(save(dict(weights))))


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: missing or damaged.
    """
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise CheckpointError(f"no weights at {path}: it belongs to the run and must not be removed")
    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointError(f"cannot read the weights {path}: {_first_line(error)}") from error


def load_weights(path: str | os.PathLike[str], model: nn.Module) -> list[str]:
    """Put the tensors of a safetensors file into the parameters and buffers of the same names; returns the names.

    Raises:
        CheckpointError: missing or damaged file, a name that the model lacks, another shape. Nothing is changed then.
    """
    weights = read_weights(path)
    put_weights(model, weights, str(path))
    return list(weights)


def put_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy named tensors into a model; all names and shapes are checked before the first write.

    Raises:
        CheckpointError: a name that the model lacks, or another shape; `source` is named.
    """
    places: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    places.update(model.named_buffers(remove_duplicate=False))
    for name, tensor in weights.items():
        if name not in places:
            raise CheckpointError(f"{source} holds '{name}', which the model lacks: it belongs to another model")
        if places[name].shape != tensor.shape:
            raise CheckpointError(
                f"'{name}' has shape {tuple(tensor.shape)} in {source} but {tuple(places[name].shape)} in the model"
            )
    # Parts that no weight of the file is of must not take stale values.
    bring_up_to_date(model)
    with torch.no_grad():
        for name, tensor in weights.items():
            places[name].copy_(tensor)
    refresh_parts(model)


def take_weights(places: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Named tensors as they are now: on the CPU, contiguous, no two in one memory, as safetensors demands.

    They may share memory with the model: write them before it changes.
    """
    seen: set[int] = set()
    taken = {}
    for name, place in places:
        tensor = place.detach().to("cpu")
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or (storage.data_ptr() in seen and tensor.numel()):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            storage = tensor.untyped_storage()
        seen.add(storage.data_ptr())
        taken[name] = tensor
    return taken
