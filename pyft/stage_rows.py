"""The plan of a stage whose weights train in part: rows are chosen once, and a run that goes on has the same ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pyft.core.files import write_atomic
from pyft.errors import CheckpointError
from pyft.freezing.entries import Entries
from pyft.freezing.plan import FreezePlan, freeze, make_from, make_plan
from pyft.freezing.select_rows import Chosen
from pyft.freezing.selection import Selection
from pyft.job import Job, to_device
from pyft.models.call import logits_of
from pyft.samples import Batch
from pyft.training.stages import Stage

BATCHES = 8
"""Training batches that rows are chosen on: each costs one forward and backward pass of the whole model."""


def freeze_for(job: Job, stage: Stage, folder: Path | None) -> FreezePlan:
    """Freeze the model for a stage.

    Args:
        folder: of the run; the chosen rows are kept there, since later weights would choose others. None: not kept.

    Raises:
        ConfigError: as `pyft.freeze`.
        CheckpointError: the rows that were kept cannot be read or written.
    """
    if not isinstance(stage.freeze, Mapping):
        return freeze(job.model, stage.freeze)
    number = [other.name for other in job.stages].index(stage.name) + 1
    path = None if folder is None else folder / f"rows-{number}.safetensors"
    if path is not None and path.is_file():
        draft = make_plan(job.model, stage.freeze, draft=True)
        frozen = Selection(draft.names, frozenset(draft.named_modules))
        return make_from(job.model, frozen, _read(path)).apply(job.model)
    plan = freeze(job.model, stage.freeze, batches=_batches(job), loss=_loss(job))
    if plan.parts and path is not None:
        _write(path, plan.parts)
    return plan


def _batches(job: Job) -> Iterator[Batch]:
    """The first training batches of the run."""
    for batch in islice(job.batches.epoch(0), BATCHES):
        targets = None if batch.targets is None else batch.targets.to(job.device)
        yield replace(batch, inputs=to_device(batch.inputs, job.device), targets=targets)


def _loss(job: Job) -> Any:
    return lambda outputs, targets: job.objective(logits_of(outputs), targets)


def _write(path: Path, parts: Mapping[str, Chosen]) -> None:
    from safetensors.torch import save

    tensors, said = {}, {}
    for name, chosen in parts.items():
        entries = chosen.entries
        indices = {key: getattr(entries, key) for key in ("rows", "columns", "blocks")}
        tensors.update({f"{key}:{name}": index for key, index in indices.items() if index is not None})
        said[name] = [list(entries.shape), list(entries.block_size), chosen.reason, chosen.share]
    content = {key: value.clone() for key, value in tensors.items()}
    try:
        write_atomic(path, lambda file: file.write(save(content, {"pyft.rows": json.dumps(said)})))
    except OSError as error:
        raise CheckpointError(f"{path}: the chosen rows cannot be written: {error}") from error


def _read(path: Path) -> dict[str, Chosen]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {})["pyft.rows"])
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: Chosen(
                Entries(
                    tuple(shape),
                    tensors.get(f"rows:{name}"),
                    tensors.get(f"columns:{name}"),
                    tensors.get(f"blocks:{name}"),
                    (size[0], size[1]),
                ),
                reason,
                share,
            )
            for name, (shape, size, reason, share) in said.items()
        }
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: the chosen rows cannot be read: {error}") from error
