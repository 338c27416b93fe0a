"""Numbers as they are fed to a model, in NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyft.errors import DataError


def as_array(value: Any) -> NDArray[Any]:
    """Numbers as an array: real numbers float32, whole numbers int64, bool and uint8 float32; Tensors are taken, too.

    uint8 holds pictures, hence float; wider integers are token or category numbers for an embedding.

    Raises:
        DataError: complex numbers, or no numbers.

    >>> as_array([1, 2]).dtype.name, as_array([0.5]).dtype.name
    ('int64', 'float32')
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16.
        value = (value.float() if value.is_floating_point() else value).numpy()
    array = np.asarray(value)
    if array.dtype.kind == "c":
        raise DataError("complex numbers are not supported; give real and imaginary part as two features")
    if array.dtype.kind not in "iufb":
        raise DataError(
            f"expected numbers, got an array of dtype {array.dtype}; convert it, for instance with .astype('float32')"
        )
    whole = array.dtype.kind in "iu" and array.dtype != np.uint8
    # A value beyond float32 becomes infinite, which the checks of inputs tell.
    with np.errstate(over="ignore"):
        return array.astype(np.int64 if whole else np.float32, copy=False)
