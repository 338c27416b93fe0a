"""Weights of a module in one safetensors file; tensors that are tied are written once."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

from pyft.core.files import write_atomic
from pyft.errors import CheckpointError, ConfigError

TIED = "pyft.tied"


def save_model(path: str | os.PathLike[str], module: nn.Module) -> Path:
    """Write the parameters and persistent buffers of `module`, atomically.

    Names that stand for one tensor are stored once, with the list of names in the file's metadata.

    Raises:
        ConfigError: the module keeps extra state that is not a tensor, or a parameter that has no values yet.
        CheckpointError: the file cannot be written (disk full, no permission). An older file is left as it was.
    """
    from safetensors.torch import save

    tensors, tied = _distinct(module)
    # One key only: safetensors writes several in random order, and the same weights would give other bytes.
    metadata = {TIED: json.dumps(tied)} if tied else {"format": "pt"}
    try:
        return write_atomic(path, lambda file: file.write(save(tensors, metadata)))
    except OSError as error:
        raise CheckpointError(f"{path}: the weights cannot be written: {error}") from error


def load_state(path: str | os.PathLike[str], module: nn.Module) -> None:
    """Copy the weights of a file written by `save_model` into `module`, in place; ties and identities stay.

    Raises:
        CheckpointError: missing or damaged file, or names and shapes that are not those of `module`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            tied = json.loads((file.metadata() or {}).get(TIED, "{}"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: these weights cannot be read: {error}") from error
    for name, others in tied.items():
        state.update(dict.fromkeys(others, state[name]))
    wanted = {name: tuple(tensor.shape) for name, tensor in _tensors(module).items()}
    came = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != came:
        raise CheckpointError(f"{path}: not the weights of this model: {_difference(wanted, came)}")
    module.load_state_dict(state)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    state = module.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ConfigError(f"model: '{name}' is {type(value).__name__}: extra state that is no tensor is not saved")
        if isinstance(value, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
            raise ConfigError(f"model: '{name}' has no values yet: call the model once before saving it")
    return dict(state)


def _distinct(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """Tensors to write by their first name, and the other names of each."""
    names: dict[int, list[str]] = defaultdict(list)
    state = _tensors(module)
    for name, tensor in state.items():
        names[id(tensor)].append(name)
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for group in names.values():
        tensor = state[group[0]].detach().to("cpu").contiguous()
        # safetensors refuses two tensors in one storage (weights of an RNN on CUDA are views of one).
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[group[0]] = tensor
    return tensors, {group[0]: group[1:] for group in names.values() if len(group) > 1}


def _difference(wanted: dict[str, tuple[int, ...]], came: dict[str, tuple[int, ...]]) -> str:
    for name, shape in wanted.items():
        if name not in came:
            return f"'{name}' is missing in the file"
        if came[name] != shape:
            return f"'{name}' has shape {came[name]} in the file, {shape} in the model"
    return f"the file has '{min(set(came) - set(wanted))}', which the model lacks"
