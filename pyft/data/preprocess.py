"""From one raw sample to what the model takes, as a description that travels with the model."""

from __future__ import annotations

from typing import Any

import torch

from pyft.data.arrays import as_tensor
from pyft.data.images import ImagePreprocess
from pyft.data.table_preprocess import TablePreprocess
from pyft.data.text import TextPreprocess
from pyft.errors import ConfigError


class ArrayPreprocess:
    """Numbers as they are: real numbers float32, whole numbers int64 (see `arrays.as_tensor`)."""

    def __call__(self, value: Any) -> torch.Tensor:
        """A CPU tensor of the shape of `value`, float32 or int64."""
        return as_tensor(value)

    def spec(self) -> dict[str, Any]:
        """All that `from_spec` needs, as JSON values."""
        return {"kind": "array"}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> ArrayPreprocess:
        """The preprocessing that `spec()` described."""
        return cls()


Preprocess = TextPreprocess | ImagePreprocess | ArrayPreprocess | TablePreprocess


def preprocess_from_spec(spec: dict[str, Any]) -> Preprocess:
    """The preprocessing that a `spec()` described.

    Raises:
        ConfigError: its kind is not known.

    >>> preprocess_from_spec({"kind": "array"}).spec()
    {'kind': 'array'}
    """
    kinds: dict[str, Any] = {
        "text": TextPreprocess, "image": ImagePreprocess, "array": ArrayPreprocess, "table": TablePreprocess,
    }  # fmt: skip
    kind = spec.get("kind")
    if kind not in kinds:
        raise ConfigError(
            f"preprocess: unknown kind {kind!r}; expected one of {', '.join(kinds)}; "
            f"a function of your own must be given again as preprocess="
        )
    preprocess: Preprocess = kinds[kind].from_spec(spec)
    return preprocess
