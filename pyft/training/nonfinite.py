"""What happens when a loss or a gradient is NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from pyft.errors import NonFiniteError


def first_nonfinite(named: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """Where the first value that is not finite is: "parameter 'name'", "gradient of 'name'" or None."""
    pairs = list(named)
    for name, parameter in pairs:
        if not torch.isfinite(parameter.detach()).all():
            return f"parameter '{name}'"
    for name, parameter in pairs:
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"gradient of '{name}'"
    return None


def nonfinite_error(
    what: str,
    where: str,
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    precision: str,
    checkpoint: Path | None,
) -> NonFiniteError:
    """The error for a non-finite value.

    Args:
        what: "the loss is nan", "the gradient norm is inf".
        where: stage, epoch and step, in words.
        named: what trains; the first bad one is named.
        lr: the learning rate in use.
        precision: "fp32" or "bf16".
        checkpoint: the last good one, or None when there is none yet.
    """
    first = first_nonfinite(named)
    if first is not None:
        found = f"first value that is not finite: {first}"
    else:
        found = "all parameters and gradients are finite, so look at the inputs, the targets and the loss"
    mends = [f"lower lr (now {lr:.3g})"]
    if precision != "fp32":
        mends.append("precision='fp32'")
    mends.append("a smaller clip, or check the inputs for extreme values")
    kept = (
        f"the last good checkpoint is kept: {checkpoint}" if checkpoint is not None else "no checkpoint was written yet"
    )
    return NonFiniteError(f"{where}: {what}; {found}. Mend: {'; or '.join(mends)}. {kept[0].upper()}{kept[1:]}")
