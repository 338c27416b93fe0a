"""What a run gives back."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from pyft.samples import Kind, Problem

if TYPE_CHECKING:
    from pyft.evaluation.metrics import Metrics
    from pyft.explain.explanation import Explanation
    from pyft.freezing.plan import FreezePlan
    from pyft.target_scale import TargetScale

MAIN_METRICS = ("accuracy", "macro_f1", "exact_match", "micro_f1", "rmse", "mae", "r2", "loss")
"""What is shown of the metrics after each epoch and in the short table."""


@dataclass(repr=False)
class Result:
    """A tuned model and everything that was learned about it. Printing it gives a short table and the next commands.

    Attributes:
        model: the tuned module, in eval mode; the same object that was given to `finetune`, tuned in place. Where there
            is a `target_scale`, it gives (y - mean) / std; `target_scale.unscale(model(x))` is y.
        metrics: final values: "val_accuracy", "val_macro_f1", "val_loss", ..., and "test_..." given a test set.
        history: one dict per epoch: stage, epoch, step, lr, train_loss, val_..., seconds.
        per_class: precision, recall, f1, support of each class, on the test set if given, else on validation data.
        confusion: (C, C) int64, rows are the true classes, of the same samples as `per_class`; None for regression.
        classes: label names in the order of the model's outputs; None for regression.
        plan: what was trained in the stage of the best epoch.
        run_dir: the folder of the run.
        onnx: the exported model, or None.
        parity: comparison of the ONNX file with PyTorch: differences, agreement, batch sizes; None without export.
        seconds: time spent per part of the story.
        notes: what was said about the data and the model.
        columns: names of the table columns that the model takes, in its order; None for other data.
        label_column: name of the table's label column, where it was given.
        target_scale: mean and std of the training targets, by which a regression was scaled; None: it was not. Metrics,
            `history`, `predict` and `evaluate` are in the targets' own unit.
    """

    model: nn.Module
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    per_class: list[dict[str, Any]]
    confusion: np.ndarray | None
    classes: list[str] | None
    kind: Kind
    problem: Problem
    plan: FreezePlan | None
    run_dir: Path
    onnx: Path | None = None
    parity: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    preprocess: Any = None
    data_source: str | None = None
    columns: tuple[str, ...] | None = None
    target_scale: TargetScale | None = None
    label_column: str | None = None

    def predict(self, raw: Any, *, batch_size: int = 64) -> list[dict[str, Any]]:
        """Predictions for raw samples, as `pyft.predict` gives them."""
        from pyft.evaluate import predict

        return predict(self, raw, batch_size=batch_size)

    def evaluate(
        self, data: Any, *, backend: Literal["torch", "onnx"] = "torch", batch_size: int = 64, **columns: Any
    ) -> Metrics:
        """Metrics on labelled data, from the module ("torch") or from the exported file ("onnx")."""
        from pyft.evaluate import evaluate

        return evaluate(self, data, backend=backend, batch_size=batch_size, **columns)

    def export_onnx(self, path: str | os.PathLike[str], **words: Any) -> Path:
        """The model as an ONNX file at `path`, proven on the run's validation data; words as of `pyft.export_onnx`."""
        from pyft.export_model import export_onnx

        return export_onnx(self, path, **words)

    def report(self, path: str | os.PathLike[str] | None = None, *, explain: bool = False, data: Any = None) -> Path:
        """Write the report of the run as one HTML page, as `pyft.report` does."""
        from pyft.run_report import report

        return report(self, path, explain=explain, data=data)

    def explain(
        self, x: Any, method: str = "integrated_gradients", target: str | int | None = None, **more: Any
    ) -> Explanation:
        """What the prediction for one sample rests on, as `pyft.explain` says."""
        from pyft.run_explain import explain

        return explain(self, x, method, target, **more)

    def next_commands(self) -> list[str]:
        """Commands that use what the run has left behind: for the shell, or Python where a function has to be given."""
        where = self.onnx if self.onnx is not None else self.run_dir
        if self.kind != "array" and not hasattr(self.preprocess, "spec"):
            name = getattr(self.preprocess, "__name__", "preprocess")
            data = repr(self.data_source) if self.data_source else "data"
            return [f"pyft.evaluate({str(where)!r}, {data}, preprocess={name})"] if self.onnx is not None else []
        if self.data_source is None:
            sample = {"text": "['a text']", "image": "['picture.jpg']", "array": "X"}[self.kind]
            return [f"pyft.evaluate({str(where)!r}, data)", f"pyft.predict({str(where)!r}, {sample})"]
        target, data = shlex.quote(str(where)), shlex.quote(self.data_source)
        sample = {"text": "'a text'", "image": "picture.jpg", "array": data}[self.kind]
        label = "" if self.label_column is None else f" --label-column {shlex.quote(self.label_column)}"
        commands = [f"pyft eval {target} {data}{label}", f"pyft predict {target} {sample}"]
        if self.onnx is None:
            commands.append(f"pyft export {shlex.quote(str(self.run_dir))}")
        return commands

    def __str__(self) -> str:
        rows = [(name, f"{value:.4f}") for name, value in self.metrics.items() if _is_shown(name)]
        rows += [("plan", self.plan_line()), ("seconds", ", ".join(f"{k} {v:.1f}" for k, v in self.seconds.items()))]
        if self.parity is not None:
            rows.append(("parity", self.parity_line()))
        rows += [("run", str(self.run_dir)), ("onnx", str(self.onnx) if self.onnx else "not exported")]
        rows.append(("report", str(self.run_dir / "report.html")))
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows if value]
        commands = self.next_commands()
        return "\n".join([*lines, *(["next:"] if commands else []), *(f"  {command}" for command in commands)])

    __repr__ = __str__

    def plan_line(self) -> str:
        """How much of the model was trained in the stage whose weights it holds."""
        if self.plan is None:
            return ""
        return f"{self.plan.num_trainable:,} of {self.plan.num_total:,} parameters trained ({self.plan.share:.2%})"

    def parity_line(self) -> str:
        """How the ONNX file compares with PyTorch."""
        parity = self.parity or {}
        return (
            f"largest relative difference {parity.get('max_rel', float('nan')):.1e}, "
            f"predictions agree {parity.get('agreement', float('nan')):.2%} of {parity.get('num_samples', 0)}"
        )


def _is_shown(name: str) -> bool:
    return name.removeprefix("val_").removeprefix("test_") in MAIN_METRICS
