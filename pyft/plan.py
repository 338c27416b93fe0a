"""What a run will cost, told before it begins: time and memory with and without kept features."""

from __future__ import annotations

import contextlib
import hashlib
import json
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyft.cached_features import FeatureKeeper, NotCachedError, StageFeatures, fill_order
from pyft.core.cache import cache_root
from pyft.core.files import write_json
from pyft.core.loader import load_core
from pyft.core.memory import free_memory
from pyft.errors import ConfigError
from pyft.freezing.no_trace import no_trace
from pyft.job import Job, autocast, inspect, to_device
from pyft.models.call import call_model
from pyft.run_dir import FREE_ARGUMENTS
from pyft.samples import Batch
from pyft.stage_rows import freeze_for
from pyft.training.loop import BatchSource
from pyft.training.optimizers import build_optimizer
from pyft.training.progress import SilentProgress, duration
from pyft.training.settings import stage_lr
from pyft.training.stages import Stage
from pyft.untouched import given_back_on_error

TIMED_BATCHES = 4
"""Batches of each sort that are timed, spread over an epoch: texts have many lengths."""


@dataclass
class StageCost:
    """What one stage will cost.

    Attributes:
        name, epochs: of the stage.
        num_trainable, num_total: elements of parameters.
        features: what will be kept, in words; or why nothing is.
        kept: whether features are kept.
        share: of the forward pass that is run once per sample, in [0, 1].
        nbytes: of the features.
        fill_seconds: to compute them.
        seconds, seconds_without: of the stage with the features, and with the whole model in every step.
        saved, saved_without: bytes kept for one backward pass, beside the parameters.
    """

    name: str
    epochs: int
    num_trainable: int
    num_total: int
    features: str
    kept: bool = False
    share: float = 0.0
    nbytes: int = 0
    fill_seconds: float = 0.0
    seconds: float = 0.0
    seconds_without: float = 0.0
    saved: int = 0
    saved_without: int = 0


@dataclass
class Cost:
    """What a run will cost. Printing it gives a short table.

    Attributes:
        stages: in order.
        seconds: of features, training and validation of all stages; loading and export are not counted.
    """

    stages: list[StageCost]

    @property
    def seconds(self) -> float:
        """Seconds of features, training and validation."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def seconds_without(self) -> float:
        """The same with cache_features=False."""
        return sum(stage.seconds_without for stage in self.stages)

    def __str__(self) -> str:
        lines = [f"{'stage':<14}{'epochs':>7}{'trains':>9}{'features':>11}{'time':>15}{'without':>15}"]
        for one in self.stages:
            trains, kept = f"{one.num_trainable / max(one.num_total, 1):.2%}", _size(one.nbytes) if one.kept else "-"
            times = f"{duration(one.seconds):>15}{duration(one.seconds_without):>15}"
            lines.append(f"{one.name[:13]:<14}{one.epochs:>7}{trains:>9}{kept:>11}{times}")
        for one in self.stages:
            lines += _wrapped(f"{one.name}: {one.features}")
            memory = f"{_size(one.saved)} kept for backward"
            if one.kept:
                memory += f", {_size(one.saved_without)} without features"
            lines += _wrapped(f"{one.name}: {memory}")
        total = f"in all {duration(self.seconds)}, without kept features {duration(self.seconds_without)}"
        return "\n".join([*lines, total])


def plan(model: nn.Module | str | Path, data: Any, **arguments: Any) -> Cost:
    """What `pyft.finetune` with the same arguments will cost, from a few timed batches. Nothing is trained or written.

    Loads the data and the model, tries every stage, and gives the model back as it came. A run with the same arguments
    on this machine then says how right it was.

    Args:
        model, data, **arguments: as `pyft.finetune` takes them.

    Raises:
        As `pyft.finetune`, before it trains.
    """
    from pyft.finetune import keyword_defaults, make_config

    defaults = keyword_defaults()
    unknown = next((name for name in arguments if name not in defaults), None)
    if unknown is not None:
        raise ConfigError(f"{unknown}: pyft.finetune has no such argument; it has {', '.join(defaults)}")
    job = inspect({**defaults, **arguments, "model": model, "data": data})
    with given_back_on_error(job.before):
        load_core()
        config = make_config(job)
        keeper = FeatureKeeper(job, None, SilentProgress())
        cost = Cost([_stage_cost(job, keeper, stage) for stage in job.stages])
    keeper.close()
    job.before.put_back()
    _remember(config, cost)
    return cost


def recalled(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `plan` has told for a run of this configuration on this machine, {"seconds", "stages": one dict of
    `StageCost` each}; None if it was not asked."""
    try:
        found = json.loads(_place(config).read_text(encoding="utf-8"))
        found["seconds"] = float(found["seconds"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None
    return found


def tell_prediction(config: Mapping[str, Any], seconds: dict[str, float]) -> str | None:
    """How right `plan` was, if it was asked about this run; what it said is added to the `seconds` of the run."""
    told = recalled(config)
    if told is None:
        return None
    predicted = told["seconds"]
    took = sum(seconds.get(part, 0.0) for part in ("features", "train", "validate"))
    seconds["predicted"] = predicted
    return f"pyft.plan said {predicted:.1f} s for features, training and validation; it took {took:.1f} s"


def _remember(config: Mapping[str, Any], cost: Cost) -> None:
    try:
        write_json(_place(config), {"seconds": cost.seconds, "stages": [asdict(stage) for stage in cost.stages]})
    except OSError:
        return


def _place(config: Mapping[str, Any]) -> Path:
    arguments = {k: v for k, v in config["arguments"].items() if k not in (*FREE_ARGUMENTS, "model", "data")}
    facts = [arguments, config["model"]["fingerprint"], config["data"]["fingerprint"], torch.get_num_threads()]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return cache_root() / "plans" / f"{digest}.json"


def _stage_cost(job: Job, keeper: FeatureKeeper, stage: Stage) -> StageCost:
    frozen = freeze_for(job, stage, None)
    try:
        cost = StageCost(stage.name, stage.epochs, frozen.num_trainable, frozen.num_total, "")
        features: StageFeatures | None = None
        try:
            features = keeper.open(frozen)
        except NotCachedError as reason:
            cost.features = f"every epoch runs the whole model, because {reason}"
        cost.seconds_without, cost.saved_without = _timed_stage(job, stage, call_model, job.batches, job.val_batches)
        if features is None:
            cost.seconds, cost.saved = cost.seconds_without, cost.saved_without
            return cost
        _describe_features(cost, features)
        cost.fill_seconds = _fill_seconds(features)
        train = features.batches("train", job.batches)
        val = None if job.val_batches is None else features.batches("val", job.val_batches)
        _fill_what_is_timed(features)
        cost.seconds, cost.saved = _timed_stage(job, stage, features.call, train, val)
        cost.seconds += cost.fill_seconds
        return cost
    finally:
        frozen.release(job.model)


def _describe_features(cost: StageCost, features: StageFeatures) -> None:
    numbering, cache = features.keeper.numbering, features.cache
    lengths = np.zeros(len(numbering)) if numbering.lengths is None else numbering.lengths
    cost.kept, cost.share = True, cache.share
    cost.nbytes = cache.bytes_for(lengths) * cache.augment_views
    room = features.job.arguments["cache_features"]
    where = "in files" if room == "disk" or (room == "auto" and cost.nbytes * 4 > free_memory()) else "in memory"
    cost.features = f"{cache.share:.0%} of the forward pass runs once per sample, {_size(cost.nbytes)} {where}"


def _spread(count: int) -> list[int]:
    """A few places, evenly over `count`: the middle of each part."""
    few = min(TIMED_BATCHES, count)
    return sorted({int((part + 0.5) * count / few) for part in range(few)})


def _fill_seconds(features: StageFeatures) -> float:
    order = fill_order(features.job, len(features.keeper.numbering))
    places = _spread(len(order))
    spent, samples = 0.0, 0
    for turn, place in enumerate([places[0], *places]):
        batches = list(features.batches_to_fill([order[place]], 0))
        begin = time.perf_counter()
        with autocast(features.job.device, features.job.forward_precision):
            for _, inputs in batches:
                features.cache.packed(inputs)
        if turn:  # the first one pays for what later ones find ready
            spent += time.perf_counter() - begin
            samples += len(order[place])
    return spent / samples * len(features.keeper.numbering) * features.cache.augment_views


def _fill_what_is_timed(features: StageFeatures) -> None:
    """Store the features of the samples whose batches are timed."""
    job = features.job
    rows = []
    for role, batches in (("train", job.batches), ("val", job.val_batches)):
        if batches is not None:
            index = batches.index(0, bucket=features.tail is None)
            rows += [features.keeper.numbering.rows[role][index[place]] for place in _spread(len(index))]
    wanted = np.unique(np.concatenate(rows))
    order = [wanted[start : start + 64] for start in range(0, len(wanted), 64)]
    with autocast(job.device, job.forward_precision):
        features.cache.fill(features.batches_to_fill(order, 0))


def _timed_stage(job: Job, stage: Stage, call: Callable[..., torch.Tensor], train: Any, val: Any) -> tuple[float, int]:
    """Seconds of a stage, and bytes kept for one backward pass."""
    named = [(name, value) for name, value in job.model.named_parameters() if value.requires_grad]
    before = [value.detach().clone() for _, value in named]
    optimizer = build_optimizer(named, job.settings, stage_lr(job.settings, stage)[0])
    precision = job.settings.precision if job.settings.precision != "auto" else job.forward_precision
    with no_trace(job.model):
        job.model.train()
        saved = 0

        def step(batch: Batch) -> None:
            nonlocal saved
            for _, value in named:
                value.grad = None
            with counted_bytes(job.model) as count, autocast(job.device, precision):
                logits = call(job.model, to_device(batch.inputs, job.device))
            saved = max(saved, count[0])
            assert batch.targets is not None
            job.objective(logits, batch.targets.to(job.device)).backward()
            optimizer.step()

        seconds = _seconds_per_epoch(train, step)
        job.model.eval()

        def score(batch: Batch) -> None:
            with torch.no_grad(), autocast(job.device, job.forward_precision):
                call(job.model, to_device(batch.inputs, job.device))

        if val is not None:
            seconds += _seconds_per_epoch(val, score)
    with torch.no_grad():
        for (_, value), old in zip(named, before, strict=True):
            value.copy_(old)
    return seconds * stage.epochs, saved


def _seconds_per_epoch(batches: BatchSource, run: Callable[[Batch], None]) -> float:
    """Seconds of all batches of an epoch, making them included, from a few."""
    places = _spread(batches.num_batches)
    spent: list[float] = []
    for turn, place in enumerate([places[0], *places]):
        iterator: Iterator[Batch] = batches.epoch(0, place)
        begin = time.perf_counter()
        run(next(iterator))
        if turn:  # the first one pays for what later ones find ready
            spent.append(time.perf_counter() - begin)
        if hasattr(iterator, "close"):
            iterator.close()
    return sum(spent) / len(spent) * batches.num_batches


@contextlib.contextmanager
def counted_bytes(model: nn.Module) -> Iterator[list[int]]:
    """Counts the bytes of what is kept for the backward pass inside, each memory once, without the parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    count = [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            count[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


def _size(nbytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} B"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 80, subsequent_indent="  ")
