"""Checks of hyperparameters."""

from __future__ import annotations

from typing import Any


def at_least_zero(group: dict[str, Any], *names: str) -> None:
    """Raise a ValueError that names the first of these hyperparameters that is negative or NaN."""
    for name in names:
        if not float(group[name]) >= 0.0:
            raise ValueError(f"{name} must be 0 or more, got {group[name]}")


def rates(group: dict[str, Any], name: str) -> tuple[float, ...]:
    """Numbers that must lie in [0, 1): one, or several as a sequence.

    Raises:
        ValueError: one does not.
    """
    values = group[name] if isinstance(group[name], (tuple, list)) else (group[name],)
    for i, value in enumerate(values):
        if not 0.0 <= float(value) < 1.0:
            place = f"{name}[{i}]" if isinstance(group[name], (tuple, list)) else name
            raise ValueError(f"{place} must be in [0, 1), got {value}")
    return tuple(float(value) for value in values)
