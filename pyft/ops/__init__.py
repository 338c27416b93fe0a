"""Operators of `torch.ops.pyft`: schema, fake and PyTorch reference; the compiled core adds the fast kernels."""

from pyft.ops.adamw import adamw_
from pyft.ops.bit_masks import (
    affine_relu_bits,
    mask_by_bits,
    mask_channels,
    pack_bits,
    pack_bools,
    relu_bits,
    relu_bits_,
    scale_by_bits,
)
from pyft.ops.clip import agc_grads_, clamp_grads_, scale_grads_
from pyft.ops.gelu import gelu, gelu_backward
from pyft.ops.grad_norm import grad_norm
from pyft.ops.masked_rows import gather_channels, gather_columns, write_part_
from pyft.ops.max_pool import max_pool_backward, max_pool_offsets
from pyft.ops.packed_linear import pack_linear, packed_linear
from pyft.ops.partial import partial_embedding, partial_linear
from pyft.ops.partial_conv import partial_conv
from pyft.ops.random_bits import bernoulli_bits
from pyft.ops.short_attention import short_attention, short_attention_backward
from pyft.ops.token_linear import token_linear, token_linear_backward
from pyft.ops.update import update_

__all__ = [
    "adamw_",
    "affine_relu_bits",
    "agc_grads_",
    "bernoulli_bits",
    "clamp_grads_",
    "gather_channels",
    "gather_columns",
    "gelu",
    "gelu_backward",
    "grad_norm",
    "mask_by_bits",
    "mask_channels",
    "max_pool_backward",
    "max_pool_offsets",
    "pack_bits",
    "pack_bools",
    "pack_linear",
    "packed_linear",
    "partial_conv",
    "partial_embedding",
    "partial_linear",
    "relu_bits",
    "relu_bits_",
    "scale_by_bits",
    "scale_grads_",
    "short_attention",
    "short_attention_backward",
    "token_linear",
    "token_linear_backward",
    "update_",
    "write_part_",
]
