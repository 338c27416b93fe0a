"""Whether a tensor is spread over processes."""

from __future__ import annotations

import sys
from typing import Any, TypeGuard


def is_distributed(tensor: Any) -> TypeGuard[Any]:
    """Whether it is a DTensor. Nothing is imported to find out: without the import there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
