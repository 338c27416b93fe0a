"""Predictions as a user reads them: one dict per sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyft.errors import ConfigError
from pyft.evaluation.scores import scores_from_logits


def prediction_rows(
    answers: Iterable[tuple[NDArray[Any], NDArray[Any]]], count: int, problem: str, classes: Sequence[str] | None
) -> list[dict[str, Any]]:
    """What `pyft.predict` returns, in the order of the samples.

    Args:
        answers: (logits (B, C), sample numbers (B,)) of each batch, in any order; for regression values.
        count: samples in all.
        problem: "classification", "multilabel" or "regression".
        classes: C names; None: "0", "1", ...

    Raises:
        ConfigError: the model gives another number of outputs than there are names.
    """
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for logits, index in answers:
        scores = scores_from_logits(logits, problem)
        names = classes or [str(number) for number in range(scores.shape[-1] if scores.ndim > 1 else 1)]
        for number, values in zip(index.tolist(), scores, strict=True):
            rows[number] = _row(values, problem, names)
    return rows


def _row(values: Any, problem: str, names: Sequence[str]) -> dict[str, Any]:
    if problem == "regression":
        return {"value": float(values.item()) if values.size == 1 else values}
    if len(values) != len(names):
        raise ConfigError(f"classes: {len(names)} names, but the model gives {len(values)} outputs")
    if problem == "multilabel":
        return {"labels": [name for name, value in zip(names, values, strict=True) if value > 0.5], "scores": values}
    best = int(np.argmax(values))
    return {"label": names[best], "index": best, "score": float(values[best]), "scores": values}
