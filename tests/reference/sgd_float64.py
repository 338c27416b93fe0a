"""SGD with momentum in float64.

Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013, eq. 1 to 4, in the
form that torch.optim.SGD documents: the learning rate stands outside the buffer, whose first value is the gradient.
"""

from __future__ import annotations

import decay_float64 as decay
import numpy as np


def sgd_step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: decay.State,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    decay_to_init: float = 0.0,
) -> tuple[np.ndarray, decay.State]:
    """The next (theta, state); nothing is changed in place. `state` is {} before the first step."""
    theta = theta.astype(np.float64)
    new = decay.start(theta, state)
    new["step"] = new["step"] + 1.0
    g = decay.into_gradient(decay.signed(gradient, maximize), theta, new, weight_decay, decay_to_init)
    if momentum == 0.0:
        return theta - lr * g, new
    if "momentum_buffer" in new:
        new["momentum_buffer"] = momentum * new["momentum_buffer"] + (1.0 - dampening) * g
    else:
        new["momentum_buffer"] = g
    update = g + momentum * new["momentum_buffer"] if nesterov else new["momentum_buffer"]
    return theta - lr * update, new
