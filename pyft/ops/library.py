"""The operator library: schemas live here, reference kernels beside each op, compiled kernels come from csrc."""

from __future__ import annotations

import torch

# Kept for the life of the process: torch drops the operators of a library that is collected.
LIBRARY = torch.library.Library("pyft", "DEF")


def define(schema: str) -> None:
    """Add an operator to `torch.ops.pyft`.

    It is tagged as safe for torch.compile: no graph break, no hidden state.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
