"""Running and judging an exported file with NumPy and onnxruntime alone; torch is never imported.

>>> from pyft import onnx_runtime
>>> onnx_runtime.load.__name__
'load'
"""

from pyft.evaluation.compare import Comparison as Comparison
from pyft.onnx_runtime.compare import compare as compare
from pyft.onnx_runtime.evaluation import Evaluation as Evaluation
from pyft.onnx_runtime.evaluation import evaluate as evaluate
from pyft.onnx_runtime.evaluation import load as load
from pyft.onnx_runtime.evaluation import predict as predict
from pyft.onnx_runtime.speed import Speed as Speed

__all__ = ["Comparison", "Evaluation", "Speed", "compare", "evaluate", "load", "predict"]
