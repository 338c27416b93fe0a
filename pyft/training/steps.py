"""One optimizer step: forward, loss, backward, clip and update over a group of batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyft.core.transfer import to_device
from pyft.errors import ConfigError, NonFiniteError
from pyft.samples import Batch
from pyft.training.nonfinite import nonfinite_error
from pyft.training.objectives import Objective
from pyft.training.optimizers import NamedParameters
from pyft.training.run_state import Run
from pyft.training.seeds import step_seed

Inputs = Tensor | dict[str, Tensor]


def call_plain(model: nn.Module, inputs: Inputs) -> Tensor:
    """`model(**inputs)` for a dict, else `model(inputs)`."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


class Stepper:
    """Steps of one stage. It counts the loss into `run.position`, and raises before a parameter sees NaN or inf.

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

    def begin_epoch(self, key: int) -> None:
        """Set the random key of the epoch."""
        self._key = key
        if not self._on_cpu:
            self._loss_sum = torch.tensor(self.run.position.loss_sum, dtype=torch.float64, device=self.device)

    def end_epoch(self) -> None:
        """Bring the sum of the losses up to date; from here on the position alone holds it."""
        self.flush()
        self._loss_sum = None

    def step(self, group: Sequence[Batch], number: int) -> None:
        """One optimizer step on a group of batches, the first of which has this `number` in the epoch.

        The gradient is that of the mean loss over all samples of the group.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; no parameter was changed.
            ConfigError: the loss does not depend on anything that trains.
        """
        for parameter in self._parameters:
            parameter.grad = None
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
        try:
            self.optimizer.step()
        except NonFiniteError as error:
            raise self._nonfinite(str(error).partition(";")[0]) from None
        self.run.position.lr = self.optimizer.param_groups[0]["lr"]
        self.schedule.step()

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
        value = float(self._loss_sum)
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

    def _loss(self, batch: Batch, precision: str) -> Tensor:
        inputs, targets = batch.inputs, _targets(batch)
        if not self._on_cpu:
            inputs = _to(inputs, self.device)
            targets = to_device(targets, self.device)
        if precision == "bf16":
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                logits = self.call(self.run.model, inputs)
        else:
            logits = self.call(self.run.model, inputs)
        loss = self.objective(logits, targets)
        if not loss.requires_grad:
            raise ConfigError("the loss depends on no parameter that trains: check freeze and the model's forward")
        return loss

    def _count(self, loss: Tensor, weight: float) -> None:
        at = self.run.position
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


def _to(inputs: Inputs, device: torch.device) -> Inputs:
    if isinstance(inputs, dict):
        return {name: to_device(tensor, device) for name, tensor in inputs.items()}
    return to_device(inputs, device)
