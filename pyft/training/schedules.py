"""Learning-rate schedules over the steps of a stage: torch's own schedulers with a warm-up."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from pyft.errors import ConfigError


def warmup_steps(warmup: float | int, total_steps: int) -> int:
    """Steps of warm-up, from a fraction (float) or a number (int); always less than `total_steps`, at least 0.

    >>> warmup_steps(0.1, 50), warmup_steps(20, 50), warmup_steps(80, 50)
    (5, 20, 49)
    """
    steps = round(warmup * total_steps) if isinstance(warmup, float) else warmup
    return max(0, min(steps, total_steps - 1))


def make_schedule(
    name: str, optimizer: Optimizer, total_steps: int, warmup: float | int = 0.0, *, higher_is_better: bool = False
) -> LambdaLR | PlateauSchedule:
    """A schedule: call `.step()` after each optimizer step, and `.epoch_end(value)`, if it has one, after an epoch.

    The learning rate rises linearly to the optimizer's own over the warm-up (step 1 of w uses 1/w), and then
    stays ("constant"), falls to 0 at `total_steps` along a half cosine ("cosine") or a line ("linear"), or is
    halved whenever the value given to `.epoch_end` has not improved for two epochs ("plateau").

    Raises:
        ConfigError: unknown name, total_steps < 1.
    """
    if total_steps < 1:
        raise ConfigError(f"total_steps must be at least 1, not {total_steps}: there is nothing to train on")
    warm = warmup_steps(warmup, total_steps)
    if name == "plateau":
        return PlateauSchedule(optimizer, warm, higher_is_better)
    if name not in ("cosine", "linear", "constant"):
        raise ConfigError(f"schedule must be 'cosine', 'linear', 'constant' or 'plateau', not {name!r}")

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        if name == "constant":
            return 1.0
        done = min(1.0, (step - warm) / (total_steps - warm))
        return 0.5 * (1.0 + math.cos(math.pi * done)) if name == "cosine" else 1.0 - done

    return LambdaLR(optimizer, factor)


class PlateauSchedule:
    """Linear warm-up by LambdaLR, then torch's ReduceLROnPlateau (factor 0.5, patience 1) on each epoch's value."""

    def __init__(self, optimizer: Optimizer, warm: int, higher_is_better: bool) -> None:
        self._warm = warm
        self._warmup = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warm)))
        self._plateau = ReduceLROnPlateau(optimizer, "max" if higher_is_better else "min", factor=0.5, patience=1)

    def step(self) -> None:
        """Count one optimizer step."""
        # Past the warm-up the plateau owns the learning rate; LambdaLR would set it back.
        if self._warmup.last_epoch < self._warm:
            self._warmup.step()

    def epoch_end(self, value: float) -> None:
        """Give the epoch's metric (or loss)."""
        if self._warmup.last_epoch >= self._warm:
            self._plateau.step(value)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"warmup": self._warmup.state_dict(), "plateau": self._plateau.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._warmup.load_state_dict(state["warmup"])
        self._plateau.load_state_dict(state["plateau"])
