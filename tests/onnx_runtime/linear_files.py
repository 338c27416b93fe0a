"""Exported files whose answers are known: one matrix product behind each kind of input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from small_graphs import save_graph

CLASSES = ["ant", "bee", "cat"]


def array_file(path: Path, weight: np.ndarray, *, task: str = "tabular-classification", **entries: Any) -> Path:
    """Logits are X (B, F) @ weight (F, C)."""
    features, outputs = weight.shape
    return save_graph(
        path,
        {"input": (np.float32, ["batch", features])},
        [("MatMul", ["input", "weight"], ["logits"])],
        {"logits": (np.float32, ["batch", outputs])},
        {"weight": weight.astype(np.float32)},
        kind="array",
        task=task,
        **entries,
    )


def image_file(path: Path) -> Path:
    """Which colour is strongest, of pictures of any size."""
    return save_graph(
        path,
        {"image": (np.uint8, ["batch", "height", "width", 3])},
        [
            ("Cast", ["image"], ["wide"], {"to": 1}),
            ("ReduceMean", ["wide", "axes"], ["logits"], {"keepdims": 0}),
        ],
        {"logits": (np.float32, ["batch", 3])},
        {"axes": np.array([1, 2])},
        kind="image",
        task="image-classification",
        inputs_form="raw",
        classes=["red", "green", "blue"],
        format="2",
    )


def text_file(path: Path, tokenizer: str) -> Path:
    """Logits are (sum, -sum) of the token numbers, of which the padding is 0."""
    return save_graph(
        path,
        {"input_ids": (np.int64, ["batch", "sequence"])},
        [
            ("ReduceSum", ["input_ids", "axes"], ["sum"], {"keepdims": 1}),
            ("Cast", ["sum"], ["real"], {"to": 1}),
            ("MatMul", ["real", "weight"], ["logits"]),
        ],
        {"logits": (np.float32, ["batch", 2])},
        {"axes": np.array([1]), "weight": np.array([[1.0, -1.0]], np.float32)},
        kind="text",
        task="text-classification",
        inputs_form="raw",
        classes=["many", "few"],
        preprocess={"kind": "text", "tokenizer": tokenizer, "max_length": 8, "pad_id": 0},
    )
