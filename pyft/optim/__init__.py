"""Optimizers and clipping on the compiled core."""

from pyft.optim.adamw import AdamW, LastStep
from pyft.optim.clip import clip_grad_norm_

__all__ = ["AdamW", "LastStep", "clip_grad_norm_"]
