"""What is known of a batch: its samples, their lengths, and how else they could have been put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pyft.errors import ConfigError
from pyft.freezing.prefix_cache_cut import Variants, row_inputs
from pyft.freezing.prefix_cache_trace import tensors_in

# Two ways to the same number may differ by rounding; dropout, batch statistics or padding differ by far more.
_ROUNDING, _LOOSE = 1e-4, 5e-2
_MASK = "attention_mask"


@dataclass
class BatchFacts:
    """A batch.

    Attributes:
        batch: samples. length: padded length; 0 where there is none.
        lengths: (B,) of the samples: up to the last place that the mask keeps; 0 where there is no mask.
        form: per tensor its dtype and sizes, without the batch and the padded length.
    """

    batch: int
    length: int
    lengths: np.ndarray
    form: tuple[Any, ...]


def batch_facts(inputs: Any) -> BatchFacts:
    """The facts of the inputs of one call of the model.

    Raises:
        ConfigError: there is no tensor, or tensors have different numbers of samples.
    """
    tensors = tensors_in(dict(inputs) if isinstance(inputs, Mapping) else inputs)
    if not tensors or any(tensor.ndim == 0 or len(tensor) != len(tensors[0]) for tensor in tensors):
        raise ConfigError("inputs: expected tensors with one first dimension B")
    batch, mask = len(tensors[0]), mask_of(inputs)
    length = 0 if mask is None else mask.shape[1]
    lengths = np.zeros(batch, dtype=np.int64)
    if mask is not None:
        places = torch.arange(1, length + 1, device=mask.device)
        lengths = (places * (mask != 0)).amax(1).cpu().numpy() if length else lengths
    form = tuple(
        (tensor.dtype, *("T" if length and size == length else size for size in tensor.shape[1:])) for tensor in tensors
    )
    return BatchFacts(batch, length, lengths, form)


def mask_of(inputs: Any) -> torch.Tensor | None:
    """The mask (B, T) among inputs by name: 0 for padding."""
    mask = inputs.get(_MASK) if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def make_variants(inputs: Any) -> Variants:
    """The example with fewer rows, and with a shorter padded length.

    Raises:
        ConfigError: there is one sample only.
    """
    facts = batch_facts(inputs)
    if facts.batch < 2:
        raise ConfigError("example_inputs: expected at least two samples, got one")
    few = facts.batch - 1
    shorter, short = None, 0
    if facts.length > 1:
        short = facts.length - 1
        shorter = _trimmed(inputs, facts, short)
    fewer = row_inputs(inputs, lambda tensor: tensor[:few])
    return Variants(row_inputs(inputs, lambda t: t), fewer, shorter, facts.batch, few, facts.length, short)


def compositions(inputs: Any) -> Iterator[tuple[np.ndarray, Any]]:
    """Rows of the example put together otherwise: (rows (b,), their inputs)."""
    facts = batch_facts(inputs)
    backwards = np.arange(facts.batch)[::-1].copy()
    yield backwards, _rows(inputs, backwards)
    shortest = np.argsort(facts.lengths, kind="stable")[: max(1, facts.batch // 2)]
    some = _rows(inputs, shortest)
    least = int(facts.lengths[shortest].max())
    yield shortest, _trimmed(some, batch_facts(some), least) if least else some


def _rows(inputs: Any, rows: np.ndarray) -> Any:
    chosen = torch.from_numpy(rows)
    return row_inputs(inputs, lambda tensor: tensor.index_select(0, chosen.to(tensor.device)))


def _trimmed(inputs: Any, facts: BatchFacts, length: int) -> Any:
    """The inputs without what lies behind `length` in every tensor (B, T, ...)."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        padded = tensor.ndim > 1 and tensor.shape[1] == facts.length
        return tensor[:, :length].contiguous() if padded else tensor

    return row_inputs(inputs, cut)


def agree(found: Any, expected: Any, loose: bool = False) -> bool:
    """Whether two outputs of a model are the same but for rounding."""
    one, other = tensors_in(found), tensors_in(expected)
    return len(one) == len(other) and all(
        same_values(a, b, loose=loose or a.dtype.itemsize < 4) for a, b in zip(one, other, strict=True)
    )


def same_values(one: torch.Tensor, other: torch.Tensor, loose: bool = False) -> bool:
    """Whether two tensors are the same but for rounding; NaN equals NaN."""
    if one.shape != other.shape:
        return False
    one, other = one.detach(), other.detach()
    if not one.numel() or torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    if not torch.equal(one.isnan(), other.isnan()):
        return False
    one, other = one.nan_to_num().double(), other.nan_to_num().double()
    scale = other.abs().max().item()
    return (one - other).abs().max().item() <= (_LOOSE if loose else _ROUNDING) * scale
