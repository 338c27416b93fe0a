"""How to train: every number and name that the loop needs, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from pyft.errors import ConfigError
from pyft.samples import Kind, Problem
from pyft.training.objectives import check_loss_name
from pyft.training.stages import Stage, StageKind

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """Attributes:
    epochs: passes over the training samples in the whole run.
    lr: learning rate of every stage (times `Stage.lr_scale`); "auto" takes it from `auto_lr`.
    optimizer: "adamw" or "sgd".
    weight_decay: decoupled for adamw, L2 for sgd (where 5e-4 is usual); biases and norms (less than two dimensions)
        have none.
    momentum: of sgd.
    schedule: "cosine", "linear", "constant" or "plateau", over the steps of each stage.
    warmup: fraction of a stage's steps in [0, 1) as float, or a number of steps as int.
    clip: largest L2 norm of all gradients together; None does not clip.
    accumulate: batches per optimizer step; the gradient is that of the mean over all their samples.
    precision: "fp32", "bf16" (autocast), or "auto": bf16 where the device has it and a probe shows it faster.
    patience: epochs without a better metric after which a stage ends; None never ends one early.
    metric: what picks the best epoch, a name that `evaluate` gives; "auto" is macro_f1, or rmse for regression.
    seed: of dropout and of everything else that draws inside a step.
    class_weight: None, "balanced" (N / (C * count of the class)), or one number per class.
    label_smoothing: in [0, 1).
    loss: "auto", "cross_entropy", "bce", "mse", "l1", "huber", or callable(logits, targets) -> scalar mean.
    kind: what the model reads; picks lr "auto".
    """

    epochs: int = 5
    lr: float | Literal["auto"] = "auto"
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup: float | int = 0.1
    clip: float | None = 1.0
    accumulate: int = 1
    precision: str = "auto"
    patience: int | None = None
    metric: str = "auto"
    seed: int = 0
    class_weight: Literal["balanced"] | Sequence[float] | None = None
    label_smoothing: float = 0.0
    loss: str | LossFunction = "auto"
    kind: Kind = "array"


def resolve(settings: Settings, problem: Problem, kind: Kind) -> Settings:
    """Check all settings, and fill in `metric`, `loss` and `kind`.

    Raises:
        ConfigError: a value is out of range or of the wrong type, or does not fit the problem.

    >>> resolve(Settings(), "classification", "text").metric
    'macro_f1'
    """
    _check_choice("optimizer", settings.optimizer, ("adamw", "sgd"))
    _check_choice("schedule", settings.schedule, ("cosine", "linear", "constant", "plateau"))
    _check_choice("precision", settings.precision, ("fp32", "bf16", "auto"))
    _check_integer("epochs", settings.epochs, 1)
    _check_integer("accumulate", settings.accumulate, 1)
    _check_integer("seed", settings.seed, None)
    if settings.patience is not None:
        _check_integer("patience", settings.patience, 1, " or None")
    if settings.lr != "auto":
        _check_number("lr", settings.lr, above=0.0, hint=" or 'auto'")
    if settings.clip is not None:
        _check_number("clip", settings.clip, above=0.0, hint=" or None")
    _check_number("weight_decay", settings.weight_decay, least=0.0)
    _check_number("momentum", settings.momentum, least=0.0, below=1.0)
    _check_number("label_smoothing", settings.label_smoothing, least=0.0, below=1.0)
    _check_warmup(settings.warmup)
    loss = check_loss_name(settings.loss, problem, settings.label_smoothing)
    metric = settings.metric
    if metric == "auto":
        metric = "rmse" if problem == "regression" else "macro_f1"
    return replace(settings, loss=loss, metric=metric.removeprefix("val_"), kind=kind)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def _check_integer(name: str, value: object, least: int | None, hint: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        bound = "" if least is None else f" >= {least}"
        raise ConfigError(f"{name} must be an integer{bound}{hint}, not {value!r}")


def _check_number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    hint: str = "",
) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (above < value < below and value >= least):  # type: ignore[operator]
        parts = [
            text
            for bound, text in ((above, f"> {above:g}"), (least, f">= {least:g}"), (below, f"< {below:g}"))
            if math.isfinite(bound)
        ]
        raise ConfigError(f"{name} must be a number {' and '.join(parts)}{hint}, not {value!r}")


def _check_warmup(value: object) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return
    if isinstance(value, float) and 0.0 <= value < 1.0:
        return
    raise ConfigError(f"warmup must be a fraction of the steps in [0, 1) or an integer number of steps, not {value!r}")


# (optimizer, what trains, what the model reads): learning rate and the reason told to the user.
# A pretrained body moves little or it forgets; a fresh head must move far; a user's own array model is
# usually not pretrained, so it takes the optimizer's common default.
_AUTO_LR: dict[tuple[str, StageKind, Kind], float] = {
    ("adamw", "head", "text"): 1e-2,
    ("adamw", "head", "image"): 3e-3,
    ("adamw", "head", "array"): 3e-3,
    ("adamw", "full", "text"): 2e-4,
    ("adamw", "full", "image"): 3e-4,
    ("adamw", "full", "array"): 1e-3,
    ("sgd", "head", "text"): 1e-1,
    ("sgd", "head", "image"): 3e-2,
    ("sgd", "head", "array"): 3e-2,
    ("sgd", "full", "text"): 1e-2,
    ("sgd", "full", "image"): 1e-2,
    ("sgd", "full", "array"): 1e-2,
}


def auto_lr(optimizer: str, stage_kind: StageKind, kind: Kind) -> tuple[float, str]:
    """The learning rate for lr="auto" and the reason in words.

    >>> auto_lr("adamw", "full", "text")
    (0.0002, "lr 0.0002: 'auto' for adamw, the whole text model trains")
    """
    lr = _AUTO_LR[optimizer, stage_kind, kind]
    what = "only the head trains" if stage_kind == "head" else f"the whole {kind} model trains"
    return lr, f"lr {lr:g}: 'auto' for {optimizer}, {what}"


def stage_lr(settings: Settings, stage: Stage) -> tuple[float, str | None]:
    """The learning rate of a stage, and the reason when it was chosen by "auto"."""
    if settings.lr != "auto":
        return settings.lr * stage.lr_scale, None
    lr, reason = auto_lr(settings.optimizer, stage.kind, settings.kind)
    if stage.lr_scale != 1.0:
        reason += f", times lr_scale {stage.lr_scale:g}"
    return lr * stage.lr_scale, reason


_LOWER_IS_BETTER = ("loss", "error", "rmse", "mse", "mae", "perplexity", "hamming", "brier", "ece")


def higher_is_better(metric: str) -> bool:
    """True for scores (accuracy, f1, r2), False for losses and errors, by name.

    >>> higher_is_better("macro_f1"), higher_is_better("val_loss"), higher_is_better("rmse")
    (True, False, False)
    """
    return not any(word in _LOWER_IS_BETTER for word in metric.lower().replace("-", "_").split("_"))


def describe(settings: Settings) -> dict[str, Any]:
    """Plain values that tell two settings apart, for a checkpoint."""
    values = asdict(replace(settings, loss="auto", class_weight=None))
    values["loss"] = settings.loss if isinstance(settings.loss, str) else callable_name(settings.loss)
    weight = settings.class_weight
    values["class_weight"] = weight if weight is None or isinstance(weight, str) else [float(w) for w in weight]
    return values


def callable_name(function: object) -> str:
    """A name for a user's function that is the same in the next process."""
    owner = function if hasattr(function, "__qualname__") else type(function)
    return f"{owner.__module__}.{owner.__qualname__}"
