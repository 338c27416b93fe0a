"""Fine-tuning for PyTorch models with a compiled core, and ONNX files proven to behave the same.

Importing pyft imports neither torch nor anything else heavy: every public name is loaded when it is first used.

>>> import pyft
>>> "finetune" in dir(pyft)
True
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pyft.version import __version__ as __version__

if TYPE_CHECKING:
    from pyft import errors as errors
    from pyft import onnx_runtime as onnx_runtime
    from pyft import ops as ops
    from pyft import optim as optim
    from pyft.core.doctor import doctor as doctor
    from pyft.data.images import ImagePreprocess as ImagePreprocess
    from pyft.data.table_preprocess import TablePreprocess as TablePreprocess
    from pyft.evaluate import evaluate as evaluate
    from pyft.evaluate import predict as predict
    from pyft.export_model import export_onnx as export_onnx
    from pyft.finetune import finetune as finetune
    from pyft.finetune import resume as resume
    from pyft.freezing.delta import apply_delta as apply_delta
    from pyft.freezing.delta import save_delta as save_delta
    from pyft.freezing.lean.calls import lean_calls as lean_calls
    from pyft.freezing.lean.swap import LeanForms as LeanForms
    from pyft.freezing.lean.swap import lean as lean
    from pyft.freezing.partial import train_only as train_only
    from pyft.freezing.plan import FreezePlan as FreezePlan
    from pyft.freezing.plan import freeze as freeze
    from pyft.freezing.prefix_cache import PrefixCache as PrefixCache
    from pyft.freezing.saved_bytes import saved_bytes as saved_bytes
    from pyft.freezing.select_rows import Rows as Rows
    from pyft.onnx_runtime import compare as compare
    from pyft.plan import plan as plan
    from pyft.result import Result as Result
    from pyft.run_explain import explain as explain
    from pyft.run_report import report as report
    from pyft.target_scale import TargetScale as TargetScale
    from pyft.training.stages import Stage as Stage

# public name -> module that holds it; a module stands for itself
_HOMES = {
    "FreezePlan": "pyft.freezing.plan",
    "ImagePreprocess": "pyft.data.images",
    "LeanForms": "pyft.freezing.lean.swap",
    "PrefixCache": "pyft.freezing.prefix_cache",
    "Result": "pyft.result",
    "Rows": "pyft.freezing.select_rows",
    "Stage": "pyft.training.stages",
    "TablePreprocess": "pyft.data.table_preprocess",
    "TargetScale": "pyft.target_scale",
    "apply_delta": "pyft.freezing.delta",
    "compare": "pyft.onnx_runtime",
    "doctor": "pyft.core.doctor",
    "errors": "pyft.errors",
    "evaluate": "pyft.evaluate",
    "export_onnx": "pyft.export_model",
    "explain": "pyft.run_explain",
    "finetune": "pyft.finetune",
    "freeze": "pyft.freezing.plan",
    "lean": "pyft.freezing.lean.swap",
    "lean_calls": "pyft.freezing.lean.calls",
    "onnx_runtime": "pyft.onnx_runtime",
    "ops": "pyft.ops",
    "optim": "pyft.optim",
    "plan": "pyft.plan",
    "predict": "pyft.evaluate",
    "report": "pyft.run_report",
    "resume": "pyft.finetune",
    "saved_bytes": "pyft.freezing.saved_bytes",
    "save_delta": "pyft.freezing.delta",
    "train_only": "pyft.freezing.partial",
}
_MODULES = ("errors", "onnx_runtime", "ops", "optim")

__all__ = [
    "FreezePlan",
    "ImagePreprocess",
    "LeanForms",
    "PrefixCache",
    "Result",
    "Rows",
    "Stage",
    "TablePreprocess",
    "TargetScale",
    "__version__",
    "apply_delta",
    "compare",
    "doctor",
    "errors",
    "evaluate",
    "explain",
    "export_onnx",
    "finetune",
    "freeze",
    "lean",
    "lean_calls",
    "onnx_runtime",
    "ops",
    "optim",
    "plan",
    "predict",
    "report",
    "resume",
    "save_delta",
    "saved_bytes",
    "train_only",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pyft' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps functions when modules or folders of the same name are imported: `pyft.finetune`, `pyft.report`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOMES and name not in _MODULES:
            if value.__name__ != _HOMES[name]:
                return
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
