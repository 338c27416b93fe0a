"""RMSprop in float64.

Tieleman and Hinton, "Lecture 6.5 - RMSprop", Coursera 2012; the centered form is Graves, "Generating Sequences With
Recurrent Neural Networks", 2013, eq. 38 to 41, with eps outside the root, as torch.optim documents it.
"""

from __future__ import annotations

import decay_float64 as decay
import numpy as np


def rmsprop_step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: decay.State,
    *,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
    decay_to_init: float = 0.0,
) -> tuple[np.ndarray, decay.State]:
    """The next (theta, state); nothing is changed in place. `state` is {} before the first step."""
    theta = theta.astype(np.float64)
    new = decay.start(theta, state)
    zeros = np.zeros_like(theta)
    new["step"] = new["step"] + 1.0
    g = decay.into_gradient(decay.signed(gradient, maximize), theta, new, weight_decay, decay_to_init)
    new["square_avg"] = variance = alpha * new.get("square_avg", zeros) + (1.0 - alpha) * g * g
    if centered:
        new["grad_avg"] = alpha * new.get("grad_avg", zeros) + (1.0 - alpha) * g
        # A variance is never negative; rounding may say otherwise.
        variance = np.maximum(variance - new["grad_avg"] ** 2, 0.0)
    update = g / (np.sqrt(variance) + eps)
    if momentum > 0.0:
        new["momentum_buffer"] = update = momentum * new.get("momentum_buffer", zeros) + update
    return theta - lr * update, new
