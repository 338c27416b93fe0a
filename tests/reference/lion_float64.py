"""Lion in float64: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, algorithm 2."""

from __future__ import annotations

import decay_float64 as decay
import numpy as np


def lion_step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: decay.State,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
    decay_to_init: float = 0.0,
) -> tuple[np.ndarray, decay.State]:
    """The next (theta, state); nothing is changed in place. `state` is {} before the first step."""
    theta = theta.astype(np.float64)
    new = decay.start(theta, state)
    new["step"] = new["step"] + 1.0
    g = decay.signed(gradient, maximize)
    m = new.get("exp_avg", np.zeros_like(theta))
    new["exp_avg"] = betas[1] * m + (1.0 - betas[1]) * g
    direction = np.sign(betas[0] * m + (1.0 - betas[0]) * g)
    return theta - decay.of_weights(theta, new, lr, weight_decay, decay_to_init) - lr * direction, new
