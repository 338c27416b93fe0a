"""The batches of one run in several processes: each trains on its share of every batch, and scores some batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from pyft.evaluation.metrics import Metrics
from pyft.samples import Batch, Samples, Share
from pyft.training.data_parallel import least_share, share_of
from pyft.training.loop import BatchSource
from pyft.training.processes import Processes


class IndexedBatches(BatchSource, Protocol):
    """Batches that can be cut: `pyft.data.batches.Batches`, or `pyft.cached_features.CachedBatches`."""

    @property
    def samples(self) -> Samples:
        """What they are of."""

    def index(self, epoch: int) -> list[np.ndarray]:
        """The sample numbers of each batch of an epoch: list of int64 (B,)."""

    def make(self, batches: list[np.ndarray], epoch: int) -> Any:
        """A generator of batches of these samples."""


class SharedBatches:
    """The share of one process of every training batch; all have the same number of batches, in the same order.

    Args:
        model: as it trains; with BatchNorm a share has two samples where the batch has.
    """

    def __init__(self, batches: IndexedBatches, processes: Processes, model: nn.Module) -> None:
        self.inner, self.processes, self.model = batches, processes, model

    @property
    def num_batches(self) -> int:
        """Batches per epoch."""
        return self.inner.num_batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's share of the batches of an epoch from number `start` on."""
        whole, least = self.inner.index(epoch)[start:], least_share(self.model)
        shares = [share_of(index, self.processes.rank, self.processes.count, least) for index in whole]
        with closing(self.inner.make([index for index, _ in shares], epoch)) as made:
            for batch, index, (_, counts) in zip(made, whole, shares, strict=True):
                yield replace(batch, share=Share(_targets(self.inner, index), counts))


def shared_scores(
    call: Callable[[Any], Any],
    batches: IndexedBatches,
    processes: Processes,
    evaluate: Callable[[Iterator[Batch]], Metrics],
) -> Metrics:
    """Metrics of batches that the processes share out: each runs the model on some, the first one counts them all.

    The batches are those of one process, so the logits are, too.

    Args:
        call: gives the logits of inputs.
        evaluate: metrics of batches that have logits for inputs; called in the first process.

    Returns:
        The same in all processes.
    """
    index = batches.index(0)
    with torch.no_grad(), closing(batches.make(index[processes.rank :: processes.count], 0)) as mine:
        logits = [call(batch.inputs).cpu() for batch in mine]
    everyone = processes.gather(logits)

    def scored() -> Iterator[Batch]:
        assert everyone is not None
        for number, numbers in enumerate(index):
            values = everyone[number % processes.count][number // processes.count]
            yield Batch(values, _targets(batches, numbers), torch.from_numpy(np.ascontiguousarray(numbers)))

    return processes.on_first(lambda: evaluate(scored()))


def _targets(batches: IndexedBatches, index: np.ndarray) -> torch.Tensor | None:
    targets = batches.samples.targets
    return None if targets is None else targets.index_select(0, torch.from_numpy(np.ascontiguousarray(index)))
