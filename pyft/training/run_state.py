"""Where a run stands, and how it is written down and taken up again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyft.errors import CheckpointError, ConfigError
from pyft.freezing.parts import bring_up_to_date, whole_names
from pyft.training.checkpoint import (
    load_checkpoint,
    put_weights,
    read_weights,
    save_checkpoint,
    save_weights,
    take_weights,
)
from pyft.training.history import History, write_metrics
from pyft.training.processes import ALONE, Processes
from pyft.training.settings import Settings, describe, higher_is_better
from pyft.training.stages import Stage

_KEPT_OF_HISTORY = ("rows", "best_epoch", "best_value", "stages", "notes")


@dataclass
class Position:
    """Where a run stands, in plain numbers.

    Attributes:
        stage: number of the stage in progress, from 0; the number of stages when the run is over.
        stage_epoch: epochs finished in the stage.
        epoch: epochs finished in the run; the number given to `batches.epoch`.
        batch: batches done in the epoch in progress.
        step: optimizer steps done in the run.
        loss_sum, weight_sum: over the epoch in progress; their ratio is the mean loss.
        stage_best: best metric of the stage, for `patience`.
        bad_epochs: epochs since then.
        seconds: spent in the epoch in progress.
        lr: learning rate of the last step.
    """

    stage: int = 0
    stage_epoch: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    stage_best: float | None = None
    bad_epochs: int = 0
    seconds: float = 0.0
    lr: float = 0.0


@dataclass
class Run:
    """A run in progress: the model, its position and history, and the files it keeps in `directory`.

    Of several processes the first alone reads and writes files.
    """

    model: nn.Module
    stages: Sequence[Stage]
    settings: Settings
    directory: Path
    position: Position = field(default_factory=Position)
    trained: dict[str, None] = field(default_factory=dict)
    pending: dict[str, Any] | None = None
    stage_identity: dict[str, Any] = field(default_factory=dict)
    clock: float = field(default_factory=time.perf_counter)
    processes: Processes = ALONE

    def __post_init__(self) -> None:
        metric = self.settings.metric
        self.history = History(
            metric, higher_is_better(metric), self.directory / "last.pt", self.directory / "best.safetensors"
        )

    @property
    def stage(self) -> Stage:
        """The stage in progress."""
        return self.stages[self.position.stage]

    def where(self) -> str:
        """The stage, epoch and step in progress, in words; all counted from 1."""
        at = self.position
        return f"stage '{self.stage.name}', epoch {at.epoch + 1}, step {at.step + 1}"

    def add_seconds(self) -> float:
        """Count the time since the last call to the epoch in progress; returns it."""
        now = time.perf_counter()
        spent, self.clock = now - self.clock, now
        self.position.seconds += spent
        return spent

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        identity = describe(self.settings)
        for number, stage in enumerate(self.stages):
            for name in ("name", "epochs", "lr_scale", "kind"):
                identity[f"stage {number + 1} {name}"] = getattr(stage, name)
        return identity

    def save(self, optimizer: dict[str, Any] | None, schedule: dict[str, Any] | None) -> None:
        """Write last.pt. Without an optimizer the run stands at the border of a stage.

        Raises:
            CheckpointError: it cannot be written; the last good one is untouched.
        """
        if not self.processes.first:
            return
        history = {name: getattr(self.history, name) for name in _KEPT_OF_HISTORY}
        save_checkpoint(
            self.history.last_path,
            {
                "identity": self.identity(),
                "position": asdict(self.position),
                "stage_identity": self.stage_identity,
                "history": history,
                "weights": self._weights(),
                "optimizer": optimizer,
                "schedule": schedule,
                "torch": str(torch.__version__),
                "threads": torch.get_num_threads(),
                "processes": self.processes.count,
            },
        )

    def restore(self, path: Path) -> None:
        """Take up a run from its last.pt, into a model with the weights that it had when the run began.

        Raises:
            CheckpointError: missing, damaged, or of another model.
            ConfigError: settings or stages differ.
        """
        content = self.processes.on_first(lambda: load_checkpoint(path))
        _compare(content["identity"], self.identity(), path)
        best = content["history"]["best_epoch"] is not None
        if best and not self.processes.of_first(self.history.best_path.is_file()):
            raise CheckpointError(f"{self.history.best_path} is missing: the run cannot go on without its best weights")
        put_weights(self.model, content["weights"], str(path))
        self.position = Position(**content["position"])
        for name in _KEPT_OF_HISTORY:
            setattr(self.history, name, content["history"][name])
        self.history.resumed_from_step = self.position.step
        self.trained = dict.fromkeys(content["weights"])
        if content["optimizer"] is not None:
            self.pending = content
        for what, then, now in (
            ("torch", content["torch"], str(torch.__version__)),
            ("threads", content["threads"], torch.get_num_threads()),
            ("processes", content.get("processes", 1), self.processes.count),
        ):
            if then != now:
                self.history.notes.append(f"resumed with {what} {now}, begun with {then}: the last bits may differ")

    def _weights(self) -> dict[str, Tensor]:
        bring_up_to_date(self.model)
        places: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        places.update(self.model.named_buffers(remove_duplicate=False))
        return take_weights((name, places[name]) for name in self.trained if name in places)

    def add_trained(self, names: Iterable[str]) -> None:
        """Name what the stage that begins will change; the best weights so far are completed by what it starts from."""
        # Of a weight that trains in part the whole is written: the next stage may train other rows, or all.
        whole = whole_names(self.model)
        self.trained.update(dict.fromkeys(whole.get(name, name) for name in names))
        if self.history.best_epoch is None or not self.processes.first:
            return
        best = read_weights(self.history.best_path)
        missing = {name: tensor for name, tensor in self._weights().items() if name not in best}
        if missing:
            save_weights(self.history.best_path, {**best, **missing})

    def save_best(self) -> None:
        """Write all that was trained so far to best.safetensors."""
        if not self.processes.first:
            return
        save_weights(self.history.best_path, self._weights())

    def write_metrics(self) -> None:
        """Write metrics.csv from the history."""
        if not self.processes.first:
            return
        write_metrics(self.directory / "metrics.csv", self.history.rows)

    def finish(self) -> History:
        """Put the best weights into the model; where nothing was evaluated, the last ones are the best."""
        path = self.history.best_path
        if self.history.best_epoch is None:
            self.save_best()
        if self.history.best_epoch is not None or self.processes.several:
            put_weights(self.model, self.processes.on_first(lambda: read_weights(path)), str(path))
        self.model.eval()
        self.write_metrics()
        return self.history


def live_buffers(model: nn.Module) -> list[str]:
    """Names of the buffers that training may change: those of modules in train mode (frozen ones stay in eval)."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _compare(then: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    for name in dict.fromkeys([*then, *now]):
        before, after = then.get(name, "nothing"), now.get(name, "nothing")
        if before != after:
            raise ConfigError(
                f"{name} is {after!r} but was {before!r} in the run of {path}: "
                "resume with the same settings, or start a new run in another folder"
            )
