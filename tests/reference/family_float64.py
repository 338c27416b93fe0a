"""Every class of pyft.optim, in float64, under its constructor's names: one table of oracles, one of option sets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from adafactor_float64 import adafactor_step
from adagrad_float64 import adagrad_step
from adam_float64 import adam_step, adamw_step
from lion_float64 import lion_step
from rmsprop_float64 import rmsprop_step
from sgd_float64 import sgd_step

Step = Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]

ORACLES: dict[str, Step] = {
    "AdamW": functools.partial(adamw_step, lr=1e-3),
    "Adam": functools.partial(adam_step, lr=1e-3),
    "SGD": functools.partial(sgd_step, lr=1e-3),
    "RMSprop": functools.partial(rmsprop_step, lr=1e-2),
    "Adagrad": functools.partial(adagrad_step, lr=1e-2),
    "Lion": functools.partial(lion_step, lr=1e-4),
    "Adafactor": functools.partial(adafactor_step, lr=1e-2),
}
NAMES = list(ORACLES)
# Those whose elements know nothing of each other.
ELEMENTWISE = [name for name in NAMES if name != "Adafactor"]
DECOUPLED = ["AdamW", "Lion", "Adafactor"]

# A class with an option set that moves the weights well: the learning rate is far above what rounding does.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {}),
    ("AdamW", {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}),
    ("AdamW", {"amsgrad": True, "betas": (0.9, 0.5)}),
    ("AdamW", {"maximize": True, "weight_decay": 0.0}),
    ("AdamW", {"betas": (0.0, 0.0)}),
    ("Adam", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.5, "eps": 1e-3}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1, "maximize": True, "betas": (0.5, 0.6)}),
    ("Adam", {"lr": 0.02, "weight_decay": 0.2, "decoupled_weight_decay": True}),
    ("SGD", {}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.05, "momentum": 0.9}),
    ("SGD", {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.2}),
    ("SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    ("SGD", {"lr": 0.02, "momentum": 0.7, "maximize": True}),
    ("RMSprop", {}),
    ("RMSprop", {"lr": 0.02, "alpha": 0.9, "eps": 1e-4, "weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.9, "maximize": True}),
    ("RMSprop", {"centered": True, "alpha": 0.8}),
    ("RMSprop", {"centered": True, "momentum": 0.5, "weight_decay": 0.2}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.2, "eps": 1e-5}),
    ("Adagrad", {"initial_accumulator_value": 0.7, "maximize": True}),
    ("Lion", {}),
    ("Lion", {"lr": 0.01, "betas": (0.5, 0.8), "weight_decay": 0.4, "maximize": True}),
    ("Adafactor", {}),
    ("Adafactor", {"lr": 0.5, "weight_decay": 0.1, "beta2_decay": -0.5, "d": 2.0, "maximize": True}),
    ("Adafactor", {"lr": 0.03, "eps": (0.1, 0.5)}),
]
CASE_IDS = [f"{name}-{number}" for number, (name, _) in enumerate(CASES)]


def follow(
    name: str,
    start: np.ndarray,
    gradients: Sequence[np.ndarray | None],
    **options: Any,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One tensor through all `gradients`; None is a step without a gradient."""
    theta, state = start.astype(np.float64), {}
    for gradient in gradients:
        if gradient is not None:
            theta, state = ORACLES[name](theta, gradient, state, **options)
    return theta, state
