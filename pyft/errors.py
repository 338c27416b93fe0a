"""The errors that pyft raises. Each names the argument, what was expected, what came, and the mend."""

from __future__ import annotations

import importlib
from types import ModuleType


class PyftError(Exception):
    """Base of all errors raised by pyft on purpose."""


class DataError(PyftError, ValueError):
    """The data cannot be used as given: unreadable, empty, NaN, an unknown label, ..."""


class ConfigError(PyftError, ValueError):
    """An argument, or a combination of arguments, is not possible."""


class CoreError(PyftError, RuntimeError):
    """The compiled core cannot be built or loaded, and `PYFT_CORE=require` forbids the fallback."""


class FrozenError(PyftError, RuntimeError):
    """A parameter or buffer that was to stay frozen has changed."""


class CheckpointError(PyftError, RuntimeError):
    """A checkpoint cannot be written or read. The last good one is kept."""


class ExportError(PyftError, RuntimeError):
    """The exported file is missing, damaged, or does not behave like the model it came from."""


class NonFiniteError(PyftError, FloatingPointError):
    """A loss or a gradient is NaN or inf. Nothing was written by the step that found it."""


class MissingExtraError(PyftError, ImportError):
    """An optional package is not installed. The message names the extra that brings it."""


def need(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional `module`, or say in one line which extra brings it.

    Raises:
        MissingExtraError: `module` is not installed.

    >>> need("json", "text", "reading settings").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        raise MissingExtraError(
            f"{purpose} needs the package '{top}', which is not installed: pip install 'pyft[{extra}]'"
        ) from None
