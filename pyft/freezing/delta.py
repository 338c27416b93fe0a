"""What fine-tuning changed, in a file of its own: the trained parts and weights, checked against the model below."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyft.core.files import write_atomic
from pyft.errors import CheckpointError, ConfigError
from pyft.freezing.entries import Entries
from pyft.freezing.eval_mode import kept
from pyft.freezing.fingerprint import fingerprint
from pyft.freezing.parts import attached, bring_up_to_date, named_weights, refresh_parts
from pyft.freezing.plan import FreezePlan, unwrap

KEY = "pyft.delta"
FORMAT = 1
INDICES = ("rows", "columns", "blocks")


def save_delta(model: nn.Module, path: str | os.PathLike[str], plan: FreezePlan | None = None) -> Path:
    """Write what trains to one safetensors file, atomically: parts, whole weights, and the buffers that may change.

    `pyft.apply_delta` puts it into another copy of the model from before the training, and refuses any other model:
    the file holds a SHA-256 of every frozen weight, and of the frozen entries of those that train in part.

    Args:
        model: as `pyft.freeze` or `pyft.train_only` left it; or after `plan.release`, with that `plan`.
        path: where to write.
        plan: what trained; None: what does so now.

    Returns:
        The path.

    Raises:
        ConfigError: nothing of the model trains, or the plan is for another model.
        CheckpointError: the file cannot be written. An older one is left as it was.
    """
    from safetensors.torch import save

    model = unwrap(model)
    bring_up_to_date(model)
    weights = dict(named_weights(model))
    if plan is not None:
        plan.check_names(model)
        parts = {name: chosen.entries for name, chosen in plan.parts.items()}
        trained = [name for name in plan.trainable if name not in parts]
        quiet = set(plan.eval_modules)
    else:
        parts = attached(model)
        trained = [name for name, weight in weights.items() if weight.requires_grad]
        quiet = {name for name, module in model.named_modules() if kept(module)}
    if not parts and not trained:
        raise ConfigError("save_delta: nothing of this model trains, so there is no delta: give the plan of the run")
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for name, part in parts.items():
        tensors[f"value:{name}"] = part.take(weights[name].detach())
        for key in INDICES:
            if getattr(part, key) is not None:
                tensors[f"{key}:{name}"] = getattr(part, key)
        entries[name] = {"shape": list(part.shape), "block_size": list(part.block_size)}
    tensors.update({f"value:{name}": weights[name].detach() for name in trained})
    buffers = dict(_live_buffers(model, quiet))
    tensors.update({f"value:{name}": buffer for name, buffer in buffers.items()})
    header = {
        "format": FORMAT,
        "parts": entries,
        "whole": trained,
        "buffers": list(buffers),
        "base": _base(weights, parts, trained),
    }
    # Copies: safetensors refuses two tensors in one memory.
    content = {name: tensor.to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    path = Path(path)
    try:
        return write_atomic(path, lambda file: file.write(save(content, {KEY: json.dumps(header)})))
    except OSError as error:
        raise CheckpointError(f"{path}: the delta cannot be written: {error}") from error


def apply_delta(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Put a delta into the model that it was trained from. Everything is checked before the first write.

    Args:
        model: with the weights that the tuned model had before its training: what was frozen then must have the same
            bits now. It may train, whole or in part; parts follow.
        path: what `pyft.save_delta` wrote.

    Returns:
        Names of the weights and buffers that were written.

    Raises:
        CheckpointError: missing or damaged file, or another model: a name, a shape, a dtype, or a weight with other
            values than the delta was trained on. Nothing is written then.
    """
    model, path = unwrap(model), Path(path)
    delta = _read(path)
    bring_up_to_date(model)
    weights: dict[str, Tensor] = dict(named_weights(model))
    places = {**weights, **dict(model.named_buffers())}
    _check(delta, weights, places)
    with torch.no_grad():
        for name, values in delta.values.items():
            if name in delta.parts:
                delta.parts[name].write_(places[name], values.to(places[name].device))
            else:
                places[name].copy_(values)
    refresh_parts(model)
    return list(delta.values)


@dataclass(frozen=True)
class _Delta:
    path: Path
    parts: dict[str, Entries]
    values: dict[str, Tensor]
    whole: list[str]
    base: dict[str, list[Any]]


def _read(path: Path) -> _Delta:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"no delta at {path}: give a file that pyft.save_delta wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: this delta cannot be read: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path} holds no delta of format {FORMAT}: give a file that pyft.save_delta wrote")
    try:
        parts = {
            name: Entries(
                shape=tuple(said["shape"]),
                block_size=tuple(said["block_size"]),
                **{key: tensors.get(f"{key}:{name}") for key in INDICES},
            )
            for name, said in header["parts"].items()
        }
        names = [*parts, *header["whole"], *header["buffers"]]
        return _Delta(path, parts, {name: tensors[f"value:{name}"] for name in names}, header["whole"], header["base"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: this delta is damaged: {type(error).__name__} {error}") from error


def _check(delta: _Delta, weights: dict[str, Tensor], places: dict[str, Tensor]) -> None:
    wrong = f"{delta.path}: not a delta of this model:"
    for name, values in delta.values.items():
        if name not in places:
            raise CheckpointError(f"{wrong} it holds '{name}', which the model lacks")
        wanted = delta.parts[name].shape if name in delta.parts else tuple(values.shape)
        if tuple(places[name].shape) != wanted:
            raise CheckpointError(f"{wrong} '{name}' has the shape {tuple(places[name].shape)}, there {wanted}")
        if places[name].dtype != values.dtype:
            raise CheckpointError(f"{wrong} '{name}' is {places[name].dtype}, there {values.dtype}: cast the model")
        if name in delta.parts:
            _check_part(delta.path, name, delta.parts[name], values)
    for name in weights:
        if name not in delta.base and name not in delta.whole:
            raise CheckpointError(f"{wrong} the model has '{name}', which the tuned one lacked")
    for name, before in delta.base.items():
        if name not in weights:
            raise CheckpointError(f"{wrong} it was trained beside '{name}', which the model lacks")
        now = _print_of(weights[name], delta.parts.get(name))
        if now[:2] != before[:2]:
            raise CheckpointError(f"{wrong} '{name}' is {now[1]} {tuple(now[0])}, there {before[1]} {tuple(before[0])}")
        if now != before:
            raise CheckpointError(
                f"{wrong} the frozen values of '{name}' are not those that it was trained on: give the model with the "
                "weights from before the training"
            )


def _check_part(path: Path, name: str, entries: Entries, values: Tensor) -> None:
    """A damaged file may hold indices that lead out of the weight."""
    limits = {"rows": entries.shape[:1], "columns": entries.shape[1:2]}
    limits["blocks"] = tuple(size // block for size, block in zip(entries.shape, entries.block_size, strict=False))
    for key, limit in limits.items():
        index = getattr(entries, key)
        if index is not None and (
            index.numel() == 0 or int(index.min()) < 0 or bool((index >= torch.tensor(limit)).any())
        ):
            raise CheckpointError(f"{path}: this delta is damaged: {key} of '{name}' are outside the weight")
    if tuple(values.shape) != entries.part_shape:
        raise CheckpointError(
            f"{path}: this delta is damaged: the part of '{name}' has the shape {tuple(values.shape)}"
        )


def _base(weights: dict[str, nn.Parameter], parts: dict[str, Entries], trained: list[str]) -> dict[str, list[Any]]:
    whole = set(trained)
    return {name: _print_of(weight, parts.get(name)) for name, weight in weights.items() if name not in whole}


def _print_of(weight: Tensor, part: Entries | None) -> list[Any]:
    """Shape, dtype and SHA-256 of what is frozen of a weight."""
    found = fingerprint(weight if part is None else part.rest(weight))
    return [list(found.shape), found.dtype, found.digest.hex()]


def _live_buffers(model: nn.Module, quiet: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Saved buffers of the modules that do not stay in eval mode."""
    for prefix, module in model.named_modules():
        if prefix not in quiet:
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    yield f"{prefix}.{name}" if prefix else name, buffer
