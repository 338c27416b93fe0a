"""Lean forms of the activation modules of transformers, which is never imported for their sake.

Those that are written as several operations keep every intermediate result: the lean form keeps the input, and runs
them again in the backward pass. Those that are one operation of torch keep their input already; they have a form that
keeps the smaller input of the frozen linear layer before them.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from pyft.freezing.lean.activations import computed_again, from_producer

HOME = "transformers.activations"
COMPOSED = (
    "NewGELUActivation",
    "FastGELUActivation",
    "QuickGELUActivation",
    "AccurateGELUActivation",
    "ClippedGELUActivation",
    "LaplaceActivation",
    "MishActivation",
    "ReLUSquaredActivation",
)
SINGLE = ("GELUActivation", "PytorchGELUTanh", "GELUTanh", "SiLUActivation")


class _ComputedAgain:
    def forward(self, input: Tensor, *rest: Any) -> Tensor:
        original = super().forward  # type: ignore[misc]
        return original(input, *rest) if rest else computed_again(input, original)


class _FromProducer:
    def forward(self, input: Tensor) -> Tensor:
        return from_producer(input, super().forward)  # type: ignore[misc]


class _ComputedAgainFromProducer:
    def forward(self, input: Tensor, *rest: Any) -> Tensor:
        original = super().forward  # type: ignore[misc]
        return original(input, *rest) if rest else from_producer(input, lambda x: computed_again(x, original))


_WAYS: dict[str, type] = {
    "Lean": _ComputedAgain,
    "Recomputed": _FromProducer,
    "LeanRecomputed": _ComputedAgainFromProducer,
}


def forms(recompute: bool) -> dict[type[nn.Module], type[nn.Module]]:
    """Original class -> lean class for what is loaded of transformers."""
    home = sys.modules.get(HOME)
    if home is None:
        return {}
    found: dict[type[nn.Module], type[nn.Module]] = {}
    for names, way in ((COMPOSED, "LeanRecomputed" if recompute else "Lean"), (SINGLE, "Recomputed" * recompute)):
        for name in names if way else ():
            base = getattr(home, name, None)
            if isinstance(base, type) and issubclass(base, nn.Module):
                found[base] = _form(way, base)
    return found


def _form(way: str, base: type[nn.Module]) -> type[nn.Module]:
    name = f"{way}_{base.__name__}"
    if name not in globals():
        doc = f"`{HOME}.{base.__name__}` that keeps less for its backward pass."
        globals()[name] = type(name, (_WAYS[way], base), {"__module__": __name__, "__doc__": doc})
    return globals()[name]


def __getattr__(name: str) -> Any:
    """The class of a pickled module, made where transformers has the original."""
    way, _, base = name.partition("_")
    if way in _WAYS and base in COMPOSED + SINGLE:
        import importlib

        return _form(way, getattr(importlib.import_module(HOME), base))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
