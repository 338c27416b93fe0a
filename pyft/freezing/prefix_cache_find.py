"""Finding the frozen prefix of a model, running it, and proving that playing it back is the model."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from pyft.core.transfer import to_device
from pyft.errors import ConfigError
from pyft.freezing.no_trace import no_trace
from pyft.freezing.prefix_cache_batch import BatchFacts, agree, batch_facts, compositions, make_variants
from pyft.freezing.prefix_cache_cut import CannotCutError, Cut, find_cut
from pyft.freezing.prefix_cache_play import (
    Key,
    Player,
    Replayed,
    Stage,
    StandIn,
    StandInError,
    StopForwardError,
    run_model,
    without_values,
)
from pyft.freezing.prefix_cache_store import CPU, Column, FeatureStore, MemoryArena
from pyft.freezing.prefix_cache_trace import in_place_of_forward, tensors_in

LEAST_SHARE = 0.02
"""A prefix with less of the work than this is not worth its memory."""


@dataclass
class Prefix:
    """The frozen prefix of a model, found and proven.

    Attributes:
        columns: what is stored, by key.
        names: of the modules with replayed calls.
        reads_inputs: whether something else than replayed calls takes values of the inputs.
        stage: where these modules find the player of the pass in progress.
    """

    model: nn.Module
    cut: Cut
    columns: dict[Key, Column]
    names: set[str]
    reads_inputs: bool = True
    stage: Stage = field(default_factory=Stage)

    def player(self, facts: BatchFacts, store: FeatureStore, numbers: np.ndarray) -> Player:
        """Plays the samples with these numbers (B,) from the store."""

        def stored(key: Key) -> torch.Tensor:
            leaf = self.cut.script.leaf(key)
            found = store.get(key, numbers, facts.length)
            return to_device(found, leaf.device, torch.promote_types(found.dtype, leaf.dtype))

        return Player(self.cut.script, facts.batch, facts.length, stored=stored)

    def recorder(
        self, packed: dict[Key, torch.Tensor], facts: BatchFacts, rows: np.ndarray, *, stop: bool = False
    ) -> Player:
        """Runs everything, and packs the values of the given rows of the batch."""
        places, lengths = torch.from_numpy(rows), facts.lengths[rows]

        def keep(key: Key, value: torch.Tensor) -> None:
            packed[key] = self.columns[key].pack(value, places, lengths)

        return Player(self.cut.script, facts.batch, facts.length, captured=keep, stop=stop)

    def capture(self, facts: BatchFacts, rows: np.ndarray, run: Callable[[], object]) -> dict[Key, torch.Tensor]:
        """The packed values of rows of the batch on which `run` runs the model; the pass ends with the last of them.

        Raises:
            StandInError: the pass takes another way.
        """
        packed: dict[Key, torch.Tensor] = {}
        player = self.recorder(packed, facts, rows, stop=True)
        with contextlib.suppress(StopForwardError), self.attached(), self.playing(player):
            run()
        return packed

    @contextlib.contextmanager
    def playing(self, player: Player) -> Iterator[None]:
        """One pass with a player.

        Raises:
            StandInError: at the end, when a needed value has not come.
        """
        self.stage.player = player
        try:
            yield
        finally:
            self.stage.player = None
        if player.left:
            raise StandInError("some modules were not called this time: its forward pass depends on the data")

    @contextlib.contextmanager
    def attached(self, root: Callable[[Callable[..., Any]], Any] | None = None) -> Iterator[None]:
        """Inside, replayed modules ask the stage. `root` makes what takes the place of the model's own forward."""

        def make(name: str, module: nn.Module, forward: Callable[..., Any]) -> Any:
            return root(forward) if root is not None and name == "" else Replayed(self.stage, name, forward)

        with in_place_of_forward(self.model, make, self.names if root is None else {*self.names, ""}):
            yield


def find_prefix(model: nn.Module, trainable: Collection[str], inputs: Any, dtype: torch.dtype | None) -> Prefix:
    """The prefix of a model, its own modes, buffers and random state kept.

    Args:
        trainable: names of the parameters that train.
        inputs: a batch of at least two samples.
        dtype: in which floating point values are stored; None: as they are computed.

    Raises:
        ConfigError: nothing can be replayed; with the reason.
    """
    variants = make_variants(inputs)
    # A cast weight that autocast kept would come from nowhere.
    with no_trace(model), _host_random_state_kept(), _autocast_keeps_nothing():
        try:
            if not model.training:
                model.train()
            cut = find_cut(model, trainable, variants)
            if cut.total_flops and cut.share < LEAST_SHARE:
                raise CannotCutError(_small(cut))
            columns = _make_columns(cut, dtype)
            prefix = Prefix(model, cut, columns, {name for name, _ in cut.script.sites})
            prefix.reads_inputs = _verify(prefix, inputs)
        except (CannotCutError, StandInError) as error:
            raise ConfigError(f"the frozen part of the model cannot be run once for all: {error}") from None
    return prefix


def _make_columns(cut: Cut, dtype: torch.dtype | None) -> dict[Key, Column]:
    columns = {}
    for key in cut.script.needed:
        leaf = cut.script.leaf(key)
        columns[key] = Column(leaf, dtype if dtype is not None and leaf.dtype.is_floating_point else leaf.dtype)
    return columns


def _verify(prefix: Prefix, inputs: Any) -> bool:
    """Play the samples of the example in other batches, and compare with the model itself.

    Returns:
        Whether the values of the inputs are read on playback.
    """
    store = memory_store(prefix.columns)
    facts = batch_facts(inputs)
    modes = [(module, module.training) for module in prefix.model.modules()]
    set_modes(modes, False)
    rows = np.arange(facts.batch)
    with torch.inference_mode():
        packed = prefix.capture(facts, rows, lambda: run_model(prefix.model, inputs))
    with torch.no_grad():
        store.add(rows, facts.lengths, packed)
    others = list(compositions(inputs))
    for training in (False, True):
        set_modes(modes, training)
        with torch.set_grad_enabled(training):
            # All of them first: a module that keeps what it gave last must not keep the right thing by chance.
            expected = [_seeded(prefix.model, other) for _, other in others]
            found = []
            for numbers, other in others:
                with prefix.attached(), prefix.playing(prefix.player(batch_facts(other), store, numbers)):
                    found.append(_seeded(prefix.model, other))
        for one, right in zip(found, expected, strict=True):
            if not agree(one, right, loose=any(column.dtype.itemsize < 4 for column in prefix.columns.values())):
                raise CannotCutError(
                    "what it gives for a sample depends on the other samples of its batch, on its padding, or on "
                    "something that the forward pass keeps"
                )
    return facts.length > 0 or not _plays_without_inputs(prefix, modes, others, store)


def _plays_without_inputs(
    prefix: Prefix, modes: list[tuple[nn.Module, bool]], batches: list[tuple[np.ndarray, Any]], store: FeatureStore
) -> bool:
    """Whether playback gives the same with inputs that have no values."""
    for training in (False, True):
        set_modes(modes, training)
        for numbers, inputs in batches:
            facts = batch_facts(inputs)
            with torch.set_grad_enabled(training), prefix.attached():
                with prefix.playing(prefix.player(facts, store, numbers)):
                    right = _seeded(prefix.model, inputs)
                try:
                    with prefix.playing(prefix.player(facts, store, numbers)):
                        found = _seeded(prefix.model, without_values(inputs, facts.batch))
                except Exception:  # foreign code may do anything with what has no values; then it gets real ones
                    return False
            if any(isinstance(leaf, StandIn) for leaf in tensors_in(found)) or not agree(found, right):
                return False
    return True


def memory_store(columns: dict[Key, Column], count: int = 0, device: torch.device = CPU) -> FeatureStore:
    """An empty store in the memory of a device, with room for `count` samples where their size is known."""
    for column in columns.values():
        column.device = device
    sizes = {
        key: 0 if column.ragged else count * int(column.elements(np.zeros(1))[0]) for key, column in columns.items()
    }
    arenas = {key: MemoryArena(column.dtype, sizes[key], device) for key, column in columns.items()}
    return FeatureStore(columns, arenas)


def set_modes(modes: list[tuple[nn.Module, bool]], back: bool) -> None:
    """Modules into the given modes, or all into eval mode."""
    for module, mode in modes:
        module.training = mode and back


def _seeded(model: nn.Module, inputs: Any) -> Any:
    torch.manual_seed(0)
    return run_model(model, inputs)


def _small(cut: Cut) -> str:
    why = f", because {cut.blocked[0]}" if cut.blocked else ""
    return f"only {cut.share:.1%} of the forward pass is always the same{why}"


@contextlib.contextmanager
def _host_random_state_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _autocast_keeps_nothing() -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
