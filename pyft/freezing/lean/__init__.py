"""Frozen modules inside a model that trains below them: they keep only what the gradient of their input needs."""

from pyft.freezing.lean.swap import LeanForms, is_lean, lean, plain_class, release

__all__ = ["LeanForms", "is_lean", "lean", "plain_class", "release"]
