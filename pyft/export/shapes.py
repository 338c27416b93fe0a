"""Which dimensions of a model's inputs are free, found by running the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from pyft.errors import ConfigError, ExportError
from pyft.export.run import first_line

Inputs = dict[str, torch.Tensor]
Call = Callable[..., torch.Tensor]

TRACE_SIZES = (2, 3, 5, 7, 11, 13, 17)


@dataclass
class FreeDims:
    """The free dimensions of each input.

    Attributes:
        names: input name to {dimension: its name}; "batch" for dimension 0, "sequence" for a length.
        notes: a line for each dimension that might be expected to be free and is not.
    """

    names: dict[str, dict[int, str]]
    notes: list[str] = field(default_factory=list)

    def lengths(self) -> list[dict[str, int]]:
        """Input name to dimension, for each free length."""
        labels = sorted({label for dims in self.names.values() for label in dims.values()} - {"batch"})
        return [
            {name: dim for name, dims in self.names.items() for dim, other in dims.items() if other == label}
            for label in labels
        ]


def named_inputs(example: torch.Tensor | Mapping[str, torch.Tensor]) -> Inputs:
    """The example as a dict; a lone Tensor is called "input".

    Raises:
        ConfigError: something that is not a Tensor, no sample, or batch sizes that differ.
    """
    inputs = dict(example) if isinstance(example, Mapping) else {"input": example}
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) or not value.ndim or not len(value):
            came = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ConfigError(f"example: '{name}' must be a Tensor (B, ...) with at least one sample, got {came}")
    sizes = {len(value) for value in inputs.values()}
    if len(sizes) != 1:
        raise ConfigError(f"example: all inputs must have one batch size, got {sorted(sizes)}")
    return inputs


def check_batches(call: Call, inputs: Inputs, sizes: tuple[int, ...]) -> torch.Tensor:
    """Run the model in batches of the given sizes. Gives the logits of the last.

    Raises:
        ExportError: it fails, gives something else than one row per sample, or other logits each time.
    """
    logits, batch = torch.empty(0), inputs
    for size in sizes:
        batch = take_rows(inputs, size)
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
        try:
            logits = call(*batch.values())
        except Exception as error:
            raise ExportError(
                f"the model does not run in eval mode on a batch of {size} ({shapes}), so it cannot be exported with a "
                f"free batch size: {first_line(error)}. In forward take sizes from the input, as in x.shape[0]"
            ) from error
        if logits.ndim < 1 or len(logits) != size:
            raise ExportError(f"the model gives logits of shape {tuple(logits.shape)} for a batch of {size}")
    if not torch.equal(torch.nan_to_num(logits), torch.nan_to_num(call(*batch.values()))):
        raise ExportError(
            "the model gives other logits for the same inputs each time in eval mode, so no file can behave the "
            "same: look for dropout with training=True or random numbers in forward"
        )
    return logits


def find_free_dims(call: Call, inputs: Inputs) -> FreeDims:
    """Batch is free always. Lengths are free where the model runs with another one.

    A length is dimension 1 of integer inputs (tokens and masks) and of floating-point inputs of the same size; of a
    floating-point input (B, T, F) dimension 1, else dimension 2. Pictures (B, C, H, W) keep their size.
    """
    free = FreeDims({name: {0: "batch"} for name in inputs})
    for options in _length_candidates(inputs):
        reasons = []
        for group in options:
            reason = _why_fixed(call, inputs, group)
            if reason is None:
                number = len(free.lengths())
                for name, dim in group.items():
                    free.names[name][dim] = f"sequence_{number + 1}" if number else "sequence"
                break
            reasons.append(reason)
        else:
            free.notes.append("; ".join(reasons))
    return free


def take_rows(inputs: Inputs, size: int) -> Inputs:
    """The first `size` samples, taken again from the start where there are fewer.

    Repeated floating-point samples are scaled down a little each time, so that no two are alike.
    """
    taken = {}
    for name, value in inputs.items():
        rows = torch.arange(size, device=value.device)
        taken[name] = value[rows % len(value)]
        if value.is_floating_point():
            scale = 1 - (rows // len(value)) / (4 * size)
            taken[name] = taken[name] * scale.to(value.dtype).reshape(-1, *[1] * (value.ndim - 1))
    return taken


def with_length(inputs: Inputs, group: Mapping[str, int], size: int) -> Inputs:
    """The inputs with one length cut, or repeated from the start, to `size`."""
    changed = dict(inputs)
    for name, dim in group.items():
        value = inputs[name]
        changed[name] = value.index_select(dim, torch.arange(size, device=value.device) % value.shape[dim])
    return changed


def other_length(size: int) -> int:
    """A length near `size` that is neither 0 nor 1: shorter where possible, as a longer one may not be allowed."""
    return size - 1 if size > 2 else size + 1


def trace_inputs(inputs: Inputs, free: FreeDims) -> Inputs:
    """Inputs to trace with: free sizes above 1, and a batch size that no other dimension has.

    A size of 0 or 1 would be built into the graph, and equal sizes may be taken for the same dimension.
    """
    for group in free.lengths():
        name, dim = next(iter(group.items()))
        if inputs[name].shape[dim] < 2:
            inputs = with_length(inputs, group, 2)
    taken = {size for value in inputs.values() for size in value.shape[1:]}
    return take_rows(inputs, next(size for size in TRACE_SIZES if size not in taken))


def _length_candidates(inputs: Inputs) -> list[list[dict[str, int]]]:
    """Lists of alternatives; each alternative is one length: input name to dimension."""
    groups: dict[int, dict[str, int]] = {}
    for name, value in inputs.items():
        if not value.is_floating_point() and value.ndim > 1:
            groups.setdefault(value.shape[1], {})[name] = 1
    candidates = [[group] for group in groups.values()]
    for name, value in inputs.items():
        if not value.is_floating_point():
            continue
        if value.ndim > 1 and value.shape[1] in groups:
            groups[value.shape[1]][name] = 1
        elif value.ndim == 3:
            candidates.append([{name: 1}, {name: 2}])
    return candidates


def _why_fixed(call: Call, inputs: Inputs, group: Mapping[str, int]) -> str | None:
    name, dim = next(iter(group.items()))
    size = inputs[name].shape[dim]
    other = other_length(size)
    try:
        logits = call(*with_length(inputs, group, other).values())
    except Exception as error:
        return f"dimension {dim} of '{name}' is fixed at {size}: with {other} the model says: {first_line(error)}"
    if len(logits) != len(inputs[name]):
        return f"dimension {dim} of '{name}' is fixed at {size}: with {other} the logits are {tuple(logits.shape)}"
    return None
