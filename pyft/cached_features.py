"""A stage with a frozen part: what comes out of that part is computed once, and the rest trains on it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyft.core.cache import cache_root
from pyft.data.batches import Batches
from pyft.data.inputs import join_inputs
from pyft.errors import CheckpointError, ConfigError
from pyft.freezing.plan import FreezePlan
from pyft.freezing.prefix import cut_reason, head_inputs, head_tail
from pyft.freezing.prefix_cache import PrefixCache
from pyft.freezing.prefix_cache_batch import same_values
from pyft.freezing.prefix_cache_play import StandInError
from pyft.job import Job, autocast, to_device
from pyft.models.call import call_model
from pyft.samples import Batch, Samples
from pyft.shared_features import NotCachedError, agree_on_features, fill_together
from pyft.training.processes import ALONE, Processes
from pyft.training.progress import Progress, duration

FILL_BATCH = 64
"""Samples per batch where no gradient is kept: large enough to fill the matrix units, small enough for the cache."""
FILL_PICTURES = 8
"""The same for pictures, whose first layers give much: EfficientNet-Lite0 takes half the time per picture of 64."""
SECONDS_BETWEEN_LINES = 10.0
_ROWS, _VIEW, _PLAIN = "pyft_rows", "pyft_view", "pyft_inputs"


@dataclass
class Numbering:
    """All samples that are trained or validated on, each content once, in the order in which features are computed.

    The order is that of length and content: it is the same for every split of the same samples, so that files are
    found again by other runs, other folds and other trials.

    Attributes:
        rows: for "train" and "val" the number (N,) of each sample.
        order: (n,) which of the joined samples has the number 0, 1, ...
        lengths: (n,) tokens, or None.
        source: inputs of the joined samples.
        key: SHA-256 over all contents.
    """

    rows: dict[str, np.ndarray]
    order: np.ndarray
    lengths: np.ndarray | None
    source: Any
    key: str

    def __len__(self) -> int:
        return len(self.order)


def number_samples(job: Job) -> Numbering:
    """The numbers of all samples of a run."""
    source, train = job.batches.source, len(job.data.train)
    count = train
    if job.val_batches is not None and job.data.val is not None:
        source = join_inputs(source, job.val_batches.source, train)
        count += len(job.data.val)
    digests = source.digests()
    augment, views = job.arguments["augment"], job.arguments["augment_views"]
    if views is not None:
        # A changed copy is a function of the sample's place as well.
        own = json.dumps([str(augment), views, job.settings.seed])
        digests = [hashlib.sha256(f"{own} {place}".encode() + one).digest() for place, one in enumerate(digests)]
    lengths = source.lengths
    known: dict[bytes, int] = {}
    for place, digest in enumerate(digests):
        known.setdefault(digest, place)
    order = sorted(known, key=lambda digest: (0 if lengths is None else int(lengths[known[digest]]), digest))
    number = {digest: row for row, digest in enumerate(order)}
    rows = np.array([number[digest] for digest in digests], dtype=np.int64)
    places = np.array([known[digest] for digest in order], dtype=np.int64)
    return Numbering(
        rows={"train": rows[:train], "val": rows[train:count]},
        order=places,
        lengths=None if lengths is None else lengths[places],
        source=source,
        key=hashlib.sha256(b"".join(order)).hexdigest()[:32],
    )


class FeatureKeeper:
    """The features of a run, from stage to stage.

    Args:
        run_path: the folder of the run, which gets files where memory is short; None: nothing is kept on disk.
        processes: that keep features together.
    """

    def __init__(self, job: Job, run_path: Path | None, show: Progress, processes: Processes = ALONE) -> None:
        self.job, self.run_path, self.show, self.processes = job, run_path, show, processes
        self._numbering: Numbering | None = None
        self._last: PrefixCache | None = None

    @property
    def numbering(self) -> Numbering:
        """The numbers of the samples, found when first needed."""
        if self._numbering is None:
            self._numbering = number_samples(self.job)
        return self._numbering

    def prepare(self, plan: FreezePlan, stage: str, seconds: dict[str, float]) -> StageFeatures | None:
        """The features of a stage, computed; None where the whole model runs in every epoch. A note says which.

        Args:
            seconds: of the parts of the run; those of the features are added.

        Raises:
            CheckpointError: as `StageFeatures.fill`.
        """
        begin = time.perf_counter()
        try:
            features = self.processes.together(lambda: self.open(plan))
            if self.processes.several:
                agree_on_features(features, self.processes)
            features.fill()
        except NotCachedError as reason:
            if plan.frozen:
                self.show.note(f"stage '{stage}': every epoch runs the whole model, because {reason}")
            return None
        seconds["features"] = seconds.get("features", 0.0) + time.perf_counter() - begin
        for line in features.lines():
            self.show.note(f"stage '{stage}': {line}")
        return features

    def open(self, plan: FreezePlan) -> StageFeatures:
        """The features of a stage that is frozen now; nothing is computed yet.

        Raises:
            NotCachedError: every epoch must run the whole model.
        """
        job = self.job
        reason = no_features_reason(job, plan)
        if reason is not None:
            raise NotCachedError(reason)
        masked = isinstance(job.example.inputs, Mapping) and "attention_mask" in job.example.inputs
        if self.numbering.lengths is not None and not masked:
            raise NotCachedError("padded texts come without an attention_mask")
        storage, directory, key = self._place()
        try:
            with autocast(job.device, job.forward_precision):
                cache = PrefixCache(
                    job.model,
                    to_device(job.example.inputs, job.device),
                    plan=plan,
                    storage=storage,
                    directory=directory,
                    key=key,
                    dtype=features_dtype(job),
                    num_samples=len(self.numbering),
                    augment_views=job.arguments["augment_views"] or 1,
                    copies=self.processes.on_this_machine,
                    say=self.show.note,
                )
        except ConfigError as error:
            raise NotCachedError(str(error).rpartition("run once for all: ")[2]) from None
        except OSError as error:
            raise NotCachedError(f"the features cannot be stored: {error.strerror or error}") from None
        if self._last is not None:
            cache.take_over(self._last)
        self._last = cache
        return StageFeatures(job, self, cache, find_tail(job, plan, cache))

    def close(self) -> None:
        """Close files; those in the run folder are of no use to others."""
        if self._last is not None:
            self._last.close()
        if self.processes.first and self.run_path is not None and (self.run_path / "features").is_dir():
            shutil.rmtree(self.run_path / "features", ignore_errors=True)

    def _place(self) -> tuple[Any, Path | None, str | None]:
        wanted = self.job.arguments["cache_features"]
        # The others keep values in memory, or read the files of the first process.
        if wanted == "ram" or self.run_path is None or not self.processes.first:
            return "ram", None, None
        return "disk" if wanted == "disk" else "auto", *self.files()

    def files(self) -> tuple[Path, str]:
        """The folder of files, and the key of these samples in it."""
        wanted, path = self.job.arguments["cache_features"], self.run_path
        folder = cache_root() if wanted == "disk" or path is None else path
        return folder / "features", self.numbering.key


@dataclass
class StageFeatures:
    """The features of one stage.

    Attributes:
        cache: holds them.
        tail: what can be called with them alone, or None where the model's own code is run around the cache.
    """

    job: Job
    keeper: FeatureKeeper
    cache: PrefixCache
    tail: nn.Module | None

    def fill(self) -> None:
        """Compute what is not stored yet. Ctrl-C loses the batch in progress at most where they are on disk.

        Raises:
            NotCachedError: the model takes another way for some samples, or there is no room.
            CheckpointError: there is no room on disk, and cache_features="disk" asks for it.
        """
        total = len(self.keeper.numbering) * self.cache.augment_views
        tell = FillProgress(self.keeper.show, total, len(self.cache))
        try:
            if self.keeper.processes.several:
                fill_together(self, self.keeper.processes, tell)
                return
            for view in range(self.cache.augment_views):
                with autocast(self.job.device, self.job.forward_precision):
                    self.cache.fill(self.batches_to_fill(self.order(), view), tell, view)
            if self.cache.reason is not None:
                raise NotCachedError(self.cache.reason)
            self.cache.finish()
        except OSError as error:
            raise self.no_room(error) from None
        finally:
            for batches in (self.job.batches, self.job.val_batches):
                if batches is not None and hasattr(batches.source, "stop"):
                    batches.source.stop()

    def order(self) -> list[np.ndarray]:
        """The batches in which features are computed, by number."""
        return fill_order(self.job, len(self.keeper.numbering))

    def no_room(self, error: OSError) -> CheckpointError | NotCachedError:
        """Give up files that cannot be written; returns what is to be raised."""
        why = self.cache.reason or f"features cannot be written ({error.strerror or error})"
        self.cache.give_up(why, aloud=False)
        if self.job.arguments["cache_features"] == "disk":
            return CheckpointError(f"{why}: make room, or give cache_features=False")
        return NotCachedError(why)

    def batches_to_fill(self, order: list[np.ndarray], view: int) -> Iterator[tuple[np.ndarray, Any]]:
        """(rows (B,), inputs) of each batch of rows; the inputs are None where all is stored."""
        for rows in order:
            if self.cache.has(rows, view).all():
                yield rows, None
                continue
            yield rows, self.real_inputs(rows, view)

    def real_inputs(self, rows: np.ndarray, view: int) -> Any:
        """Inputs of samples by their numbers (B,), made anew, on the device of the run."""
        job, places = self.job, self.keeper.numbering.order[rows]
        if job.arguments["augment_views"] is None:
            inputs = self.keeper.numbering.source.fetch(places, 0)
        else:
            inputs = self._changed(places, len(job.data.train), view)
        return to_device(inputs, job.device)

    def _changed(self, places: np.ndarray, train: int, view: int) -> Any:
        """Training samples as they come out in an epoch, validation samples as they are."""
        job, late = self.job, places >= train
        parts: list[Any] = []
        for batches, numbers, epoch in ((job.batches, places[~late], view), (job.val_batches, places[late] - train, 0)):
            if len(numbers):
                parts.append(next(iter(batches.make([numbers], epoch))).inputs)  # type: ignore[union-attr]
        back = np.argsort(np.argsort(late, kind="stable"), kind="stable")
        return torch.cat(parts).index_select(0, torch.from_numpy(back))

    def batches(self, role: str, batches: Batches) -> CachedBatches:
        """What the stage trains ("train") or is validated ("val") on."""
        return CachedBatches(self, batches, self.keeper.numbering.rows[role], changing=role == "train")

    def call(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        """Logits of a batch of `batches`."""
        if self.tail is not None:
            return self.tail(inputs)
        rest = dict(inputs)
        rows, view = rest.pop(_ROWS), int(rest.pop(_VIEW)[0])
        if not rest:
            return self._call_without_inputs(model, rows, view)
        with self.cache.batch(rows, view):
            return call_model(model, rest.pop(_PLAIN) if _PLAIN in rest else rest)

    def _call_without_inputs(self, model: nn.Module, rows: torch.Tensor, view: int) -> torch.Tensor:
        given = self.cache.inputs_like(len(rows))
        if given is not None:
            # Where they are missed after all, the cache says so and the whole model runs.
            with contextlib.suppress(StandInError), self.cache.batch(rows, view):
                return call_model(model, given)
        with self.cache.batch(rows, view):
            return call_model(model, self.real_inputs(rows.cpu().numpy(), view))

    @property
    def reads_inputs(self) -> bool:
        """Whether the next batch must come with its inputs: the model may take nothing but what is stored."""
        return isinstance(self.job.example.inputs, Mapping) or self.cache.inputs_like(1) is None

    def lines(self) -> list[str]:
        """What is stored, for the user."""
        cache = self.cache
        return [f"features: {cache.share:.0%} of the forward pass runs once per sample, kept {cache.place}"]


class CachedBatches:
    """The batches of a stage, with the numbers under which the features of their samples are stored."""

    def __init__(self, features: StageFeatures, batches: Batches, rows: np.ndarray, changing: bool) -> None:
        self.features, self.inner, self.rows = features, batches, rows
        self.views = features.cache.augment_views if changing else 1

    @property
    def num_batches(self) -> int:
        """Batches per epoch."""
        return self.inner.num_batches

    @property
    def samples(self) -> Samples:
        """What the batches are of."""
        return self.inner.samples

    def index(self, epoch: int) -> list[np.ndarray]:
        """The sample numbers of each batch of an epoch: list of int64 (B,)."""
        # Without padding there is no reason to put samples of one length together.
        return self.inner.index(epoch, bucket=self.features.tail is None)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on."""
        return self.make(self.index(epoch)[start:], epoch)

    def make(self, batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        """Batches of these samples, list of int64 (B,), as they come out in an epoch."""
        view = epoch % self.views
        return self._of_inputs(batches, view) if self.features.tail is None else self._of_features(batches, view)

    def _of_features(self, batches: list[np.ndarray], view: int) -> Iterator[Batch]:
        targets = self.inner.samples.targets
        for index in batches:
            numbers = torch.from_numpy(np.ascontiguousarray(index))
            values = self.features.cache.values(self.rows[index], view)
            yield Batch(values, None if targets is None else targets.index_select(0, numbers), numbers)

    def _of_inputs(self, batches: list[np.ndarray], view: int) -> Iterator[Batch]:
        place = 0
        while place < len(batches):
            if not self.features.reads_inputs:
                index = torch.from_numpy(np.ascontiguousarray(batches[place]))
                targets = self.inner.samples.targets
                yield self._numbered(
                    Batch({}, None if targets is None else targets.index_select(0, index), index), view
                )
                place += 1
                continue
            with contextlib.closing(self.inner.make(batches[place:], view if self.views > 1 else 0)) as made:
                for batch in made:
                    yield self._numbered(batch, view)
                    place += 1
                    if not self.features.reads_inputs:
                        break

    def _numbered(self, batch: Batch, view: int) -> Batch:
        given: dict[str, Any] = dict(batch.inputs) if isinstance(batch.inputs, Mapping) else {_PLAIN: batch.inputs}
        given[_ROWS] = torch.from_numpy(self.rows[batch.index.numpy()])
        given[_VIEW] = torch.full_like(given[_ROWS], view)
        return Batch(given, batch.targets, batch.index)


class FillProgress:
    """Tells now and then how far the features are."""

    def __init__(self, show: Progress, total: int, known: int) -> None:
        self.show, self.total, self.done = show, total, 0
        self.known, self.began = known, time.perf_counter()
        self.next = self.began + SECONDS_BETWEEN_LINES

    def __call__(self, samples: int) -> None:
        """`samples` more are done."""
        self.done += samples
        now = time.perf_counter()
        if now < self.next or self.done >= self.total:
            return
        self.next = now + SECONDS_BETWEEN_LINES
        new = self.done - self.known
        left = f", {duration((now - self.began) / new * (self.total - self.done))} left" if new > 0 else ""
        self.show.note(f"features: {self.done:,} of {self.total:,} samples{left}")


def fill_order(job: Job, count: int) -> list[np.ndarray]:
    """The batches in which features are computed: the same for every run, so that they have the same bits."""
    inputs = job.example.inputs
    size = FILL_PICTURES if isinstance(inputs, torch.Tensor) and inputs.ndim >= 4 else FILL_BATCH
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


def features_dtype(job: Job) -> torch.dtype | None:
    """float32 where passes without gradient are in bf16 and the run is not; else as they are computed."""
    return torch.float32 if job.forward_precision == "bf16" and job.settings.precision != "bf16" else None


def no_features_reason(job: Job, plan: FreezePlan) -> str | None:
    """Why features must not be kept, found without a look into the model; None if they may be."""
    if job.arguments["cache_features"] is False:
        return "cache_features=False"
    if not plan.frozen:
        return "nothing is frozen"
    if len(job.example.index) < 2:
        return "there is one sample only"
    if job.arguments["augment_views"] is None:
        if job.arguments["augment"] != "none":
            what = job.arguments["augment"]
            return f"augment={what!r} changes the inputs in every epoch (augment_views=K keeps K copies)"
        if differs_by_epoch(job):
            return "preprocess, or the Dataset, draws at random (augment_views=K keeps K copies)"
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


def find_tail(job: Job, plan: FreezePlan, cache: PrefixCache) -> nn.Module | None:
    """The head, behind its dropout, where features are what it takes, so that nothing else need be called."""
    name = job.head.name
    if name is None or not cache.single or not all(one.startswith(f"{name}.") for one in plan.trainable):
        return None
    inputs = to_device(job.example.inputs, job.device)
    with autocast(job.device, job.forward_precision):
        if cut_reason(job.model, name, inputs) is not None:
            return None
        taken = head_inputs(job.model, name, inputs).to("cpu", cache.value_dtype)
        own = cache.compute(inputs)
    return head_tail(job.model, name, inputs) if same_values(taken, own) and taken.shape == own.shape else None


Call = Callable[[nn.Module, Any], torch.Tensor]
