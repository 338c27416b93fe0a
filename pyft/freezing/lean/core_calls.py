"""Function calls in the code of a model on the CPU, where the core is faster than torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyft.freezing.lean.conditions import in_checkpoint
from pyft.freezing.lean.fast_gelu import gelu_call
from pyft.freezing.lean.short_attention import short_attention_call
from pyft.freezing.lean.token_linear import TokenLinear


class _CoreCalls(TorchFunctionMode):
    def __init__(self, calls: dict[Any, Callable[..., Tensor | None]]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = self._calls.get(func)
        if call is not None and not torch.compiler.is_compiling() and not in_checkpoint():
            out = call(*args, **(kwargs or {}))
            if out is not None:
                return out
        return func(*args, **(kwargs or {}))


def core_calls(mask: Tensor | None = None) -> TorchFunctionMode:
    """Inside, attention of short sequences, GELU and, where there is padding, `F.linear` are the core's: in fp32 on the
    CPU, with torch's draws of dropout and with other last bits. Where anything else is wanted they are torch's own.

    Args:
        mask: (B, T), 0 where a token is padding. The outputs of linear layers are 0 there, and nothing is computed for
            them: only for models in which padding has no influence on other tokens, and on what is made of them.

    >>> x = torch.ones(1, 1, 4, 16)
    >>> with core_calls():
    ...     F.scaled_dot_product_attention(x, x, x).unique()
    tensor([1.])
    >>> layer, x = torch.nn.Linear(64, 64), torch.ones(1, 400, 64)
    >>> with core_calls(torch.arange(400)[None] < 300):
    ...     y = layer(x)
    >>> torch.allclose(y[0, :300], layer(x)[0, :300], atol=1e-6)
    True
    """
    calls: dict[Any, Callable[..., Tensor | None]] = {
        F.scaled_dot_product_attention: short_attention_call,
        F.gelu: gelu_call,
    }
    if mask is not None:
        calls[F.linear] = TokenLinear(mask)
    return _CoreCalls(calls)
