"""Adam, AMSGrad and AdamW in float64, written from the papers.

Kingma and Ba, "Adam", ICLR 2015, algorithm 1; Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond", ICLR
2018, algorithm 2, with Adam's bias corrections, as torch.optim has it; Loshchilov and Hutter, "Decoupled Weight Decay
Regularization", ICLR 2019, algorithm 2.
"""

from __future__ import annotations

import decay_float64 as decay
import numpy as np


def adam_step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: decay.State,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    decay_to_init: float = 0.0,
) -> tuple[np.ndarray, decay.State]:
    """The next (theta, state); nothing is changed in place. `state` is {} before the first step."""
    theta = theta.astype(np.float64)
    new = decay.start(theta, state)
    zeros = np.zeros_like(theta)
    g = decay.signed(gradient, maximize)
    if not decoupled_weight_decay:
        g = decay.into_gradient(g, theta, new, weight_decay, decay_to_init)
    beta1, beta2 = betas
    new["step"] = t = new["step"] + 1.0
    new["exp_avg"] = m = beta1 * new.get("exp_avg", zeros) + (1.0 - beta1) * g
    new["exp_avg_sq"] = v = beta2 * new.get("exp_avg_sq", zeros) + (1.0 - beta2) * g * g
    if amsgrad:
        new["max_exp_avg_sq"] = v = np.maximum(new.get("max_exp_avg_sq", zeros), v)
    m_hat = m / (1.0 - beta1**t)
    v_hat = v / (1.0 - beta2**t)
    pulled = decay.of_weights(theta, new, lr, weight_decay, decay_to_init) if decoupled_weight_decay else 0.0
    return theta - pulled - lr * m_hat / (np.sqrt(v_hat) + eps), new


def adamw_step(
    theta: np.ndarray, gradient: np.ndarray, state: decay.State, *, weight_decay: float = 1e-2, **hyper: object
) -> tuple[np.ndarray, decay.State]:
    """`adam_step` with decoupled decay, under AdamW's default for it."""
    return adam_step(theta, gradient, state, weight_decay=weight_decay, decoupled_weight_decay=True, **hyper)
