"""A stage in which only the head trains: what enters the head is computed once, and the head trains on that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pyft.data.batches import Batches
from pyft.data.inputs import free_memory
from pyft.errors import PyftError
from pyft.freezing.prefix import cut_reason, head_inputs, head_tail
from pyft.job import Job, autocast, to_device
from pyft.samples import Samples

FEATURE_BATCH = 64
"""Texts per batch where no gradient is kept: large enough to fill the matrix units, small enough for the cache."""
MEMORY_SHARE = 4
"""Features are kept while they take at most one part in this many of the free memory."""


@dataclass(frozen=True)
class HeadFeatures:
    """What enters the head, for all samples.

    Attributes:
        train, val: features (N, ...) float32 as array samples.
        tail: the model's own head, with the dropout just before it.
    """

    train: Samples
    val: Samples | None
    tail: nn.Module

    def call(self, model: nn.Module, features: Any) -> torch.Tensor:
        """Logits from features."""
        return self.tail(features)


def no_features_reason(job: Job) -> str | None:
    """Why the features must be computed anew in every epoch, for a stage that is frozen now; None if once is enough."""
    if job.head.name is None:
        return "the model has no layer that is the head"
    if job.arguments["augment"] != "none":
        return f"augment={job.arguments['augment']!r} changes the inputs in every epoch"
    if len(job.example.index) < 2:
        return "there is one sample only"
    if differs_by_epoch(job):
        return "preprocess, or the Dataset, draws at random"
    inputs = to_device(job.example.inputs, job.device)
    reason = cut_reason(job.model, job.head.name, inputs)
    if reason is not None:
        return reason
    features = head_inputs(job.model, job.head.name, inputs)
    if features.dtype == torch.float64:
        return "the features are float64"
    count = len(job.data.train) + (0 if job.data.val is None else len(job.data.val))
    size = features[0].numel() * 4 * count
    if size * MEMORY_SHARE > free_memory():
        return f"the features of {count:,} samples take {size / 2**30:.1f} GiB, more than a quarter of the free memory"
    return None


def differs_by_epoch(job: Job) -> bool:
    """Whether the same samples come out different in another epoch."""
    plain = job.data.kind == "text" or isinstance(job.data.train.inputs, (list, torch.Tensor))
    if plain and hasattr(job.preprocess, "spec"):
        return False
    few = job.data.train.subset(range(len(job.example.index)))
    batches = Batches(few, job.preprocess, len(few), seed=job.settings.seed, shuffle=False, bucket=False)
    first, second = (next(iter(batches.epoch(epoch))).inputs for epoch in (0, 1))
    return not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and torch.equal(first, second))


def compute_features(job: Job) -> HeadFeatures:
    """Run the frozen part of the model once over all samples."""
    assert job.head.name is not None
    job.model.eval()
    tail = head_tail(job.model, job.head.name, to_device(job.example.inputs, job.device))
    val = None if job.val_batches is None else _features(job, job.val_batches)
    return HeadFeatures(_features(job, job.batches), val, tail)


def _features(job: Job, batches: Batches) -> Samples:
    samples = batches.samples
    if samples.kind == "text":
        batches = Batches(samples, job.preprocess, FEATURE_BATCH, shuffle=False)
    store: torch.Tensor | None = None
    for batch in batches.epoch(0):
        with autocast(job.device, job.forward_precision):
            found = head_inputs(job.model, job.head.name or "", to_device(batch.inputs, job.device))
        if store is None:
            store = torch.empty((len(samples), *found.shape[1:]), dtype=torch.float32)
        store[batch.index] = found.to("cpu", torch.float32)
    if store is None:
        raise PyftError(f"{samples.name}: there is no batch in it")
    return Samples("array", store, samples.targets, samples.name)


Call = Callable[[nn.Module, Any], torch.Tensor]
