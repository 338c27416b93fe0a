"""The unit in which a regression model gives its outputs: (y - mean) / std of the training targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyft.errors import CheckpointError, ConfigError

LEAST_STD, MOST_STD, MOST_MEAN = 0.1, 10.0, 10.0
"""Targets within these are learned as they are: a new head's outputs are of this size."""
ALREADY_GOOD = 0.5
"""Share of the targets' variance that a model explains which gives values in their own unit already."""


@dataclass(frozen=True)
class TargetScale:
    """Mean and standard deviation of the training targets, one per output.

    A model trained with it gives (y - mean) / std; `unscale` gives y. All arithmetic is in float32, multiply and then
    add, so that torch, NumPy and ONNX agree bit for bit.

    Attributes:
        mean, std: K numbers that float32 holds exactly, in the unit of the targets; std > 0.

    >>> scale = TargetScale.of(np.float32([100.0, 300.0]))
    >>> scale.mean, scale.std, scale.scale(np.float32([100.0])), scale.unscale(np.float32([2.0]))
    ((200.0,), (100.0,), array([-1.], dtype=float32), array([400.], dtype=float32))
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, targets: Any) -> TargetScale:
        """The scale of targets (N,) or (N, K), array or CPU Tensor; a constant output has std 1."""
        values = np.asarray(targets, dtype=np.float64)
        values = values.reshape(len(values), -1)
        mean, std = values.mean(axis=0).astype(np.float32), values.std(axis=0).astype(np.float32)
        constant = (values.min(axis=0) == values.max(axis=0)) | (std == 0)
        std = np.where(constant, np.float32(1), std)
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def scale(self, targets: Any) -> Any:
        """(y - mean) / std of an array or Tensor (B,), (B, 1) or (B, K)."""
        return (targets - self._like(self.mean, targets)) / self._like(self.std, targets)

    def unscale(self, outputs: Any) -> Any:
        """outputs * std + mean of an array or Tensor (B,), (B, 1) or (B, K), half precisions widened to float32."""
        if hasattr(outputs, "detach") and outputs.element_size() < 4:
            outputs = outputs.float()
        return outputs * self._like(self.std, outputs) + self._like(self.mean, outputs)

    def _like(self, numbers: tuple[float, ...], values: Any) -> Any:
        if len(numbers) > 1 and values.shape[-1] != len(numbers):
            raise ConfigError(
                f"scale_targets: the scale is of {len(numbers)} outputs, the model gives shape {tuple(values.shape)}"
            )
        given = numbers[0] if len(numbers) == 1 else numbers
        if hasattr(values, "new_tensor"):
            return values.new_tensor(given)
        return np.asarray(given, dtype=values.dtype)

    def to_dict(self) -> dict[str, list[float]]:
        """As JSON: {"mean": [...], "std": [...]}."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> TargetScale:
        """What `to_dict` gave.

        Raises:
            CheckpointError: it is not whole.
        """
        try:
            made = cls(*(tuple(float(np.float32(number)) for number in value[key]) for key in ("mean", "std")))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the scale of the targets is damaged ({error}): {dict(value)!r}") from None
        if not made.mean or len(made.mean) != len(made.std) or not all(std > 0 for std in made.std):
            raise CheckpointError(f"the scale of the targets is damaged: {dict(value)!r}")
        return made

    def __str__(self) -> str:
        pairs = [f"(y - {mean:g}) / {std:g}" for mean, std in zip(self.mean[:3], self.std[:3], strict=True)]
        return ", ".join(pairs) + (f" and {len(self.mean) - 3} more" if len(self.mean) > 3 else "")


def choose_scale(
    wanted: Any, targets: Any, outputs: Callable[[], Any], *, earlier: TargetScale | None, continues: bool
) -> tuple[TargetScale | None, str | None]:
    """The scale of a regression run, and a note.

    Args:
        wanted: the argument `scale_targets`.
        targets: (N,) or (N, K) of the training samples.
        outputs: gives the model's outputs for the first of these samples, before training.
        earlier: the scale of the run that the model comes from.
        continues: the model comes from a run with these outputs, whose unit they are in.

    Raises:
        ConfigError: another word than "auto", True or False; or False for a model whose outputs are scaled.
    """
    check_scale_targets(wanted)
    if continues and earlier is not None:
        if wanted is False:
            raise ConfigError(
                "scale_targets=False: the earlier run's model gives scaled values; leave scale_targets='auto', which "
                "keeps that scale"
            )
        return earlier, f"targets scaled as in the earlier run: {earlier}"
    if wanted is False or (continues and wanted == "auto"):
        return None, None
    scale = TargetScale.of(targets)
    if wanted is True:
        return scale, f"targets scaled for training: {scale}"
    pairs = list(zip(scale.mean, scale.std, strict=True))
    if all(LEAST_STD <= std <= MOST_STD and abs(mean) <= MOST_MEAN for mean, std in pairs):
        return None, None
    if _already_good(outputs(), targets):
        return None, "targets not scaled: the model gives values in their unit already (scale_targets=True scales them)"
    return scale, (
        f"targets scaled for training: {scale}; predictions and metrics are in their own unit (scale_targets=False "
        f"trains on them as they are)"
    )


def check_scale_targets(wanted: Any) -> None:
    """Refuse what is no way to scale targets."""
    if wanted not in ("auto", True, False) or (isinstance(wanted, int) and not isinstance(wanted, bool)):
        raise ConfigError(f"scale_targets={wanted!r}: expected 'auto', True or False")


def _already_good(outputs: Any, targets: Any) -> bool:
    """Whether the outputs explain the targets, as those of a model that was trained on them do."""
    given = np.asarray(outputs, dtype=np.float64)
    true = np.asarray(targets, dtype=np.float64)[: len(given)]
    if given.size != true.size or len(given) < 2:
        return False
    given, true = given.reshape(len(given), -1), true.reshape(len(true), -1)
    left, all_of_it = ((given - true) ** 2).sum(0), ((true - true.mean(0)) ** 2).sum(0)
    return bool((left <= (1 - ALREADY_GOOD) * all_of_it).all() and (all_of_it > 0).any())
