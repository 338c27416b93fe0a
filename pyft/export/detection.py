"""Detection in the file: suppression of overlapping boxes, and boxes in pixels of the picture that was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from pyft.errors import ConfigError, ExportError
from pyft.export.graph import Graph, Value
from pyft.export.run import OnnxModel
from pyft.export.shapes import Inputs
from pyft.export.trace import Caller

CANDIDATES = "candidate_boxes"
TOLERANCE = 1e-4
"""Largest difference of a box, relative to the largest coordinate."""


@dataclass(frozen=True)
class Suppression:
    """How candidates become the boxes that are given out.

    Attributes:
        iou: of two boxes of a class that overlap by more (intersection over union), the one with the lower score goes.
        score: boxes with a score (sigmoid of the logit) of at most this are left out.
        max_boxes: the most boxes per class and picture.

    Raises:
        ConfigError: a value out of its range.
    """

    iou: float = 0.5
    score: float = 0.05
    max_boxes: int = 100

    def __post_init__(self) -> None:
        for name in ("iou", "score"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"detection: {name}={value!r}, expected a number from 0 to 1")
        if isinstance(self.max_boxes, bool) or not isinstance(self.max_boxes, int) or self.max_boxes < 1:
            raise ConfigError(f"detection: max_boxes={self.max_boxes!r}, expected a whole number of 1 or more")

    @classmethod
    def of(cls, problem: str, given: Mapping[str, Any] | None) -> Suppression | None:
        """None for another problem than detection.

        Raises:
            ConfigError: an unknown name, or given for another problem.
        """
        if problem != "detection":
            if given is not None:
                raise ConfigError(f"detection= is for task='detection', the task is {problem or 'not given'!r}")
            return None
        names = set(cls.__dataclass_fields__)
        if unknown := sorted(set(given or {}) - names):
            raise ConfigError(f"detection: unknown {unknown[0]!r}; expected {', '.join(sorted(names))}")
        return cls(**(given or {}))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class DetectionCaller(Caller):
    """A detector with its class logits (B, N, C) and candidate boxes (B, N, 4)."""

    outputs = ("logits", CANDIDATES)

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Tensors (B, ...) to logits and boxes."""
        boxes, logits = boxes_and_logits(self.call(*tensors))
        return logits, boxes

    def logits(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The logits alone."""
        return self(*tensors)[0]


def boxes_and_logits(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes (B, N, 4) and logits (B, N, C) of a detector: a dict or object with `boxes` and `logits`, or a pair.

    Raises:
        ConfigError: something else, or shapes that do not fit.
    """
    if isinstance(output, Mapping):
        boxes, logits = output.get("boxes"), output.get("logits")
    elif hasattr(output, "boxes") and hasattr(output, "logits"):
        boxes, logits = output.boxes, output.logits
    else:
        boxes, logits = output if isinstance(output, tuple | list) and len(output) == 2 else (None, None)
    if not isinstance(boxes, torch.Tensor) or not isinstance(logits, torch.Tensor):
        raise ConfigError(
            "a detector must give boxes (B, N, 4), xyxy in pixels of its input, and class logits (B, N, C), as a pair "
            f"in this order or under 'boxes' and 'logits', got {type(output).__name__}"
        )
    if boxes.ndim != 3 or boxes.shape[2] != 4 or logits.ndim != 3 or logits.shape[:2] != boxes.shape[:2]:
        raise ConfigError(
            f"a detector must give boxes (B, N, 4) and logits (B, N, C), got {tuple(boxes.shape)} and "
            f"{tuple(logits.shape)}"
        )
    return boxes, logits


def boxes_behind(
    suppression: Suppression, shape: Sequence[int | str], classes: Sequence[str] | None, front: Graph | None
) -> Graph:
    """The outputs of a detector, M boxes over all pictures, by picture, class and falling score.

    `boxes` (M, 4) float32 xyxy, in pixels of the picture given to `front`, or of the model's input where there is none;
    `box_score` (M,), `box_label_index` (M,), with classes `box_label` (M,) and `box_image` (M,), the number of the
    picture in the batch.

    Args:
        shape: of the logits (B, N, C).
    """
    graph = Graph("boxes")
    candidates = Value(graph, CANDIDATES, np.float32)
    scores = graph.Transpose(graph.Sigmoid(Value(graph, "logits", np.float32)), perm=[0, 2, 1])
    limits = np.int64(suppression.max_boxes), np.float32(suppression.iou), np.float32(suppression.score)
    chosen = graph.NonMaxSuppression(candidates, scores, *limits)
    picture, label = (graph.Gather(chosen, column, axis=1) for column in (0, 1))
    place = graph.Gather(chosen, [0, 2], axis=1)
    boxes = graph.GatherND(candidates, place)
    if front is not None and "corner" in front.marks:
        corner, step = (Value(graph, front.marks[name].name, np.float32) for name in ("corner", "step"))
        boxes = (boxes + graph.Concat(corner, corner, axis=0)) * graph.Concat(step, step, axis=0)
    graph.output("boxes", boxes, ["boxes", 4])
    graph.output("box_score", graph.GatherND(scores, chosen), ["boxes"])
    graph.output("box_label_index", label, ["boxes"])
    if classes is not None:
        names = graph.constant(np.array([str(name) for name in classes], dtype=object))
        graph.output("box_label", graph.Gather(names, label, axis=0), ["boxes"])
    graph.output("box_image", picture, ["boxes"])
    return graph


def check_boxes(caller: DetectionCaller, model: OnnxModel, inputs: Inputs) -> None:
    """Compare the candidate boxes with the model's.

    Raises:
        ExportError: they differ.
    """
    expected = caller(*inputs.values())[1].detach().cpu().numpy()
    found = model.run(inputs, [CANDIDATES])[CANDIDATES]
    difference = float(np.abs(expected - found).max(initial=0))
    if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max(initial=0))):
        raise ExportError(
            f"the exported graph gives other boxes than the model on the example: off by {difference:.2g}"
        )
