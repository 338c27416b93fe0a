"""The frozen prefix of a model, run once per sample."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from pyft.core.cache import cache_root
from pyft.core.memory import free_device_memory, free_memory
from pyft.errors import ConfigError
from pyft.freezing.lean.core_calls import core_calls
from pyft.freezing.packed_products import packed_products
from pyft.freezing.parts import whole_names
from pyft.freezing.plan import FreezePlan, unwrap
from pyft.freezing.prefix_cache_batch import BatchFacts, batch_facts, same_values
from pyft.freezing.prefix_cache_disk import DiskWriter, open_finished
from pyft.freezing.prefix_cache_find import find_prefix, memory_store, set_modes
from pyft.freezing.prefix_cache_key import autocast_state, prefix_key
from pyft.freezing.prefix_cache_play import (
    Key,
    StandIn,
    StandInError,
    StopForwardError,
    run_model,
    run_uncompiled,
    without_values,
)
from pyft.freezing.prefix_cache_store import FeatureStore, MemoryArena
from pyft.freezing.prefix_cache_trace import tensors_in

Storage = Literal["auto", "ram", "disk"]
MEMORY_SHARE = 4
"""Values stay in memory while they take at most one part in this many of what is free."""
TOKENS_GUESSED = 64


class PrefixCache:
    """Runs the frozen part of a model once per sample, in anybody's training loop; later its results are played back.

    The model's own code runs at every step, whatever it is, but calls of modules that always give the same for a
    sample are not made again: they return what was stored, or a stand-in without values where only other such calls
    use it. What is stored is what the trainable part takes. Make the cache after freezing, with the model in the modes
    in which it trains; call the model once per `batch`.

    Args:
        model: in place; nothing of it is changed. Modules are replayed as they are now: make a new cache when weights,
            buffers, or what is frozen, change. What torch.compile made of it, or of parts, runs uncompiled in `batch`.
        example_inputs: a batch of at least two samples: a Tensor, a tuple of positional or a dict of keyword
            arguments. First dimension B. Padded sequences need "attention_mask" (B, T), 1 for what is real.
        plan: what trains, as `pyft.freeze` gave it; None: the parameters that require a gradient.
        storage: "ram", "disk", or "auto": memory while it takes a quarter of what is free at most, else disk. "auto"
            takes that of the GPU first, where the model is on one and `num_samples` is given.
        directory: for files; default: `features` in `PYFT_CACHE_DIR`.
        key: names the samples and their preprocessing by content, so that files can be found again by later
            processes. None: files are private to this object.
        dtype: in which floating point values are stored; None: as they are computed. They are given back in the
            wider of both.
        num_samples: that will come; helps "auto" and saves copies.
        augment_views: K randomly changed copies of each sample that are stored; see `batch`.
        checks: that many played batches are compared with the real thing first.
        copies: processes of this machine that keep the same; "auto" leaves room for all.
        say: gets lines for the user; default: standard error.

    Attributes:
        share: of the work of a forward pass (matrix products and convolutions) that is saved, in [0, 1].
        reason: why it is given up and the whole model runs; None while all is well.

    Raises:
        ConfigError: nothing can be replayed; the reason is named (dropout that is on, a norm in training mode, random
            draws, a batch on which samples depend, ...).

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> _ = model[0].requires_grad_(False)
    >>> x = torch.randn(6, 4)
    >>> cache = PrefixCache(model, x[:4])
    >>> for epoch in range(2):
    ...     for index in (torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])):
    ...         with cache.batch(index):
    ...             loss = model(x[index]).square().mean()
    ...         loss.backward()
    >>> len(cache), cache.played
    (6, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        plan: FreezePlan | None = None,
        storage: Storage = "auto",
        directory: str | os.PathLike[str] | None = None,
        key: str | None = None,
        dtype: torch.dtype | None = None,
        num_samples: int | None = None,
        augment_views: int = 1,
        checks: int = 2,
        copies: int = 1,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if storage not in ("auto", "ram", "disk"):
            raise ConfigError(f"storage={storage!r}: expected 'auto', 'ram' or 'disk'")
        if not isinstance(augment_views, int) or isinstance(augment_views, bool) or augment_views < 1:
            raise ConfigError(f"augment_views={augment_views!r}: expected a whole number of 1 or more")
        self.model, self.dtype, self.augment_views = unwrap(model), dtype, augment_views
        self.checks, self.copies, self.say = checks, copies, say or _say
        self.reason: str | None = None
        self.played = self.filled = 0
        named = dict(self.model.named_parameters(remove_duplicate=False))
        trainable = {n for n, p in named.items() if p.requires_grad} if plan is None else set(plan.trainable)
        # A weight that trains in part changes as a whole.
        trainable |= {whole for part, whole in whole_names(self.model).items() if part in trainable}
        if not trainable:
            raise ConfigError("model: no parameter trains, so there is nothing to train on stored values")
        self._numbers: np.ndarray | None = None
        device = next(iter(named.values())).device
        self._autocast = autocast_state(device)
        with run_uncompiled():
            self.prefix = find_prefix(self.model, trainable, example_inputs, dtype)
        self._columns = self.prefix.columns
        self.share = self.prefix.cut.share
        self.key = prefix_key(self.model, self.prefix.cut, dtype, self._autocast)
        modules = [module for name in self.prefix.names for module in self.model.get_submodule(name).modules()]
        self._still = [module for module in modules if not module.training]
        self._example = batch_facts(example_inputs)
        self._blank = None if self.prefix.reads_inputs else without_values(example_inputs, self._example.batch)
        self._writer: DiskWriter | None = None
        self._store = self._open(storage, None if directory is None else Path(directory), key, num_samples)

    # Use

    @contextlib.contextmanager
    def batch(self, indices: Sequence[int] | np.ndarray | torch.Tensor, view: int = 0) -> Iterator[None]:
        """Inside, one call of the model takes the frozen part of these samples from the store, or fills it.

        Args:
            indices: (B,) number of each sample, 0 or more: the same number means the same input.
            view: which of the `augment_views` changed copies it is, modulo their number: give the epoch, and make the
                copy by the seed and `view % augment_views`.

        Raises:
            ConfigError: another number of samples than the model is called with, or a negative one.
        """
        numbers = np.asarray(indices.cpu() if isinstance(indices, torch.Tensor) else indices, dtype=np.int64)
        if numbers.ndim != 1 or (numbers < 0).any():
            raise ConfigError(f"indices: expected (B,) whole numbers of 0 or more, got shape {numbers.shape}")
        self._numbers = self._view_numbers(numbers, view)
        try:
            with run_uncompiled(), self.prefix.attached(lambda forward: _Root(self, forward)):
                yield
        finally:
            self._numbers = None

    def inputs_like(self, count: int) -> Any:
        """What to call the model with, inside of `batch`, for `count` stored samples: inputs without values.

        So that pictures which only the stored part takes need not be read again. An operation that wants their values
        raises `StandInError`.

        Returns:
            Inputs of the form of the example; None while real ones are needed: where plain code, or a part that
            trains, takes them, for the first `checks` batches, for padded ones, and when the whole model runs.
        """
        return None if self._blank is None or self.checks > 0 or self.reason else without_values(self._blank, count)

    def fill(
        self,
        batches: Iterable[tuple[Any, Any]],
        progress: Callable[[int], None] | None = None,
        view: int = 0,
    ) -> None:
        """Compute what is not stored yet, in inference mode; the pass ends where the prefix ends.

        Args:
            batches: of (indices (B,), inputs); those with all samples stored are passed over. Long batches of samples
                of similar length are the fastest.
            progress: told the number of samples of each batch that is done.

        Raises:
            OSError: the disk is full. From then on the whole model runs.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            set_modes(modes, False)
            with packed_products(self.model, self.prefix.names), core_calls():
                for indices, inputs in batches:
                    numbers = self._view_numbers(indices, view)
                    if self.reason is None and not self._store.has(numbers).all():
                        with run_uncompiled():
                            self._fill_one(numbers, inputs)
                    if progress is not None:
                        progress(len(numbers))
        finally:
            set_modes(modes, True)
            with self._writing() as writer:
                if writer is not None:
                    writer.note_progress(always=True)

    def _fill_one(self, numbers: np.ndarray, inputs: Any) -> None:
        facts = batch_facts(inputs)
        rows = self._new_rows(numbers, facts)
        try:
            if facts.form != self._example.form:
                raise StandInError("its inputs have other sizes than those of the example")
            with torch.inference_mode():
                packed = self.prefix.capture(facts, rows, lambda: run_model(self.model, inputs))
        except StandInError as error:
            self.give_up(str(error))
            return
        self._commit(numbers[rows], facts.lengths[rows], packed)

    def finish(self) -> None:
        """All samples are stored: files get their final name, for later processes to find.

        Raises:
            OSError: the disk is full. From then on the whole model runs.
        """
        with self._writing() as writer:
            if writer is not None:
                writer.finish()
                self._writer = None

    def close(self) -> None:
        """Let the memory go, and close the files. What was begun on disk under a `key` is taken up by the next one."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.note_progress(always=True)
            self._writer.release()
            self._writer = None
        self.give_up("the cache is closed", aloud=False)

    def give_up(self, reason: str, *, aloud: bool = True) -> None:
        """From now on the whole model runs."""
        if self.reason is None:
            self.reason = reason
            if aloud:
                self.say(f"stored features are not used any more, the whole model runs: {reason}")
            self._store = memory_store(self._columns)

    def values(self, indices: np.ndarray, view: int = 0) -> torch.Tensor:
        """(B, ...) the stored value of samples, where the cache is `single`: a new tensor, where it is stored.

        Raises:
            ConfigError: there are several values, or padded ones, or a sample is not stored.
        """
        numbers = self._view_numbers(indices, view)
        if not self.single:
            raise ConfigError("values: the prefix has several values, or padded ones")
        if not self._store.has(numbers).all():
            raise ConfigError("indices: a sample is not stored")
        return self._store.get(next(iter(self._columns)), numbers, 0)

    def packed(self, inputs: Any) -> dict[Key, torch.Tensor]:
        """What `fill` would store for a batch, without padding; nothing is stored."""
        facts = batch_facts(inputs)
        modes = [(module, module.training) for module in self.model.modules()]
        set_modes(modes, False)
        try:
            with torch.inference_mode():
                return self.prefix.capture(facts, np.arange(facts.batch), lambda: run_model(self.model, inputs))
        finally:
            set_modes(modes, True)

    def compute(self, inputs: Any) -> torch.Tensor:
        """(B, ...) the value of a batch, where the cache is `single`; nothing is stored."""
        facts, store = batch_facts(inputs), memory_store(self._columns)
        packed = self.packed(inputs)
        with torch.no_grad():
            store.add(np.arange(facts.batch), facts.lengths, packed)
        return store.get(next(iter(self._columns)), np.arange(facts.batch), 0)

    def has(self, indices: np.ndarray, view: int = 0) -> np.ndarray:
        """(B,) bool: which samples are stored."""
        return self._store.has(self._view_numbers(indices, view))

    def take_over(self, other: PrefixCache) -> bool:
        """Use what another cache has stored, where it is of the same prefix; returns whether it is. Closes `other`."""
        same = self.key == other.key and other.reason is None and self._writer is None and other._writer is None
        if same and len(self) < len(other):
            self._store = other._store
        other.close()
        return same

    def _view_numbers(self, indices: np.ndarray, view: int) -> np.ndarray:
        return np.asarray(indices, dtype=np.int64) * self.augment_views + view % self.augment_views

    def __len__(self) -> int:
        return self._store.count

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return self._store.nbytes

    @property
    def on_disk(self) -> bool:
        """Whether values are in files."""
        return not all(isinstance(arena, MemoryArena) for arena in self._store.arenas.values())

    @property
    def place(self) -> str:
        """Where values are: "on disk", "in memory", or "in memory of" a device; of both where that had no more."""
        if self.on_disk:
            return "on disk"
        devices = {str(arena.device) for arena in self._store.arenas.values() if isinstance(arena, MemoryArena)}
        others = sorted(devices - {"cpu"})
        host = " and of the host, as it had no more" if others and "cpu" in devices else ""
        return f"in memory of {', '.join(others)}{host}" if others else "in memory"

    @property
    def single(self) -> bool:
        """Whether there is one value per sample, of one shape."""
        return len(self._columns) == 1 and not any(column.ragged for column in self._columns.values())

    @property
    def value_dtype(self) -> torch.dtype:
        """In which the first value is stored."""
        return next(iter(self._columns.values())).dtype

    def bytes_for(self, lengths: np.ndarray) -> int:
        """Bytes that samples of these padded lengths (n,) will take."""
        return sum(int(c.elements(lengths).sum()) * c.dtype.itemsize for c in self._columns.values())

    def __str__(self) -> str:
        lines = [f"{self.share:.0%} of the forward pass is run once per sample; stored for each:"]
        for key, column in self._columns.items():
            where = key[1] if key[0] == "op" else str(key[1]).rpartition("#")[0]
            what = f"result {where} of the code between modules" if key[0] == "op" else f"'{where}'"
            shape = ", ".join("tokens" if dim == "T" else str(dim) for dim in column.sample)
            lines.append(f"  {what} ({shape}) {str(column.dtype).removeprefix('torch.')}")
        return "\n".join(lines)

    # One pass

    def _root_call(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        numbers = self._numbers
        if numbers is None or self.reason is not None or self.prefix.stage.player is not None:
            return forward(*args, **kwargs)
        facts = batch_facts(kwargs if not args else (*args, *kwargs.values()))
        blank = any(isinstance(tensor, StandIn) for tensor in tensors_in((args, kwargs)))
        if facts.batch != len(numbers):
            raise ConfigError(f"indices: {len(numbers)} for a batch of {facts.batch} samples")
        moved = next((module for module in self._still if module.training), None)
        if moved is not None:
            raise ConfigError(
                f"a {type(moved).__name__} of the frozen part was in eval mode when the cache was made and is in train "
                "mode now: freeze with pyft.freeze, which keeps it in eval, or make the cache in train mode"
            )
        if facts.form != self._example.form:
            return forward(*args, **kwargs)
        random_state = torch.get_rng_state()
        try:
            if self._store.has(numbers, facts.lengths).all():
                self._check_first(forward, args, kwargs, facts, numbers)
                with self.prefix.playing(self.prefix.player(facts, self._store, numbers)):
                    out = forward(*args, **kwargs)
                self.played += 1
                return out
            if blank:
                raise ConfigError("inputs without values: not all samples of this batch are stored")
            return self._fill_live(forward, args, kwargs, facts, numbers)
        except StandInError as error:
            self.give_up(str(error))
            torch.set_rng_state(random_state)
            if blank:
                raise
            return forward(*args, **kwargs)

    def _fill_live(self, forward: Any, args: Any, kwargs: Any, facts: BatchFacts, numbers: np.ndarray) -> Any:
        device = next(self.model.parameters()).device
        if autocast_state(device) != self._autocast:
            return forward(*args, **kwargs)
        rows = self._new_rows(numbers, facts)
        packed: dict[Key, torch.Tensor] = {}
        with self.prefix.playing(self.prefix.recorder(packed, facts, rows)):
            out = forward(*args, **kwargs)
        self.filled += 1
        try:
            self._commit(numbers[rows], facts.lengths[rows], packed)
        except OSError as error:
            self.say(f"{error.strerror}; the whole model runs from now on")
        return out

    def _new_rows(self, numbers: np.ndarray, facts: BatchFacts) -> np.ndarray:
        """Places in the batch of samples that are not stored, each once."""
        missing = np.flatnonzero(~self._store.has(numbers, facts.lengths))
        _, first = np.unique(numbers[missing], return_index=True)
        return missing[np.sort(first)]

    def _commit(self, numbers: np.ndarray, lengths: np.ndarray, packed: Mapping[Key, torch.Tensor]) -> None:
        with torch.no_grad(), self._writing() as writer:
            self._store.add(numbers, lengths, packed)
            if writer is not None:
                writer.note_progress()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[DiskWriter | None]:
        """A write that fails ends the cache: its files may hold parts of a batch."""
        writer = self._writer
        try:
            yield writer
        except OSError as error:
            if writer is None:
                raise
            self._writer = None
            writer.abandon()
            why = f"features cannot be written to {writer.root} ({error.strerror or error})"
            self.give_up(why, aloud=False)
            raise OSError(error.errno, f"{why}: make room, or keep them in memory") from None

    def _check_first(self, forward: Any, args: Any, kwargs: Any, facts: BatchFacts, numbers: np.ndarray) -> None:
        """Compare what is stored with what the model gives now, for the first batches that are played."""
        if self.checks <= 0:
            return
        self.checks -= 1
        packed: dict[Key, torch.Tensor] = {}
        rows = np.arange(facts.batch)
        player = self.prefix.recorder(packed, facts, rows, stop=True)
        devices = sorted({parameter.device.index or 0 for parameter in self.model.parameters() if parameter.is_cuda})
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
            contextlib.suppress(StopForwardError),
            self.prefix.playing(player),
        ):
            forward(*args, **kwargs)
        for key, now in packed.items():
            column = self._columns[key]
            stored = column.pack(self._store.get(key, numbers, facts.length), torch.from_numpy(rows), facts.lengths)
            if not same_values(stored, now, loose=self._autocast != "off" or column.dtype.itemsize < 4):
                raise StandInError("what is stored for a batch is not what the model gives for it now")

    # Where it is

    def _open(self, storage: Storage, root: Path | None, key: str | None, num_samples: int | None) -> FeatureStore:
        count = (num_samples or 0) * self.augment_views
        if storage == "auto":
            guess = self.bytes_for(np.full(count, self._guessed_length()))
            device = next(self.model.parameters()).device
            if 0 < guess * MEMORY_SHARE <= free_device_memory(device):
                return memory_store(self._columns, count, device)
            storage = "ram" if guess * MEMORY_SHARE * self.copies <= free_memory() else "disk"
        if storage == "ram":
            return memory_store(self._columns, count)
        root = root or cache_root() / "features"
        full = f"{self.key}-{key}" if key is not None else f"{self.key}-private{os.getpid()}-{id(self)}"
        found = open_finished(root, full, self._columns, self.say) if key is not None else None
        if found is not None:
            return found
        self._writer = DiskWriter(root, full, self._columns, self.say)
        return self._writer.store

    def _guessed_length(self) -> int:
        return int(self._example.lengths.mean()) if self._example.length else TOKENS_GUESSED


class _Root:
    """Takes the place of the model's forward inside of `PrefixCache.batch`."""

    def __init__(self, cache: PrefixCache, forward: Callable[..., Any]) -> None:
        self.cache, self.forward = cache, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, with the prefix played back or filled."""
        return self.cache._root_call(self.forward, args, kwargs)


def _say(text: str) -> None:
    print(f"pyft: {text}", file=sys.stderr, flush=True)
