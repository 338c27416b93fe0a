"""Run a model over batches, one batch in memory at a time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from pyft.errors import ConfigError, DataError
from pyft.evaluation.metrics import Metrics, make_counter
from pyft.evaluation.scores import to_numpy

if TYPE_CHECKING:
    from pyft.samples import Batch


@dataclass(frozen=True, eq=False)
class Predictions:
    """The model's answer to one batch.

    Attributes:
        logits: (B, C), or (B,) where the model gives that.
        targets: (B,) or (B, K), or None where there are no labels.
        index: (B,) int64 sample numbers.
    """

    logits: NDArray[Any]
    targets: NDArray[Any] | None
    index: NDArray[Any]


def predict_logits(call: Callable[[Any], Any], batches: Iterable[Batch]) -> Iterator[Predictions]:
    """The logits of each batch, as NumPy, in the order of the batches.

    Args:
        call: takes `Batch.inputs` (Tensor (B, ...) or dict of Tensors), gives logits with first dimension B as
            Tensor or array: a function around a PyTorch model in eval mode, or an `OnnxModel`. Runs without autograd.
        batches: as `Batches.epoch(...)` gives them.

    Yields:
        Predictions, each kept only until the next is asked for.

    Raises:
        ConfigError: `call` gives something that is not one row per sample.
    """
    for batch in batches:
        # The mode ends before the yield: what the caller does meanwhile is none of our business.
        with _no_grad():
            logits = call(batch.inputs)
        size = len(batch.index)
        if getattr(logits, "shape", ())[:1] != (size,):
            shape = tuple(logits.shape) if hasattr(logits, "shape") else type(logits).__name__
            raise ConfigError(f"call must give logits with one row for each of {size} samples, got {shape}")
        targets = None if batch.targets is None else to_numpy(batch.targets)
        yield Predictions(to_numpy(logits), targets, to_numpy(batch.index))


def evaluate_batches(
    call: Callable[[Any], Any],
    batches: Iterable[Batch],
    problem: str,
    classes: Sequence[str] | int | None = None,
    watch: Callable[[Predictions], None] | None = None,
) -> Metrics:
    """The metrics of a model on labelled batches, streaming.

    Args:
        call, batches: as for `predict_logits`.
        problem: "classification", "multilabel" or "regression".
        classes: names (or number) of the classes in the order of the class index; None for regression.
        watch: is given each batch after it was counted, so that one pass serves for more than metrics.

    Raises:
        DataError: no batch, batches without labels, or logits that are not finite.
        ConfigError: an unknown problem, or no classes where they are needed.
    """
    counter = make_counter(problem, classes)
    for prediction in predict_logits(call, batches):
        if prediction.targets is None:
            raise DataError("the data has no labels, so it cannot be evaluated: give a label column, or use predict")
        counter.update(prediction.targets, prediction.logits)
        if watch is not None:
            watch(prediction)
    return counter.metrics()


def _no_grad() -> contextlib.AbstractContextManager[Any]:
    """torch.no_grad() where torch is in use; an ONNX file needs no torch."""
    torch = sys.modules.get("torch")
    return contextlib.nullcontext() if torch is None else torch.no_grad()
