"""The training loop: stages, epochs, steps."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pyft.errors import ConfigError
from pyft.freezing.no_trace import no_trace
from pyft.samples import Batch
from pyft.training.history import History, Row, is_better, metric_value
from pyft.training.interrupt import Interrupt
from pyft.training.objectives import Objective
from pyft.training.optimizers import NamedParameters, build_optimizer
from pyft.training.precision import choose_precision
from pyft.training.processes import ALONE, Processes
from pyft.training.progress import Progress, SilentProgress
from pyft.training.run_state import Run, live_buffers
from pyft.training.schedules import PlateauSchedule, make_schedule
from pyft.training.seeds import make_seeder, mix
from pyft.training.settings import Settings, stage_lr
from pyft.training.stages import Stage
from pyft.training.steps import Inputs, Signals, Stepper, call_plain

Result = TypeVar("Result")

# Last part of the random key of work that is not a step.
_PREPARE, _EVALUATE = 1, 2


class BatchSource(Protocol):
    """What the loop asks of batches: `pyft.data.batches.Batches`, or anything like it."""

    @property
    def num_batches(self) -> int:
        """Batches in one epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; the same for the same epoch, whenever asked."""


@dataclass
class StageSetup:
    """What `prepare(stage)` gives back once the stage's parameters are frozen.

    Attributes:
        trainable: (name, parameter) of all that trains, named as in `model.named_parameters()`.
        batches: the training batches of the stage.
        call: gives logits from (model, inputs); default `model(x)`, or `model(**x)` for a dict.
        evaluate: metrics on the validation samples, names without "val_", with the model in eval mode; or None.
        finish: called after the stage's last epoch, to check that what was frozen has not moved.
    """

    trainable: Iterable[tuple[str, nn.Parameter]]
    batches: BatchSource
    call: Callable[[nn.Module, Inputs], Tensor] = call_plain
    evaluate: Callable[[], dict[str, float]] | None = None
    finish: Callable[[], object] | None = None


def train(
    model: nn.Module,
    stages: Sequence[Stage],
    prepare: Callable[[Stage], StageSetup],
    settings: Settings,
    objective: Objective,
    *,
    directory: str | Path,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    resume_from: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    resume_hint: str = "",
    processes: Processes = ALONE,
) -> History:
    """Train a model stage by stage. At the end it holds the weights of the best epoch and is in eval mode.

    A run that was interrupted anywhere and resumed ends with the same bits as one that was not, given the same
    machine, torch version and number of threads. The caller's random state is left as it was.

    Args:
        model: on `device`. To resume, it must have the weights that it had when the run began.
        stages: see `make_stages`.
        prepare: called at the start of each stage; freezes, and gives what the stage trains on (see `StageSetup`).
        settings: checked ones, from `resolve`.
        objective: the loss, from `make_loss`, on `device`.
        directory: gets last.pt (checkpoint), best.safetensors (weights of the best epoch) and metrics.csv.
        device: batches are moved there.
        progress: see `make_progress`; None shows nothing.
        resume_from: the last.pt of a run; None starts anew.
        checkpoint_seconds: longest time between two checkpoints within an epoch; each epoch ends with one as well.
        resume_hint: how to resume, for the message after Ctrl-C.
        processes: that train together, each with its share of every batch (`Batch.share`); the first one writes. Each
            process must call this with a model of the same weights.

    Raises:
        ConfigError: nothing trains, patience without validation, a metric that was not evaluated, settings that
            differ from those of the run to resume.
        NonFiniteError: the loss or a gradient is NaN or infinite. The parameters have not seen it.
        CheckpointError: a checkpoint cannot be written or read. The last good one is kept.
        KeyboardInterrupt: Ctrl-C; the step in progress was finished and last.pt written.
    """
    device = torch.device(device)
    progress = progress if progress is not None else SilentProgress()
    run = Run(model, stages, settings, Path(directory), processes=processes)
    if resume_from is not None:
        run.restore(Path(resume_from))
    devices = [] if device.type == "cpu" else [device.index or 0]
    with (
        torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"),
        Interrupt() as interrupt,
        contextlib.closing(progress),
    ):
        for note in run.history.notes:
            progress.note(note)
        while run.position.stage < len(stages):
            training = _StageTraining(run, objective, device, progress, interrupt, checkpoint_seconds, resume_hint)
            training.begin(prepare)
            while not training.over():
                training.run_epoch()
            training.end()
        history = run.finish()
        if processes.any(interrupt.requested):
            raise KeyboardInterrupt(f"interrupted, but training is complete; the weights are in {history.best_path}")
        return history


class _StageTraining:
    """One stage of a run."""

    def __init__(
        self,
        run: Run,
        objective: Objective,
        device: torch.device,
        progress: Progress,
        interrupt: Interrupt,
        checkpoint_seconds: float,
        resume_hint: str,
    ) -> None:
        self.run, self.objective, self.device, self.progress = run, objective, device, progress
        self.interrupt = interrupt
        self.checkpoint_seconds, self.resume_hint = checkpoint_seconds, resume_hint
        self.seed = make_seeder(device)
        self.samples = 0
        self.next_update = self.next_checkpoint = 0.0

    # The stage

    def begin(self, prepare: Callable[[Stage], StageSetup]) -> None:
        """Freeze, build the optimizer after it, and take up what an interrupted run left."""
        run, stage, settings = self.run, self.run.stage, self.run.settings
        pending, run.pending = run.pending, None
        began = time.perf_counter()
        self.setup = self._interruptible(lambda: prepare(stage), _PREPARE)
        self.named = _check_trainable(run, self.setup)
        run.stage_identity = {
            "trainable": [name for name, _ in self.named],
            "num_batches": self.setup.batches.num_batches,
        }
        lr, reason = stage_lr(settings, stage)
        optimizer = build_optimizer(self.named, settings, lr)
        steps = math.ceil(self.setup.batches.num_batches / settings.accumulate) * stage.epochs
        self.higher = run.history.higher_is_better and self.setup.evaluate is not None
        schedule = make_schedule(settings.schedule, optimizer, steps, settings.warmup, higher_is_better=self.higher)
        self.stepper = Stepper(
            run, self.named, self.setup.call, self.objective, optimizer, schedule, self.device, self.seed
        )
        self.stepper.ask = self._signals
        if pending is None:
            self._begin_anew(lr, reason)
        else:
            self._continue(pending)
        self.stepper.begin()
        self.record["seconds"]["prepare"] += time.perf_counter() - began
        run.clock = time.perf_counter()
        self.next_checkpoint = run.clock + self.checkpoint_seconds
        if pending is None:
            self._save()
        what = f"{sum(parameter.numel() for _, parameter in self.named):,} parameters, lr {lr:.3g}"
        title = f"{stage.name} ({what}, {self.record['precision']})"
        self.progress.start_stage(title, stage.epochs, self.setup.batches.num_batches)

    def _begin_anew(self, lr: float, reason: str | None) -> None:
        run, stage = self.run, self.run.stage
        precision, why = run.processes.of_first(self._choose_precision())
        notes = [f"stage '{stage.name}': {text}" for text in (reason, why) if text]
        run.history.notes += notes
        for note in notes:
            self.progress.note(note)
        self.record: dict[str, Any] = {
            "name": stage.name,
            "lr": lr,
            "precision": precision,
            "epochs": 0,
            "stopped_early": False,
            "seconds": {"prepare": 0.0, "train": 0.0, "evaluate": 0.0},
        }
        run.history.stages.append(self.record)
        self.stepper.precision = precision
        run.model.train()
        run.add_trained([*run.stage_identity["trainable"], *live_buffers(run.model)])

    def _continue(self, pending: dict[str, Any]) -> None:
        run = self.run
        self.record = run.history.stages[-1]
        for what, value in run.stage_identity.items():
            if value != pending["stage_identity"][what]:
                now, then = _brief(value), _brief(pending["stage_identity"][what])
                raise ConfigError(
                    f"{what} of stage '{run.stage.name}' is not what it was when the run was interrupted "
                    f"({now} now, {then} then): resume with the same data, model and freeze"
                )
        self.stepper.precision = self.record["precision"]
        self.stepper.load_state(pending["optimizer"], pending["schedule"])
        run.model.train()

    def _choose_precision(self) -> tuple[str, str | None]:
        run, batches = self.run, self.setup.batches

        def probe(precision: str) -> None:
            with no_trace(run.model):
                run.model.train()
                self.stepper.probe(batch, precision)

        if run.settings.precision != "auto":
            return choose_precision(run.settings.precision, self.device)
        batch = next(iter(batches.epoch(run.position.epoch)))
        total = batches.num_batches * run.stage.epochs
        return choose_precision("auto", self.device, probe, batches=total)

    def over(self) -> bool:
        """Whether the stage has had its epochs, or `patience` ran out."""
        at, patience = self.run.position, self.run.settings.patience
        early = patience is not None and at.bad_epochs >= patience
        if early and at.stage_epoch < self.run.stage.epochs:
            self.record["stopped_early"] = True
        return early or at.stage_epoch >= self.run.stage.epochs

    def end(self) -> None:
        """Check what was frozen, and write down that the stage is over."""
        run, at = self.run, self.run.position
        run.model.eval()
        self.stepper.end()
        for _, parameter in self.named:
            parameter.grad = None
        if self.setup.finish is not None:
            self.setup.finish()
        if self.record["stopped_early"]:
            why = f"no better {run.history.metric} for {at.bad_epochs} epochs"
            note = f"stage '{run.stage.name}' ended after epoch {at.epoch}: {why}"
            run.history.notes.append(note)
            self.progress.note(note)
        at.stage, at.stage_epoch, at.stage_best, at.bad_epochs = at.stage + 1, 0, None, 0
        run.save(None, None)

    # The epoch

    def run_epoch(self) -> None:
        """Train on the batches that are left of an epoch, evaluate, keep what is best, write a checkpoint."""
        run, at, record = self.run, self.run.position, self.record
        self.stepper.begin_epoch(mix(run.settings.seed, at.stage, at.epoch))
        if at.batch < self.setup.batches.num_batches:
            self._train_batches()
        self.stepper.end_epoch()
        run.add_seconds()
        record["seconds"]["train"] += at.seconds
        train_loss = self.stepper.objective.unit * at.loss_sum / at.weight_sum if at.weight_sum else math.nan
        metrics = self._evaluate()
        record["seconds"]["evaluate"] += run.add_seconds()
        row: Row = {"stage": run.stage.name, "epoch": at.epoch + 1, "step": at.step, "lr": at.lr}
        row |= {"train_loss": train_loss, **{f"val_{name}": value for name, value in metrics.items()}}
        row["seconds"] = at.seconds
        run.history.rows.append(row)
        record["epochs"] += 1
        best = bool(metrics) and self._keep_best(metric_value(metrics, run.history.metric), row)
        if isinstance(self.stepper.schedule, PlateauSchedule):
            self.stepper.schedule.epoch_end(metrics[run.history.metric] if metrics else train_loss)
        at.epoch, at.stage_epoch, at.batch = at.epoch + 1, at.stage_epoch + 1, 0
        at.loss_sum = at.weight_sum = at.seconds = 0.0
        run.write_metrics()
        self.progress.end_epoch(row, best)
        # The border of a stage has a checkpoint of its own, without the optimizer.
        if not self.over():
            self._save()
            self._stop_if_asked()

    def _train_batches(self) -> None:
        at, stepper, accumulate = self.run.position, self.stepper, self.run.settings.accumulate
        batches = self.setup.batches.epoch(at.epoch, at.batch)
        try:
            while group := list(islice(batches, accumulate)):
                stepper.step(group, at.batch)
                at.batch += len(group)
                at.step += 1
                self.samples += stepper.group_samples
                signals = stepper.told if self.run.processes.several else self._signals()
                if any(signals):
                    self._tick(signals)
        finally:
            if hasattr(batches, "close"):
                batches.close()
        if at.batch != self.setup.batches.num_batches:
            promised = self.setup.batches.num_batches
            raise ConfigError(f"an epoch gave {at.batch} batches, but num_batches is {promised}: they must agree")

    def _signals(self) -> Signals:
        """What this process wants after a step; of several, the clock of the first counts."""
        now, first = time.perf_counter(), self.run.processes.first
        return Signals(
            self.interrupt.requested, first and now >= self.next_update, first and now >= self.next_checkpoint
        )

    def _tick(self, signals: Signals) -> None:
        at = self.run.position
        if signals.show:
            self.stepper.flush()
            loss = at.loss_sum / at.weight_sum if at.weight_sum else math.nan
            self.progress.update(at.stage_epoch + 1, at.batch, self.samples, loss, at.lr)
            self.next_update = time.perf_counter() + self.progress.interval
        if signals.stop:
            self._stop()
        if signals.write:
            self._save()

    def _evaluate(self) -> dict[str, float]:
        evaluate = self.setup.evaluate
        if evaluate is None:
            return {}
        self.run.model.eval()
        metrics = self._interruptible(evaluate, _EVALUATE)
        self.run.model.train()
        return {name: float(value) for name, value in metrics.items()}

    def _keep_best(self, value: float, row: Row) -> bool:
        run, at, history = self.run, self.run.position, self.run.history
        if is_better(value, at.stage_best, self.higher):
            at.stage_best, at.bad_epochs = value, 0
        else:
            at.bad_epochs += 1
        # Small validation sets give many ties; among them the lower loss generalises better.
        before = history.best_row
        if before is not None and value == history.best_value:
            better = is_better(row.get("val_loss", math.inf), before.get("val_loss", math.inf), higher=False)
        else:
            better = is_better(value, history.best_value, self.higher)
        if not better:
            return False
        history.best_value, history.best_epoch = value, at.epoch + 1
        run.save_best()
        return True

    # Checkpoints and Ctrl-C

    def _save(self) -> None:
        self.stepper.flush()
        self.run.add_seconds()
        self.run.save(*self.stepper.state())
        self.next_checkpoint = time.perf_counter() + self.checkpoint_seconds

    def _stop_if_asked(self) -> None:
        if self.run.processes.any(self.interrupt.requested):
            self._stop()

    def _stop(self) -> NoReturn:
        self._save()
        raise self._stopped()

    def _stopped(self) -> KeyboardInterrupt:
        path = self.run.history.last_path
        if not path.exists():
            return KeyboardInterrupt("interrupted before the first step; nothing is lost")
        hint = self.resume_hint or f"resume_from={str(path)!r}"
        return KeyboardInterrupt(f"interrupted at {self.run.where()}; {path} is written. To go on: {hint}")

    def _interruptible(self, work: Callable[[], Result], part: int) -> Result:
        """Work outside the steps: Ctrl-C stops it at once, and the position before it is what is kept."""
        at = self.run.position
        self.seed(mix(self.run.settings.seed, at.stage, at.epoch, 1 << 40, part) >> 1)
        try:
            with self.interrupt.immediate():
                return work()
        except KeyboardInterrupt:
            if part == _EVALUATE:
                self._save()
            raise self._stopped() from None


def _check_trainable(run: Run, setup: StageSetup) -> NamedParameters:
    named = list(setup.trainable)
    stage = run.stage.name
    if not named:
        raise ConfigError(f"stage '{stage}' trains nothing, all parameters are frozen: freeze less")
    if setup.batches.num_batches < 1:
        raise ConfigError(f"stage '{stage}' has no batches: give at least one training sample")
    if run.settings.patience is not None and setup.evaluate is None:
        raise ConfigError("patience needs validation samples: give val, or patience=None")
    places = dict(run.model.named_parameters(remove_duplicate=False))
    for name, parameter in named:
        if places.get(name) is not parameter:
            raise ConfigError(f"stage '{stage}': trainable '{name}' is not that parameter of the model")
        if not parameter.requires_grad:
            raise ConfigError(f"stage '{stage}': trainable '{name}' has requires_grad=False, so it cannot train")
    known = {id(parameter) for _, parameter in named}
    for name, parameter in places.items():
        if parameter.requires_grad and id(parameter) not in known:
            raise ConfigError(f"stage '{stage}': '{name}' requires a gradient but is not among trainable: freeze it")
    return named


def _brief(value: object) -> str:
    return f"{len(value)} names" if isinstance(value, list) else str(value)
