"""Operators of `torch.ops.pyft`: schema, fake and PyTorch reference; the compiled core adds the fast kernels."""

from pyft.ops.adamw import adamw_
from pyft.ops.clip import agc_grads_, clamp_grads_, scale_grads_
from pyft.ops.grad_norm import grad_norm
from pyft.ops.partial import partial_embedding, partial_linear
from pyft.ops.partial_conv import partial_conv
from pyft.ops.update import update_

__all__ = [
    "adamw_",
    "agc_grads_",
    "clamp_grads_",
    "grad_norm",
    "partial_conv",
    "partial_embedding",
    "partial_linear",
    "scale_grads_",
    "update_",
]
