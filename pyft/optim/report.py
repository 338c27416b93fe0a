"""What a step reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LastStep:
    """What the last `step()` did. On a GPU it is read when an attribute is looked at, which waits for the step.

    Attributes:
        total_norm: L2 norm of all gradients, after `clip_value` and before `clip_norm`; None where none was taken.
        clip_coef: the smallest factor that `clip_norm` applied to any gradient; 1.0 for none.
        skipped: nothing was updated, since a gradient was not finite; with `step_in_backward`, that parameter.
        first_bad: the first parameter whose gradient is not finite, "number N" where it has no name; None for none.
        skipped_steps: how many steps were skipped so far.
    """

    total_norm: float | None
    clip_coef: float
    skipped: bool = False
    first_bad: str | None = None
    skipped_steps: int = 0


def number_of(param_groups: Iterable[dict[str, Any]], param: Tensor) -> int:
    """The number of a parameter among those of all groups."""
    every = [other for group in param_groups for other in group["params"]]
    return next(i for i, other in enumerate(every) if other is param)


def name_of(param_groups: Iterable[dict[str, Any]], number: int, quoted: bool = False) -> str:
    """The name of the parameter with this number, "number N" where parameters have none."""
    names = [name for group in param_groups for name in group.get("param_names", [])]
    if len(names) != sum(len(group["params"]) for group in param_groups):
        return f"number {number}"
    return f"'{names[number]}'" if quoted else str(names[number])


def nonfinite_message(name: str, param: Tensor, total_norm: float | None) -> str:
    """What a refused step says."""
    return (
        f"the gradients have total norm {total_norm}; the first that is not finite belongs to parameter {name} of "
        f"shape {tuple(param.shape)}. Nothing was updated. Lower the learning rate, look for NaN in the inputs, or "
        "train in fp32"
    )
