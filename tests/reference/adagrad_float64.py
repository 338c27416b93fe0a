"""Adagrad in float64: Duchi, Hazan and Singer, JMLR 12 (2011), the diagonal form of section 1.1.

`lr_decay`, `initial_accumulator_value` and eps outside the root are torch.optim.Adagrad's.
"""

from __future__ import annotations

import decay_float64 as decay
import numpy as np


def adagrad_step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: decay.State,
    *,
    lr: float,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
    decay_to_init: float = 0.0,
) -> tuple[np.ndarray, decay.State]:
    """The next (theta, state); nothing is changed in place. `state` is {} before the first step."""
    theta = theta.astype(np.float64)
    new = decay.start(theta, state)
    g = decay.into_gradient(decay.signed(gradient, maximize), theta, new, weight_decay, decay_to_init)
    rate = lr / (1.0 + float(new["step"]) * lr_decay)
    new["step"] = new["step"] + 1.0
    new["sum"] = new.get("sum", np.full_like(theta, initial_accumulator_value)) + g * g
    return theta - rate * g / (np.sqrt(new["sum"]) + eps), new
