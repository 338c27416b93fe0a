"""Adafactor in float64: Shazeer and Stern, ICML 2018, algorithms 4 and 5, as torch.optim.Adafactor documents it.

torch departs from the paper in the learning rate (the largest rho), in eps1 (a floor under the estimate instead of
a term in the averages), in means instead of sums, and in decoupled weight decay.
"""

from __future__ import annotations

import decay_float64 as decay
import numpy as np


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))


def adafactor_step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: decay.State,
    *,
    lr: float,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    decay_to_init: float = 0.0,
    machine_eps: float = 2.0**-23,
) -> tuple[np.ndarray, decay.State]:
    """The next (theta, state); nothing is changed in place. `state` is {} before the first step.

    `machine_eps` takes the place of eps[0] None: the spacing of the parameter's dtype at 1.
    """
    theta = theta.astype(np.float64)
    new = decay.start(theta, state)
    new["step"] = t = new["step"] + 1.0
    if theta.size == 0:
        return theta, new
    eps1, eps2 = machine_eps if eps[0] is None else eps[0], eps[1]
    g = decay.signed(gradient, maximize)
    weight = float(t) ** beta2_decay
    alpha = max(eps2, root_mean_square(theta)) * min(lr, 1.0 / float(t) ** 0.5)

    def averaged(key: str, value: np.ndarray) -> np.ndarray:
        new[key] = (1.0 - weight) * new.get(key, np.zeros_like(value)) + weight * value
        return new[key]

    if g.ndim > 1:
        row = averaged("row_var", np.mean(g * g, axis=-1, keepdims=True))
        col = averaged("col_var", np.mean(g * g, axis=-2, keepdims=True))
        estimate = row @ col / np.maximum(np.mean(row, axis=-2, keepdims=True), eps1)
    else:
        estimate = averaged("variance", g * g)
    update = g / np.maximum(np.sqrt(estimate), eps1)
    update = update / max(1.0, root_mean_square(update) / d)
    return theta - decay.of_weights(theta, new, lr, weight_decay, decay_to_init) - alpha * update, new
