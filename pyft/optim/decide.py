"""What a step does to the gradients, decided before anything is written: clip factors, and whether to go on at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pyft.optim.clip import clip_coefficient
from pyft.optim.options import Settings
from pyft.optim.step_plan import StepPlan, add_exactly


@dataclass(frozen=True)
class Decision:
    """Attributes:
    scales: the factor of all gradients, or one for each (beside the factors of rows, which the plan keeps).
    total_norm: L2 norm of all gradients, after clip_value and before clip_norm; None where none was taken.
    smallest: the smallest factor that clip_norm applies to any gradient.
    bad: number of the first parameter in the plan whose gradient is not finite; None: none is, or nobody looked.
    """

    scales: float | list[float]
    total_norm: float | None
    smallest: float
    bad: int | None


def _first_bad(sums: list[float]) -> int | None:
    return next((i for i, value in enumerate(sums) if not math.isfinite(value)), None)


def decide(plan: StepPlan, settings: Settings, known_sums: Callable[[StepPlan], list[float]] | None) -> Decision:
    """Take the norms that the settings ask for, and the factors that follow.

    Args:
        plan: with this step's gradients.
        settings: of the optimizer.
        known_sums: gives sums of squares that were taken in backward, NaN where none was.
    """
    limits, value = settings.limits, settings.clip_value
    if not settings.takes_norm or not plan.params:
        return Decision(1.0, None, 1.0, None)
    if limits.only_global and known_sums is None:
        # The way of nearly every step: one number comes back from the core.
        total = plan.total_of_squares(value)
        if math.isfinite(total):
            return _by_one_factor(math.sqrt(total), limits.global_)
    known = [] if known_sums is None else known_sums(plan)
    if limits.agc is not None:
        sums, clipped, smallest = plan.clip_rows(value, limits.agc)
        scales = [1.0] * len(sums)
    else:
        sums = plan.sums_of_squares(value, known)
        scales = smallest = [1.0 if limits.tensor is None else _factor(one, limits.tensor) for one in sums]
        clipped = [one * factor * factor for one, factor in zip(sums, scales, strict=True)]
    total_norm = math.sqrt(add_exactly(sums))
    bad = _first_bad(sums)
    if limits.only_global and bad is None:
        return _by_one_factor(total_norm, limits.global_)
    last = _last_stage(plan, settings, clipped)
    return Decision(
        [scale * factor for scale, factor in zip(scales, last, strict=True)],
        total_norm,
        min(factor * of_last for factor, of_last in zip(smallest, last, strict=True)),
        bad,
    )


def _by_one_factor(total_norm: float, limit: float | None) -> Decision:
    coef = 1.0 if limit is None else clip_coefficient(total_norm, limit)
    return Decision(coef, total_norm, coef, None)


def _factor(sum_of_squares: float, limit: float) -> float:
    return clip_coefficient(math.sqrt(sum_of_squares), limit) if math.isfinite(sum_of_squares) else 1.0


def _last_stage(plan: StepPlan, settings: Settings, sums: list[float]) -> list[float]:
    """A factor for each parameter from the norm of its group, or of all."""
    limits = settings.limits
    if limits.group is not None:
        numbers = [member.group for member in plan.members]
        of_group = {
            number: _factor(
                add_exactly([one for one, n in zip(sums, numbers, strict=True) if n == number]), limits.group
            )
            for number in set(numbers)
        }
        return [of_group[number] for number in numbers]
    factor = 1.0 if limits.global_ is None else _factor(add_exactly(sums), limits.global_)
    return [factor] * len(sums)
