"""Features of a run in several processes: each sample is computed by one of them, once, and read by all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyft.freezing.prefix_cache_play import StandInError
from pyft.freezing.prefix_cache_share import Filled, attach, compute_batch, keep_on_own_gpu, memory_of, store_batch
from pyft.job import autocast
from pyft.training.processes import Processes

if TYPE_CHECKING:
    from pyft.cached_features import FillProgress, StageFeatures


class NotCachedError(Exception):
    """Why every epoch of a stage runs the whole model, in words."""


def agree_on_features(features: StageFeatures, processes: Processes) -> None:
    """Keep values where the first process keeps them, and train on the same inputs everywhere."""
    memory = processes.of_first(memory_of(features.cache))
    if not processes.first and memory is not None and memory.type == "cuda":
        keep_on_own_gpu(features.cache, len(features.keeper.numbering))
    if not processes.all(features.tail is not None):
        features.tail = None


def fill_together(features: StageFeatures, processes: Processes, tell: FillProgress) -> None:
    """Compute what is not stored yet: each process some of the batches, which all get, in the order of one process.

    Raises:
        NotCachedError, CheckpointError: as `StageFeatures.fill`, in all processes.
    """
    cache, order = features.cache, features.order()
    files = processes.of_first(cache.on_disk)
    trouble: Exception | None = None
    for view in range(cache.augment_views):
        stored = processes.of_first([bool(cache.has(rows, view).all()) for rows in order])
        todo = [number for number, is_stored in enumerate(stored) if not is_stored]
        tell(sum(map(len, order)) - sum(len(order[n]) for n in todo))
        for start in range(0, len(todo), processes.count):
            turn = todo[start : start + processes.count]
            mine: Filled | Exception | None = trouble
            if mine is None and processes.rank < len(turn):
                mine = _computed(features, turn[processes.rank], view)
            everyone = processes.all_gather(mine)
            processes.raise_any(everyone)
            if processes.first or not files:
                trouble = _stored(features, everyone)
            tell(sum(len(order[n]) for n in turn))
    if trouble is None:
        trouble = _finished(features)
    processes.raise_first(trouble)
    if files:
        processes.together(lambda: None if processes.first else _attach(features))


def _computed(features: StageFeatures, number: int, view: int) -> Filled | Exception:
    rows, job = features.order()[number], features.job
    try:
        with autocast(job.device, job.forward_precision):
            return compute_batch(features.cache, rows, features.real_inputs(rows, view), view)
    except StandInError as error:
        features.cache.give_up(str(error))
        return NotCachedError(str(error))
    except Exception as error:
        return error


def _stored(features: StageFeatures, everyone: list[Filled | Exception | None]) -> Exception | None:
    try:
        for filled in everyone:
            if isinstance(filled, Filled):
                store_batch(features.cache, filled)
    except OSError as error:
        return features.no_room(error)
    return None


def _finished(features: StageFeatures) -> Exception | None:
    try:
        features.cache.finish()
    except OSError as error:
        return features.no_room(error)
    return None


def _attach(features: StageFeatures) -> None:
    root, key = features.keeper.files()
    if not attach(features.cache, root, key):
        raise NotCachedError(f"a process does not see the files of the first one in {root}")
