"""Losses: the mean over a batch, and the weight of that mean among other batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyft.errors import ConfigError
from pyft.samples import Problem
from pyft.target_scale import TargetScale

_ALLOWED = {
    "classification": ("cross_entropy", "bce"),
    "multilabel": ("bce",),
    "regression": ("mse", "l1", "huber"),
}
_REGRESSION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
}


def check_loss_name(loss: Any, problem: Problem, label_smoothing: float) -> Any:
    """The loss with "auto" replaced: cross_entropy, bce for multilabel, mse for regression.

    Raises:
        ConfigError: an unknown loss, or one that does not fit the problem.
    """
    if problem not in _ALLOWED:
        raise ConfigError(f"problem must be one of {', '.join(map(repr, _ALLOWED))}, not {problem!r}")
    smooth = label_smoothing > 0
    if smooth and (problem == "regression" or not isinstance(loss, str)):
        what = "regression" if problem == "regression" else "a loss of your own"
        raise ConfigError(f"label_smoothing does not apply to {what}: leave it at 0")
    if not isinstance(loss, str):
        if not callable(loss):
            raise ConfigError(f"loss must be a name or callable(logits, targets), not {type(loss).__name__}")
        return loss
    allowed = _ALLOWED[problem]
    if loss == "auto":
        return allowed[0]
    if loss not in allowed:
        known = [*allowed, "auto", "a callable(logits, targets)"]
        raise ConfigError(f"loss={loss!r} does not fit {problem}: use {', '.join(known)}")
    return loss


def class_weights(
    spec: str | Sequence[float] | None, targets: Tensor, problem: Problem, num_classes: int
) -> Tensor | None:
    """Weights of the classes for the loss.

    Args:
        spec: None; "balanced"; or `num_classes` numbers >= 0.
        targets: (N,) int64 for classification, (N, C) of 0 and 1 for multilabel.
        problem: "balanced" is N / (C * count_c) for classification, and (N - count_c) / count_c on the positive term
            for multilabel. A class that never occurs gets 0.
        num_classes: C.

    Returns:
        (C,) float32, or None.

    Raises:
        ConfigError: regression, wrong number of weights, negative or non-finite weights.

    >>> class_weights("balanced", torch.tensor([0, 0, 0, 1]), "classification", 2)
    tensor([0.6667, 2.0000])
    """
    if spec is None:
        return None
    if problem == "regression":
        raise ConfigError("class_weight does not apply to regression: leave it at None")
    if isinstance(spec, str):
        if spec != "balanced":
            raise ConfigError(f"class_weight must be None, 'balanced' or {num_classes} numbers, not {spec!r}")
        if problem == "classification":
            counts = torch.bincount(targets, minlength=num_classes).double()
            weights = targets.numel() / (num_classes * counts)
        else:
            counts = targets.double().sum(0)
            weights = (targets.shape[0] - counts) / counts
        return torch.where(counts > 0, weights, 0.0).float()
    weights = torch.as_tensor(spec, dtype=torch.float32)
    if weights.shape != (num_classes,):
        raise ConfigError(f"class_weight must hold one number per class ({num_classes}), not {tuple(weights.shape)}")
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()) or not bool((weights > 0).any()):
        raise ConfigError(f"class_weight must be finite, >= 0 and not all 0, not {weights.tolist()}")
    return weights


def make_loss(
    problem: Problem,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "auto",
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Objective:
    """The loss of a problem.

    Args:
        problem: "classification", "multilabel" or "regression".
        loss: "auto", "cross_entropy", "bce" (one against all for classification), "mse", "l1", "huber" (delta 1),
            or a callable(logits, targets) that gives the mean over the batch as a scalar.
        class_weight: (C,) weights from `class_weights`, or None.
        label_smoothing: in [0, 1).

    Raises:
        ConfigError: the parts do not fit together.

    >>> objective = make_loss("regression")
    >>> objective(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0]))
    tensor(2.)
    """
    resolved = check_loss_name(loss, problem, label_smoothing)
    if class_weight is not None:
        if problem == "regression":
            raise ConfigError("class_weight does not apply to regression: leave it at None")
        if not isinstance(resolved, str):
            raise ConfigError("class_weight does not apply to a loss of your own: put the weights into it")
    return Objective(problem, resolved, class_weight, label_smoothing)


class Objective:
    """`objective(logits, targets)` is the mean loss, in fp32 or wider; `denominator(targets)` is its divisor.

    Attributes:
        target_scale: regression targets are scaled by it before the loss; None: taken as they are.
    """

    def __init__(
        self,
        problem: Problem,
        loss: str | Callable[[Tensor, Tensor], Tensor],
        class_weight: Tensor | None,
        label_smoothing: float,
    ) -> None:
        self.problem = problem
        self.name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
        self.class_weight = class_weight
        self.label_smoothing = label_smoothing
        self.target_scale: TargetScale | None = None
        self._function: Callable[[Tensor, Tensor], Tensor]
        self._sample_weight: Tensor | None = None
        if not isinstance(loss, str):
            self._function = loss
            if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)) and loss.weight is not None:
                self._sample_weight = loss.weight.detach().cpu()
        elif loss in _REGRESSION:
            self._function = _REGRESSION[loss]
        elif loss == "bce":
            self._function = self._bce
        else:
            self._function = self._cross_entropy
            if class_weight is not None:
                self._sample_weight = class_weight.detach().cpu()

    def to(self, device: torch.device | str) -> Objective:
        """Move the class weights (and a loss module) to `device`; returns self."""
        if self.class_weight is not None:
            self.class_weight = self.class_weight.to(device)
        if isinstance(self._function, nn.Module):
            self._function.to(device)
        return self

    def denominator(self, targets: Tensor) -> float:
        """What the mean over these targets is divided by, up to a constant: B, or the sum of their class weights.

        With it, means of several batches join to the mean over all their samples: sum(d_i * loss_i) / sum(d_i).
        """
        if self._sample_weight is None:
            return float(targets.shape[0])
        return float(self._sample_weight[targets.cpu()].sum(dtype=torch.float64))

    @property
    def unit(self) -> float:
        """What a loss is multiplied by to be in the targets' own unit; 1 where no one number does that."""
        if self.target_scale is None or len(self.target_scale.std) > 1:
            return 1.0
        return self.target_scale.std[0] ** {"mse": 2, "l1": 1}.get(self.name, 0)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss.

        Args:
            logits: (B, C) for classification and multilabel; (B,), (B, 1) or (B, K) for regression.
            targets: (B,) int64; (B, C) float; (B,), (B, 1) or (B, K) float.

        Raises:
            ConfigError: shapes that do not belong together; nothing is broadcast. A loss that is not a scalar.
        """
        if logits.dtype is not torch.float32 and logits.dtype is not torch.float64:
            logits = logits.float()
        if self.problem == "regression":
            logits, targets = _match_regression(logits, targets)
            targets = targets if self.target_scale is None else self.target_scale.scale(targets)
        elif self.problem == "classification":
            if logits.ndim != 2 or targets.ndim != 1 or logits.shape[0] != targets.shape[0]:
                raise ConfigError(
                    "classification expects logits of shape (B, C) and targets of shape (B,), "
                    f"not {tuple(logits.shape)} and {tuple(targets.shape)}"
                )
        elif logits.shape != targets.shape or logits.ndim != 2:
            raise ConfigError(
                "multilabel expects logits and targets of one shape (B, C), "
                f"not {tuple(logits.shape)} and {tuple(targets.shape)}"
            )
        loss = self._function(logits, targets)
        if not isinstance(loss, Tensor) or loss.ndim:
            came = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError(f"loss must give a scalar Tensor, the mean over the batch, not {came}: add .mean()")
        return loss

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        weight = self.class_weight
        if weight is not None and weight.dtype != logits.dtype:
            weight = weight.to(logits.dtype)
        return F.cross_entropy(logits, targets, weight, label_smoothing=self.label_smoothing)

    def _bce(self, logits: Tensor, targets: Tensor) -> Tensor:
        weight = self.class_weight
        if self.problem == "classification":
            targets = F.one_hot(targets, logits.shape[1])
        targets = targets.to(logits.dtype)
        if self.label_smoothing:
            targets = targets * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight)


def _match_regression(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if targets.dtype != logits.dtype:
        targets = targets.to(logits.dtype)
    if logits.shape == targets.shape:
        return logits, targets
    # (B, 1) against (B,) would broadcast to (B, B).
    if logits.shape == (*targets.shape, 1):
        return logits.squeeze(-1), targets
    if targets.shape == (*logits.shape, 1):
        return logits, targets.squeeze(-1)
    raise ConfigError(
        f"regression expects outputs and targets of one shape, (B,) or (B, K), not {tuple(logits.shape)} and "
        f"{tuple(targets.shape)}: the model's last layer must give one number per target"
    )
