"""One optimizer step: forward, loss, backward, clip and update over a group of batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyft.core.transfer import to_device
from pyft.errors import ConfigError, NonFiniteError
from pyft.freezing.lean.core_calls import core_calls
from pyft.samples import Batch
from pyft.training.data_parallel import first_forward, wrap
from pyft.training.nonfinite import nonfinite_error
from pyft.training.objectives import Objective
from pyft.training.optimizers import NamedParameters
from pyft.training.padding import ignores_padding, padding_mask
from pyft.training.run_state import Run, live_buffers
from pyft.training.seeds import mix, step_seed

Inputs = Tensor | dict[str, Tensor]


def call_plain(model: nn.Module, inputs: Inputs) -> Tensor:
    """`model(**inputs)` for a dict, else `model(inputs)`."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


class Signals(NamedTuple):
    """What is to be done after a step: stop, show how far it is, write a checkpoint."""

    stop: bool = False
    show: bool = False
    write: bool = False


class Stepper:
    """Steps of one stage. It counts the loss into `run.position`, and raises before a parameter sees NaN or inf.

    Of several processes each takes its share of every batch, and all count the loss of the whole one.

    On the CPU each loss is looked at. Elsewhere that would wait for the device at each step, so losses are added up
    there and looked at in `flush`, which every checkpoint calls first.
    """

    def __init__(
        self,
        run: Run,
        named: NamedParameters,
        call: Callable[[nn.Module, Inputs], Tensor],
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        device: torch.device,
        seed: Callable[[int], object],
    ) -> None:
        self.run, self.named, self.call, self.objective = run, named, call, objective
        self.optimizer, self.schedule, self.device, self.seed = optimizer, schedule, device, seed
        self.precision = "fp32"
        self.group_samples = 0
        self._key = 0
        self._parameters = [parameter for _, parameter in named]
        self._on_cpu = device.type == "cpu"
        self._loss_sum: Tensor | None = None
        self._several = run.processes.several
        self._wrapped: Any = None
        self._forward: Callable[[Inputs], Tensor] | None = None
        self._group_loss = 0.0
        # Whether padding may be left out, known from the first batch that has any.
        self._leaves_out_padding: bool | None = None
        self.ask: Callable[[], Signals] = Signals
        self.told = Signals()

    def begin(self) -> None:
        """The model is in train mode, frozen and loaded: gradients of several processes are averaged from now on."""
        if self._several:
            model = self.run.model
            self._wrapped = wrap(model, self.call, live_buffers(model), self.run.processes)
            self._forward = partial(first_forward, self._wrapped)

    def end(self) -> None:
        """The stage is over."""
        self.run.processes.let_go()
        self._wrapped = self._forward = None

    def begin_epoch(self, key: int) -> None:
        """Set the random key of the epoch."""
        self._key = key
        if not self._on_cpu:
            before = self.run.position.loss_sum if self.run.processes.first else 0.0
            self._loss_sum = torch.tensor(before, dtype=torch.float64, device=self.device)

    def end_epoch(self) -> None:
        """Bring the sum of the losses up to date; from here on the position alone holds it."""
        self.flush()
        self._loss_sum = None
        if self._several:
            buffers = dict(self.run.model.named_buffers(remove_duplicate=False))
            self.run.processes.share(buffers[name] for name in live_buffers(self.run.model))

    def step(self, group: Sequence[Batch], number: int) -> None:
        """One optimizer step on a group of batches, the first of which has this `number` in the epoch.

        The gradient is that of the mean loss over all samples of the group.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; no parameter was changed.
            ConfigError: the loss does not depend on anything that trains.
        """
        for parameter in self._parameters:
            parameter.grad = None
        if self._several:
            self._backward_shares(group, number)
        else:
            self._backward(group, number)
        try:
            self.optimizer.step()
        except NonFiniteError as error:
            raise self._nonfinite(str(error).partition(";")[0]) from None
        self.run.position.lr = self.optimizer.param_groups[0]["lr"]
        self.schedule.step()

    def _backward(self, group: Sequence[Batch], number: int) -> None:
        weights = [self.objective.denominator(_targets(batch)) for batch in group]
        total = sum(weights)
        self.group_samples = 0
        for place, (batch, weight) in enumerate(zip(group, weights, strict=True)):
            self.group_samples += len(batch.index)
            if weight == 0.0:
                continue
            self.seed(step_seed(self._key, number + place))
            loss = self._loss(batch, self.precision)
            self._count(loss, weight)
            (loss if weight == total else loss * (weight / total)).backward()

    def _backward_shares(self, group: Sequence[Batch], number: int) -> None:
        """The same where each process has its share of every batch: averaged, the gradient is that of the whole."""
        processes = self.run.processes
        whole = [_whole_targets(batch) for batch in group]
        weights = [self.objective.denominator(targets) for targets in whole]
        total = sum(weights)
        self.group_samples = sum(len(targets) for targets in whole)
        ran = [place for place, weight in enumerate(weights) if weight]
        self._group_loss = 0.0
        for place in ran:
            batch, last = group[place], place == ran[-1]
            own = self.objective.denominator(_targets(batch)) if batch.share is None or batch.share.counts else 0.0
            # Dropout of one process is not that of another.
            seed = step_seed(self._key, number + place)
            self.seed(mix(seed, processes.rank) >> 1 if processes.rank else seed)
            with contextlib.nullcontext() if last else self._wrapped.no_sync():
                loss = self._loss(batch, self.precision, self._forward, counts=own > 0.0)
                self._forward = self._wrapped
                self._count(loss, own)
                if last:
                    self._tell(total)
                elif not math.isfinite(self._group_loss):
                    continue
                (loss * (own * processes.count / total) if own else loss).backward()
        if not ran:
            self._tell(total)
        self.run.position.weight_sum += total

    def _tell(self, weight: float) -> None:
        """Add up the loss over all processes, before anything depends on it, and agree on what follows the step."""
        loss, *signals = self.run.processes.add([self._group_loss, *map(float, self.ask())])
        self.told = Signals(*(signal > 0.0 for signal in signals))
        if not math.isfinite(loss):
            raise self._nonfinite(f"the loss is {loss / weight}")
        if self._on_cpu:
            self.run.position.loss_sum += loss

    def probe(self, batch: Batch, precision: str) -> None:
        """Forward and backward of one batch, for timing."""
        self._loss(batch, precision).backward()

    def flush(self) -> None:
        """Bring the sum of the losses up to date.

        Raises:
            NonFiniteError: it is not finite.
        """
        if self._loss_sum is None:
            return
        [value] = self.run.processes.add([float(self._loss_sum)])
        if not math.isfinite(value):
            raise self._nonfinite("a loss since the last check was not finite")
        self.run.position.loss_sum = value

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """State of optimizer and schedule, for a checkpoint."""
        return self.optimizer.state_dict(), self.schedule.state_dict()

    def load_state(self, optimizer: dict[str, Any], schedule: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.optimizer.load_state_dict(optimizer)
        self.schedule.load_state_dict(schedule)

    def _loss(
        self, batch: Batch, precision: str, forward: Callable[[Inputs], Tensor] | None = None, counts: bool = True
    ) -> Tensor:
        """The mean loss; 0 where the samples do not count, with a gradient of 0 for all that trains."""
        inputs, targets = batch.inputs, _targets(batch)
        if not self._on_cpu:
            inputs = _to(inputs, self.device)
            targets = to_device(targets, self.device)
        with contextlib.ExitStack() as stack:
            if precision == "bf16":
                stack.enter_context(torch.autocast(self.device.type, dtype=torch.bfloat16))
            elif self._on_cpu:
                stack.enter_context(core_calls(self._padding(batch)))
            logits = self.call(self.run.model, inputs) if forward is None else forward(inputs)
        loss = self.objective(logits, targets) if counts else logits.float().sum() * 0.0
        if not loss.requires_grad:
            raise ConfigError("the loss depends on no parameter that trains: check freeze and the model's forward")
        return loss

    def _padding(self, batch: Batch) -> Tensor | None:
        """The mask of a batch whose padding the model does not use."""
        mask = padding_mask(batch.inputs)
        if mask is not None and self._leaves_out_padding is None:
            model, targets = self.run.model, _targets(batch)
            self._leaves_out_padding = ignores_padding(
                model, mask, lambda: self.call(model, batch.inputs), lambda logits: self.objective(logits, targets)
            )
        return mask if self._leaves_out_padding else None

    def _count(self, loss: Tensor, weight: float) -> None:
        at = self.run.position
        if self._several and self._on_cpu:
            value = float(loss.detach())
            self._group_loss += value * weight if weight else value
            return
        if not self._several:
            at.weight_sum += weight
        if self._loss_sum is not None:
            self._loss_sum += loss.detach().double() * weight
            return
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._nonfinite(f"the loss is {value}")
        at.loss_sum += value * weight

    def _nonfinite(self, what: str) -> NonFiniteError:
        path = self.run.history.last_path
        return nonfinite_error(
            what,
            self.run.where(),
            self.named,
            lr=self.optimizer.param_groups[0]["lr"],
            precision=self.precision,
            checkpoint=path if path.exists() else None,
        )


def _targets(batch: Batch) -> Tensor:
    if batch.targets is None:
        raise ConfigError("training needs targets: a batch came without")
    return batch.targets


def _whole_targets(batch: Batch) -> Tensor:
    """The targets of all processes."""
    if batch.share is None or batch.share.targets is None:
        raise ConfigError("training in several processes needs batches that say whose share they are")
    return batch.share.targets


def _to(inputs: Inputs, device: torch.device) -> Inputs:
    if isinstance(inputs, dict):
        return {name: to_device(tensor, device) for name, tensor in inputs.items()}
    return to_device(inputs, device)
