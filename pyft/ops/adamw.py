"""AdamW over lists of tensors, in place, with the clip factor applied on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyft.ops.update import update_


def adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    clip_coef: torch.Tensor | None = None,
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> None:
    """One AdamW step (Loshchilov and Hutter 2019, algorithm 2) on all tensors, in place.

    Args:
        params: floating tensors of any shape and layout, without overlapping memory. Written.
        grads: one per parameter, same shape, any layout. Read only.
        exp_avgs, exp_avg_sqs: first and second moments, same shapes. Written.
        steps: one-element tensors: the number of this step for each parameter, from 1. Read only.
        clip_coef: () factor for all gradients, or None for 1.
        lr, beta1, beta2, eps, weight_decay: as in `torch.optim.AdamW`.
        maximize: go up the gradient.

    Raises:
        ValueError, TypeError: lengths, shapes or dtypes do not fit, or a tensor is sparse. Nothing is written.

    >>> p = torch.tensor([1.0])
    >>> adamw_([p], [torch.tensor([2.0])], [torch.zeros(1)], [torch.zeros(1)], [torch.tensor(1.0)], lr=0.5)
    >>> p
    tensor([0.4950])
    """
    hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
    state = {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "step": steps}
    update_("adamw", params, grads, state, hyper, clip_coef)
