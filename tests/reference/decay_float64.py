"""Weight decay and L2-SP in float64, coupled and decoupled.

Loshchilov and Hutter, ICLR 2019, for decoupled decay; Li, Grandvalet and Davoine, ICML 2018, eq. 5, for the pull
toward the pretrained value.
"""

from __future__ import annotations

import numpy as np

State = dict[str, np.ndarray]


def start(theta: np.ndarray, state: State) -> State:
    """A copy of `state`, or of a new one: `step` 0 and the value to which `decay_to_init` pulls."""
    return dict(state) if state else {"step": np.array(0.0), "init": theta.astype(np.float64)}


def signed(gradient: np.ndarray, maximize: bool) -> np.ndarray:
    """The direction that is descended."""
    return gradient.astype(np.float64) * (-1.0 if maximize else 1.0)


def into_gradient(
    g: np.ndarray, theta: np.ndarray, state: State, weight_decay: float, decay_to_init: float
) -> np.ndarray:
    """Coupled: the gradient of weight_decay/2 |theta|^2 + decay_to_init/2 |theta - theta_0|^2 is added."""
    return g + weight_decay * theta + decay_to_init * (theta - state["init"])


def of_weights(theta: np.ndarray, state: State, lr: float, weight_decay: float, decay_to_init: float) -> np.ndarray:
    """Decoupled: what is subtracted from the weights, past the adaptive step."""
    return lr * (weight_decay * theta + decay_to_init * (theta - state["init"]))
